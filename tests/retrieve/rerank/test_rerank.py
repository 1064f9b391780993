"""What all rerankers have in common: the same hits with new scores, and no effect of the other questions."""

import math

import pytest

from rag.retrieve.rerank import Reranker
from rag.retrieve.rerank.cross_encoder import CrossEncoder
from rag.retrieve.rerank.likelihood import Likelihood
from rag.retrieve.rerank.maxsim import MaxSim
from rag.runtime.cache.keys import content_key
from tests.retrieve.passages import QUESTIONS, TEXTS, all_hits, hits_of, scores_of
from tests.tiny_collections import collection_of


@pytest.fixture(params=["cross_encoder", "maxsim", "likelihood"])
def reranker(request, classifier) -> Reranker:
    match request.param:
        case "cross_encoder":
            return CrossEncoder(str(classifier))
        case "maxsim":
            return MaxSim()
    return Likelihood(passage_tokens=40, question_tokens=20)


def test_the_same_hits_best_first(collection, reranker):
    given = all_hits(collection)
    results = reranker.rerank(collection, QUESTIONS, given)
    assert isinstance(reranker, Reranker)
    for before, after in zip(given, results, strict=True):
        assert {hit.chunk.id for hit in after} == {hit.chunk.id for hit in before}
        assert len(after) == len(before)
        scores = [hit.score for hit in after]
        assert scores == sorted(scores, reverse=True)
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert len(set(scores)) > 3


def test_no_hits(collection, reranker):
    some = hits_of(collection, [1, 3])
    assert reranker.rerank(collection, [], []) == []
    assert reranker.rerank(collection, QUESTIONS, [[], [], []]) == [[], [], []]
    [first, second, third] = reranker.rerank(collection, QUESTIONS, [[], some, []])
    assert (first, len(second), third) == ([], 2, [])


def test_equal_passages_keep_their_order(embedder, generator, reranker):
    collection = collection_of(["seal", "gull", "seal", "gull", "seal"], embedder, generator)
    [found] = reranker.rerank(collection, ["seals"], [hits_of(collection, [4, 3, 2, 1, 0])])
    ids = [hit.chunk.document_id for hit in found]
    assert ids in (["d4", "d2", "d0", "d3", "d1"], ["d3", "d1", "d4", "d2", "d0"])


def test_a_question_is_scored_as_it_is_alone(collection, reranker):
    together = scores_of(reranker.rerank(collection, QUESTIONS, all_hits(collection)))
    for question, expected in zip(QUESTIONS, together, strict=True):
        [alone] = reranker.rerank(collection, [question], [hits_of(collection, range(len(TEXTS)))[::-1]])
        assert {hit.chunk.text: hit.score for hit in alone} == pytest.approx(expected, abs=1e-4)


def test_its_options_are_its_cache_key(reranker):
    assert len(content_key(reranker)) == 64
    assert hash(reranker) == hash(reranker)
    assert set(reranker.depends_on) <= {"embedder", "generator"}


@pytest.mark.parametrize("question", ["", "   ", "\U0001f9ad", "z" * 1_000_000, "seal " * 200_000])
def test_odd_questions(collection, reranker, question):
    [found] = reranker.rerank(collection, [question], [hits_of(collection, range(len(TEXTS)))])
    assert len(found) == len(TEXTS)
    assert all(math.isfinite(hit.score) for hit in found)
