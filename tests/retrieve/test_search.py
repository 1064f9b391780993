"""Methods that nest, over a small collection: arms, rerankers, transforms, and their cached results."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.index.fusion import Convex, ReciprocalRank
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights, TfIdfWeights
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker
from rag.retrieve.search import Dense, Hybrid, Lexical, Reranked, Search, Transformed
from rag.retrieve.transform import Transform
from rag.runtime.cache.memo import Memo
from rag.types import Hit, UserError
from tests.tiny_collections import collection_of

TEXTS = ["a seal eats fish", "a whale eats krill", "a gull nests on the cliff", "krill drift in swarms"]
METHODS = {
    "dense": Dense(),
    "bm25": Lexical(),
    "tfidf": Lexical(TfIdfWeights()),
    "hybrid": Hybrid({"dense": Dense(), "lexical": Lexical()}),
}


def collection(texts: Sequence[str] = TEXTS, memo: Memo | None = None) -> Collection:
    return collection_of(texts, BagOfWords().fit(texts), memo=memo)


def names(hits: Sequence[Hit]) -> list[str]:
    return [hit.chunk.document_id for hit in hits]


@dataclass(frozen=True)
class Backwards:
    """A reranker that turns the order round."""

    depends_on: ClassVar[tuple[str, ...]] = ()

    def rerank(self, collection, questions, hits):
        return [
            [replace(hit, score=float(-rank)) for rank, hit in enumerate(reversed(found))] for found in hits
        ]


@dataclass(frozen=True)
class Wordings:
    """A transform that always writes the same texts."""

    texts: tuple[str, ...]
    depends_on: ClassVar[tuple[str, ...]] = ("generator",)

    def expand(self, collection, questions):
        return [list(self.texts) for _ in questions]


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_every_method_finds_the_passage_first(method):
    assert isinstance(method, Retriever)
    found = cached_search(collection(), method, ["whale krill", "gull cliff"], 3)
    assert [names(hits)[0] for hits in found] == ["d1", "d2"]
    for hits in found:
        assert len(hits) <= 3
        scores = [hit.score for hit in hits]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
@pytest.mark.parametrize(
    "question", ["", "the a of", "🦭 ŧ \u0000", "krill " * 200_000, "what is a neutrino"]
)
def test_odd_questions_are_searched_like_any_other(method, question):
    [hits] = cached_search(collection(), method, [question], 100)
    assert len(hits) <= len(TEXTS)
    assert all(np.isfinite(hit.score) for hit in hits)


def test_no_questions_find_nothing():
    assert cached_search(collection(), METHODS["hybrid"], [], 3) == []


def test_a_hybrid_is_the_fusion_of_its_arms():
    c, questions = collection(), ["krill eats", "fish on the cliff"]
    arms = {"dense": Dense(), "lexical": Lexical()}
    for fusion in (ReciprocalRank(), Convex("min_max"), Convex("theoretical_min_max"), Convex("dbsf")):
        found = cached_search(c, Hybrid(arms, fusion), questions, 4)
        for question, hits in zip(questions, found, strict=True):
            rankings = [
                [(hit.row, hit.score) for hit in cached_search(c, arm, [question], 100)[0]]
                for arm in arms.values()
            ]
            [wanted] = fusion.fuse_batch([rankings], [-1.0, 0.0])
            assert [(hit.row, hit.score) for hit in hits] == wanted[:4]


def test_the_arms_of_a_hybrid_stand_in_the_order_of_their_names():
    forth = Hybrid({"a": Dense(), "b": Lexical()}, ReciprocalRank(weights=(1.0, 0.0)))
    back = Hybrid({"b": Lexical(), "a": Dense()}, ReciprocalRank(weights=(1.0, 0.0)))
    assert list(back.arms) == ["a", "b"]
    assert collection().cache_key(forth) == collection().cache_key(back)
    assert names(cached_search(collection(), back, ["whale eats krill"], 4)[0]) == names(
        cached_search(collection(), Dense(), ["whale eats krill"], 4)[0]
    )


def test_a_reranker_orders_the_best_and_the_rest_follows():
    assert isinstance(Backwards(), Reranker)
    c = collection()
    plain = names(cached_search(c, Dense(), ["whale eats krill"], 4)[0])
    [hits] = cached_search(c, Reranked(Dense(), Backwards(), depth=2), ["whale eats krill"], 4)
    assert names(hits) == [plain[1], plain[0], *plain[2:]]
    scores = [hit.score for hit in hits]
    assert scores == sorted(scores, reverse=True)
    assert max(scores[2:]) < min(scores[:2])


def test_a_transforms_texts_are_searched_and_fused():
    assert isinstance(Wordings(("krill",)), Transform)
    c = collection()
    [alone] = cached_search(c, Transformed(Lexical(), Wordings(("seal fish",))), ["ignored"], 4)
    assert alone == cached_search(c, Lexical(), ["seal fish"], 4)[0]
    [both] = cached_search(c, Transformed(Lexical(), Wordings(("seal", "cliff"))), ["ignored"], 4)
    assert set(names(both)) == {"d0", "d2"}


def test_what_was_searched_is_not_searched_again(tmp_path, monkeypatch):
    questions = ["whale krill", "gull cliff"]
    first = cached_search(collection(memo=Memo(tmp_path)), METHODS["hybrid"], questions, 3)

    def fail(*_):
        raise AssertionError("searched again")

    monkeypatch.setattr(Dense, "search", fail)
    monkeypatch.setattr(Lexical, "search", fail)
    assert cached_search(collection(memo=Memo(tmp_path)), METHODS["hybrid"], questions, 3) == first
    arm = cached_search(
        collection(memo=Memo(tmp_path)), Dense(), questions, 100
    )  # as the hybrid asked for it
    assert [names(hits)[0] for hits in arm] == ["d1", "d2"]


def test_what_was_reranked_is_not_reranked_again(tmp_path, monkeypatch):
    """The results are those without a cache; another k takes the cached hits and their cached order."""
    questions, method = ["whale krill", "gull cliff"], Reranked(Dense(), Backwards(), depth=10)
    first = cached_search(collection(memo=Memo(tmp_path)), method, questions, 4)
    assert first == cached_search(collection(), method, questions, 4)

    def fail(*_):
        raise AssertionError("computed again")

    monkeypatch.setattr(Dense, "search", fail)
    monkeypatch.setattr(Backwards, "rerank", fail)
    fewer = cached_search(collection(memo=Memo(tmp_path)), method, questions, 3)
    assert fewer == [hits[:3] for hits in first]


@pytest.mark.parametrize(
    "other",
    [
        Lexical(BM25Weights(k1=0.9)),
        Lexical(analyzer=Analyzer(stop_words=None)),
        Lexical(TfIdfWeights()),
        Dense(),
    ],
)
def test_another_setting_is_another_cache_key(other):
    assert collection().cache_key(Lexical()) != collection().cache_key(other)


def test_other_passages_and_models_are_another_cache_key():
    assert collection().cache_key(Lexical()) != collection(TEXTS[:3]).cache_key(Lexical())
    assert collection().cache_key(Lexical(), passages=False) == collection(TEXTS[:3]).cache_key(
        Lexical(), False
    )
    other = collection()
    other.embedder.fingerprint = "another"
    assert other.cache_key(Dense()) != collection().cache_key(Dense())
    assert other.cache_key(Lexical()) == collection().cache_key(Lexical())  # which embeds nothing


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: Hybrid({"dense": Dense()}), "two or more"),
        (lambda: Hybrid({"a": Dense(), "b": Dense()}, depth=0), "depth"),
        (lambda: Reranked(Dense(), Backwards(), 0), "depth"),
        (lambda: Search(collection(), Dense(), 0), "k=0"),
    ],
)
def test_what_cannot_be_is_refused(make, says):
    with pytest.raises(UserError, match=says):
        make()
