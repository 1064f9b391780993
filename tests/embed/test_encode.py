"""The door through which vectors enter: any embedder's vectors are checked, in the cache and outside of it."""

import jax.numpy as jnp
import numpy as np
import pytest

from rag.embed.encode import encode_passages, encode_queries
from rag.embed.vector_cache import CachedEmbedder
from rag.retrieve.cached import cached_search
from rag.retrieve.rerank.mmr import MMR
from rag.retrieve.search import Dense, Lexical, Reranked
from rag.types import UserError
from tests.one_sentence import is_one_sentence
from tests.tiny_collections import StubEmbedder, collection_of

RIGHT = {
    "float32": lambda n: np.ones((n, 8), np.float32),
    "float64": lambda n: np.ones((n, 8)),
    "jax": lambda n: jnp.ones((n, 8)),
}
WRONG = {
    "None": lambda n: None,
    "lists": lambda n: [[1.0] * 8] * n,
    "a vector": lambda n: np.ones(8, np.float32),
    "another dim": lambda n: np.ones((n, 4), np.float32),
    "too few": lambda n: np.ones((n - 1, 8), np.float32),
    "integers": lambda n: np.ones((n, 8), np.int64),
    "objects": lambda n: np.ones((n, 8), object),
}


class Making(StubEmbedder):
    """An embedder that makes its vectors with a function, and those of questions with another."""

    def __init__(self, make, ask=None):
        super().__init__()
        object.__setattr__(self, "makers", (make, ask or make))

    def encode(self, texts, progress=None):
        return self.makers[0](len(texts))

    def encode_queries(self, texts):
        return self.makers[1](len(texts))


@pytest.mark.parametrize("make", RIGHT.values(), ids=RIGHT)
def test_floats_of_any_precision_enter_as_float32(make):
    for encode in (encode_passages, encode_queries):
        vectors = encode(Making(make), ["a", "b"])
        assert type(vectors) is np.ndarray and vectors.dtype == np.float32 and vectors.shape == (2, 8)


@pytest.mark.parametrize("make", WRONG.values(), ids=WRONG)
@pytest.mark.parametrize("wrap", [lambda embedder, folder: embedder, CachedEmbedder], ids=["plain", "cached"])
def test_what_is_no_vectors_is_one_sentence_that_names_the_file(make, wrap, tmp_path):
    embedder = wrap(Making(make), tmp_path)
    for encode, method in ((encode_passages, "encode"), (encode_queries, "encode_queries")):
        with pytest.raises(UserError, match=rf"Making in .*test_encode\.py: {method} returned ") as told:
            encode(embedder, ["a", "b"])
        assert is_one_sentence(" ".join(str(told.value).split()))
        assert "floats of shape (2, 8)" in str(told.value)


@pytest.mark.parametrize("method", [Dense(), Reranked(Lexical(), MMR())], ids=["dense", "mmr"])
def test_a_search_checks_the_vectors_of_its_questions(method):
    searched = collection_of(["a", "b"], Making(RIGHT["float32"], WRONG["another dim"]))
    with pytest.raises(UserError, match="encode_queries returned"):
        cached_search(searched, method, ["a"], 1)
