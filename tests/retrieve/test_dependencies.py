"""What a stage depends on: it is said in `depends_on`, and a result is never found again under another model."""

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.index.dense.exact import Exact
from rag.retrieve.cached import cached_expand, cached_rerank, cached_search
from rag.retrieve.dependencies import dependencies_of
from rag.retrieve.rerank.mmr import MMR
from rag.retrieve.search import Dense, Lexical
from rag.runtime.cache.memo import Memo
from rag.types import Hit, UserError
from tests.one_sentence import is_one_sentence
from tests.tiny_collections import collection_of

TEXTS = ["A seal eats fish.", "A whale eats krill.", "A gull nests on a cliff."]


def dense_search(collection, questions, k):
    return cached_search(collection, Dense(), questions, k)


def mmr(collection, questions, k):
    return cached_rerank(collection, MMR(), questions, cached_search(collection, Lexical(), questions, k))


def transform(collection, questions, k):
    @dataclass(frozen=True)
    class Same:
        depends_on: ClassVar = ("embedder",)

        def expand(self, collection, questions):
            return [[question] for question in questions]

    cached_expand(collection, Same(), questions)
    return cached_search(collection, Lexical(), questions, k)


def dense_index(collection, questions, k):
    scores, rows = collection.dense(Exact()).search(BagOfWords().fit(TEXTS).encode_queries(questions), k)
    return [collection.hits(*found) for found in zip(rows, scores, strict=True)]


def vectors(collection, questions, k):
    return [collection.hits([0], [float(collection.vectors[0, 0])]) for _ in questions]


def vectors_of_index(collection, questions, k):
    assert len(collection.index) == len(TEXTS) and collection.index.document_text("d0")
    return [collection.hits([0], [float(collection.index.vectors[0, 0])]) for _ in questions]


@dataclass(frozen=True)
class Undeclared:
    inside: str

    def search(self, collection, questions, k):
        return WAYS[self.inside](collection, questions, k)


@dataclass(frozen=True)
class Declared(Undeclared):
    depends_on: ClassVar = ("embedder",)


WAYS = {way.__name__: way for way in (dense_search, mmr, transform, dense_index, vectors, vectors_of_index)}


@pytest.mark.parametrize("inside", WAYS)
@pytest.mark.parametrize("cached", [False, True], ids=["empty cache", "cached before"])
def test_a_stage_that_uses_the_embedder_in_any_way_says_so(inside, cached, tmp_path):
    memo = Memo(tmp_path)
    searched = collection_of(TEXTS, BagOfWords().fit(TEXTS), memo=memo)
    if cached:  # the results of the stage inside, and the index of the vectors
        cached_search(searched, Declared(inside), ["whale krill"], 2)
        cached_search(searched, Dense(), ["whale krill"], 2)
    with pytest.raises(
        UserError, match=r'uses the embedder .* depends_on: ClassVar = \("embedder",\)'
    ) as told:
        cached_search(searched, Undeclared(inside), ["whale krill"], 2)
    assert is_one_sentence(str(told.value))
    [hits] = cached_search(searched, Declared(inside), ["whale krill"], 2)
    assert hits


@pytest.mark.parametrize("named", [("embeder",), "embedder", ["generator", "vectors"], 3, (["embedder"],)])
def test_a_wrong_depends_on_is_one_sentence_that_names_the_file(named):
    @dataclass(frozen=True)
    class Wrong:
        depends_on: ClassVar = named

    with pytest.raises(UserError, match=r"Wrong in .*test_dependencies\.py has depends_on = ") as told:
        dependencies_of(Wrong())
    assert is_one_sentence(str(told.value))
    assert "embedder, generator, queries" in str(told.value)


class Plain:
    depends_on = ()

    def rerank(self, collection, questions, hits):
        return [list(found) for found in hits]


Thawed = dataclass(type("Thawed", (Plain,), {"__module__": __name__}))


@pytest.mark.parametrize("kind", [Plain, Thawed])
def test_a_stage_that_is_no_frozen_dataclass_is_one_sentence_that_names_the_file(kind, tmp_path):
    searched = collection_of(TEXTS, BagOfWords().fit(TEXTS), memo=Memo(tmp_path))
    hits = cached_search(searched, Lexical(), ["whale"], 2)
    with pytest.raises(
        UserError, match=rf"{kind.__name__} in .*test_dependencies\.py is no frozen dataclass"
    ) as told:
        cached_rerank(searched, kind(), ["whale"], hits)
    assert is_one_sentence(str(told.value))


def hit_of(collection, score: object, row: object) -> Hit:
    """Return a hit as another program makes it: without the type checker of the tests."""
    [hit] = collection.hits([0], [0.0])
    object.__setattr__(hit, "score", score)
    object.__setattr__(hit, "row", row)
    return hit


@dataclass(frozen=True)
class Scores:
    kind: str
    value: float

    def search(self, collection, questions, k):
        return [[hit_of(collection, getattr(np, self.kind)(self.value), np.int64(0))] for _ in questions]


@pytest.mark.parametrize("kind", ["float16", "float32", "float64", "int64", "asarray"])
def test_scores_of_numpy_are_cached_as_numbers(kind, tmp_path):
    searched = collection_of(TEXTS, BagOfWords().fit(TEXTS), memo=Memo(tmp_path))
    for _ in range(2):
        [[hit]] = cached_search(searched, Scores(kind, 2.0), ["whale"], 1)
        assert (type(hit.score), hit.score, type(hit.row)) == (float, 2.0, int)


@pytest.mark.parametrize(
    ("kind", "value"), [("float32", float("nan")), ("float64", float("inf")), ("str_", 1.0)]
)
def test_scores_that_are_no_finite_numbers_are_reported(kind, value, tmp_path):
    searched = collection_of(TEXTS, BagOfWords().fit(TEXTS), memo=Memo(tmp_path))
    with pytest.raises(UserError, match="with finite scores that never rise"):
        cached_search(searched, Scores(kind, value), ["whale"], 1)
