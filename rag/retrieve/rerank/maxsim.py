"""Rerank by MaxSim (late interaction; ColBERT, Khattab and Zaharia 2020, arXiv:2004.12832).

C candidates (passages of one question), T query tokens, S passage tokens, E embedding dim
"""

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar
from weakref import WeakKeyDictionary

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rag.retrieve.collection import Collection
from rag.retrieve.rerank.pairs import ranked
from rag.runtime.shapes import round_up_text
from rag.types import Hit, UserError

_CANDIDATES = 16  # passages of one call of `maxsim`
_BLOCK = 1024  # passages that are encoded together
_CACHE_BYTES = 1 << 30  # of token vectors a collection, in float16


@dataclass(frozen=True)
class MaxSim:
    """Score each passage by the mean over the question's tokens of the highest cosine with a token of the passage.

    The paper takes the sum: the order is the same, but means can be compared across questions. The token vectors are
    those of the embedder, which was not trained for this; no other model is loaded. They are cached in float16 in
    memory, up to a gigabyte for each collection, so that a passage that many questions find is encoded once. A passage
    without tokens scores -1, the lowest cosine; a question without tokens leaves the order unchanged.

    Raises:
        UserError: for an embedder without token vectors.
    """

    depends_on: ClassVar[tuple[str, ...]] = ("embedder",)

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        encode = getattr(collection.embedder, "token_vectors", None)
        if encode is None:
            raise UserError(
                "reranker=maxsim compares tokens' vectors, and this embedder has none: take a BERT-family one, "
                "such as embedder=minilm"
            )
        asked = list(dict.fromkeys(questions))
        queries = dict(zip(asked, encode(asked, queries=True), strict=True))
        texts = [hit.chunk.text for found in hits for hit in found]
        passages = _token_vectors(collection, encode, texts)
        scores = [
            _maxsim_scores(queries[question], [passages[hit.chunk.text] for hit in found])
            for question, found in zip(questions, hits, strict=True)
        ]
        return ranked(hits, np.concatenate([np.zeros(0, np.float32), *scores]))


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0, 0))
def maxsim(
    query: Float[Array, "T E"], length: Int[Array, ""], passage: Float[Array, "S E"], size: Int[Array, ""]
) -> Float[Array, ""]:
    """Return the mean over the query tokens of the highest dot product with a passage token.

    The function is written for one passage. The result is -1 without passage tokens, and 0 without query tokens.

    Args:
        query: unit vectors of the query's tokens, then padding.
        length: the number of query tokens.
        passage: unit vectors of the passage's tokens, then padding.
        size: the number of passage tokens.
    """
    similarity = jnp.einsum("te,se->ts", query, passage, preferred_element_type=jnp.float32)
    best = jnp.where(jnp.arange(passage.shape[0]) < size, similarity, -1.0).max(axis=1)
    return jnp.where(jnp.arange(query.shape[0]) < length, best, 0.0).sum() / jnp.maximum(length, 1)


def _maxsim_scores(
    query: Float32[np.ndarray, "T E"], passages: Sequence[Float[np.ndarray, "_ E"]]
) -> Float32[np.ndarray, "C"]:
    """Return every candidate's score; those of similar lengths are computed together, in programs of few sizes."""
    padded = _padded([query], 1)[0]
    order = np.argsort([len(passage) for passage in passages], kind="stable")
    scores = np.zeros(len(passages), np.float32)
    for start in range(0, len(order), _CANDIDATES):
        rows = order[start : start + _CANDIDATES]
        some = [passages[row] for row in rows]
        sizes = np.zeros(_CANDIDATES, np.int32)
        sizes[: len(some)] = [len(passage) for passage in some]
        found = maxsim(padded, np.int32(len(query)), _padded(some, _CANDIDATES), sizes)
        scores[rows] = np.asarray(found)[: len(rows)]
    return scores


def _padded(vectors: Sequence[Float[np.ndarray, "_ E"]], rows: int) -> Float32[np.ndarray, "C S E"]:
    """Return the matrices as one float32 array of `rows`, zeros where they end."""
    longest = max(1, *(len(matrix) for matrix in vectors))
    array = np.zeros((rows, round_up_text(longest, 1 << 30), vectors[0].shape[1]), np.float32)
    for row, matrix in zip(array, vectors, strict=False):
        row[: len(matrix)] = matrix
    return array


# The token vectors of each collection's passages, by text, the oldest first.
_cache: WeakKeyDictionary[Collection, OrderedDict[str, np.ndarray]] = WeakKeyDictionary()


def _token_vectors(
    collection: Collection, encode: Callable[[Sequence[str]], list[np.ndarray]], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """Return the token vectors of each text, float16 [S, E], from the cache where they are there.

    They are rounded to float16 in any case, so that earlier questions do not change a score.
    """
    cached = _cache.setdefault(collection, OrderedDict())
    found = {text: cached[text] for text in texts if text in cached}
    missing = [text for text in dict.fromkeys(texts) if text not in found]
    for start in range(0, len(missing), _BLOCK):
        block = missing[start : start + _BLOCK]
        for text, vectors in zip(block, encode(block), strict=True):
            found[text] = cached[text] = vectors.astype(np.float16)
    size = sum(vectors.nbytes for vectors in cached.values())
    while size > _CACHE_BYTES:
        size -= cached.popitem(last=False)[1].nbytes
    return found
