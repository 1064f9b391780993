"""MaxSim against its formula, and the cache of its token vectors."""

import gc
import weakref

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.retrieve.rerank import maxsim
from rag.retrieve.rerank.maxsim import MaxSim
from rag.types import UserError
from tests.retrieve.passages import QUESTIONS, TEXTS, all_hits, hits_of, scores_of
from tests.tiny_collections import collection_of


def test_maxsim_is_the_mean_of_the_best_cosines(collection, embedder):
    results = scores_of(MaxSim().rerank(collection, QUESTIONS, all_hits(collection)))
    for question, found in zip(QUESTIONS, results, strict=True):
        query = embedder.token_vectors([question])[0].astype(np.float64)
        for text, score in found.items():
            passage = embedder.token_vectors([text])[0].astype(np.float64)
            if len(passage):
                expected = sum(max(float(q @ p) for p in passage) for q in query) / len(query)
                assert score == pytest.approx(expected, abs=5e-4)  # passages are cached in float16
            else:
                assert score == -1.0


def test_a_passage_scores_one_with_itself(collection):
    [found] = MaxSim().rerank(collection, ["the seal"], [hits_of(collection, range(len(TEXTS)))])
    assert found[0].chunk.text == "the seal"
    assert found[0].score == pytest.approx(1, abs=5e-4)


def test_a_question_without_tokens_leaves_the_order(collection):
    [found] = MaxSim().rerank(collection, [""], [hits_of(collection, [3, 0, 4, 1])])
    assert [hit.chunk.document_id for hit in found] == ["d3", "d0", "d4", "d1"]
    assert {hit.score for hit in found} == {0.0}


def test_maxsim_of_padded_rows():
    rng = np.random.default_rng(0)
    query, passages = (
        rng.normal(size=(5, 8)).astype(np.float32),
        rng.normal(size=(3, 7, 8)).astype(np.float32),
    )
    sizes = np.array([7, 2, 0], np.int32)
    found = maxsim.maxsim(query, np.int32(4), passages, sizes)
    for score, passage, size in zip(found, passages, sizes, strict=True):
        best = [max([float(q @ p) for p in passage[:size]] + [-1.0]) for q in query[:4]]
        assert float(score) == pytest.approx(sum(best) / 4, abs=1e-5)


def test_each_passage_is_encoded_once_in_all(embedder, monkeypatch):
    """Over several calls, as a sweep makes them; and the cached vectors give the same scores to the bit."""
    collection, encoded, encode = collection_of(TEXTS, embedder), [], embedder.token_vectors

    def spy(texts, *, queries=False):
        if not queries:
            encoded.extend(texts)
        return encode(texts, queries=queries)

    monkeypatch.setattr(embedder, "token_vectors", spy)
    rows = [[0, 1, 2], [2, 3, 0], [5, 4, 1, 3]]
    parts = [
        MaxSim().rerank(collection, [q], [hits_of(collection, r)])
        for q, r in zip(QUESTIONS, rows, strict=True)
    ]
    assert sorted(encoded) == sorted(TEXTS)
    fresh = collection_of(TEXTS, embedder)
    whole = MaxSim().rerank(fresh, QUESTIONS, [hits_of(fresh, r) for r in rows])
    assert [found for [found] in parts] == whole


def test_cached_token_vectors_are_bounded_and_freed_with_the_collection(embedder, monkeypatch):
    collection = collection_of(TEXTS, embedder)
    expected = MaxSim().rerank(collection, QUESTIONS, all_hits(collection))
    monkeypatch.setattr(maxsim, "_CACHE_BYTES", 3000)
    small = collection_of(TEXTS, embedder)
    assert MaxSim().rerank(small, QUESTIONS, all_hits(small)) == expected
    assert 0 < sum(vectors.nbytes for vectors in maxsim._cache[small].values()) <= 3000
    gone = weakref.ref(small)
    del small
    gc.collect()
    assert gone() is None


def test_counted_words_have_no_token_vectors():
    collection = collection_of(TEXTS, BagOfWords().fit(TEXTS))
    with pytest.raises(UserError, match="embedder=minilm"):
        MaxSim().rerank(collection, ["seal"], [hits_of(collection, [0])])
