"""MaxSim, late interaction (Khattab and Zaharia 2020, arXiv:2004.12832), over the embedder's token vectors."""

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
from rag.retrieve.rerank.cross_encoder import _pairs, _ranked
from rag.runtime.shapes import round_up_text
from rag.types import Hit, UserError

_CANDIDATES = 16  # passages of one call of maxsim
_BLOCK = 1024  # passages whose token vectors are made together
_KEPT_BYTES = 1 << 30  # of token vectors a collection, in float16


@dataclass(frozen=True)
class MaxSim:
    """Late interaction: the mean over the question's tokens of the best cosine with any token of the passage.

    Khattab and Zaharia 2020 (ColBERT, arXiv:2004.12832), who take the sum: the order is the same, and the mean
    compares across questions. The token states are the embedder's own, which was not trained for this; nothing
    else is loaded. They are kept in float16 while the collection lives, up to a gigabyte, so a passage that many
    questions find is encoded once. A passage without tokens scores -1, the lowest cosine; a question without
    tokens leaves the order as it is. Raises UserError for an embedder without token states.
    """

    uses: ClassVar[tuple[str, ...]] = ("embedder",)

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
        passages = _token_vectors(collection, encode, [passage for _, passage in _pairs(questions, hits)])
        scores = [
            _maxsim_scores(queries[question], [passages[hit.chunk.text] for hit in found])
            for question, found in zip(questions, hits, strict=True)
        ]
        return _ranked(hits, np.concatenate([np.zeros(0, np.float32), *scores]))


@jax.jit
@partial(jax.vmap, in_axes=(None, None, 0, 0))
def maxsim(
    query: Float[Array, "T E"], length: Int[Array, ""], passage: Float[Array, "S E"], size: Int[Array, ""]
) -> Float[Array, ""]:
    """Written for one passage: the mean over `length` query tokens of the highest dot product with `size` tokens.

    Vectors of unit length; what stands past `length` and `size` is padding. Without passage tokens -1, without
    query tokens 0.
    """
    similarity = jnp.einsum("te,se->ts", query, passage, preferred_element_type=jnp.float32)
    best = jnp.where(jnp.arange(passage.shape[0]) < size, similarity, -1.0).max(axis=1)
    return jnp.where(jnp.arange(query.shape[0]) < length, best, 0.0).sum() / jnp.maximum(length, 1)


def _maxsim_scores(
    query: Float32[np.ndarray, "T E"], passages: Sequence[Float[np.ndarray, "_ E"]]
) -> Float32[np.ndarray, "C"]:
    """Every candidate's score; those of like lengths run together, in programs of few shapes."""
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
    """The matrices in one array of `rows`, float32, zeros where they end."""
    longest = max(1, *(len(matrix) for matrix in vectors))
    array = np.zeros((rows, round_up_text(longest, 1 << 30), vectors[0].shape[1]), np.float32)
    for row, matrix in zip(array, vectors, strict=False):
        row[: len(matrix)] = matrix
    return array


# Token vectors of each living collection's passages, by text, the oldest first.
_kept: WeakKeyDictionary[Collection, OrderedDict[str, np.ndarray]] = WeakKeyDictionary()


def _token_vectors(
    collection: Collection, encode: Callable[[Sequence[str]], list[np.ndarray]], texts: Sequence[str]
) -> dict[str, np.ndarray]:
    """float16 [S, E] of each text, from what is kept where it is there.

    Always rounded to float16, kept or not: what was asked before may change no score.
    """
    kept = _kept.setdefault(collection, OrderedDict())
    found = {text: kept.get(text) for text in texts}
    missing = [text for text, vectors in found.items() if vectors is None]
    for start in range(0, len(missing), _BLOCK):
        block = missing[start : start + _BLOCK]
        for text, vectors in zip(block, encode(block), strict=True):
            found[text] = kept[text] = vectors.astype(np.float16)
    size = sum(vectors.nbytes for vectors in kept.values())
    while size > _KEPT_BYTES:
        size -= kept.popitem(last=False)[1].nbytes
    return found
