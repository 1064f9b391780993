"""Retrieval methods: dense, lexical, and those made of others: hybrid, reranked, transformed.

Each is a frozen dataclass of options. Methods nest, and each level is searched with `cached_search`, so that an arm of
a hybrid and the same arm alone share cached results.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar

from rag.embed.encode import encode_queries
from rag.index.dense import VectorSearch
from rag.index.dense.exact import Exact
from rag.index.fusion import Fusion, ReciprocalRank
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights, TfIdfWeights
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_expand, cached_rerank, cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.dependencies import dependencies_of
from rag.retrieve.rerank import Reranker
from rag.retrieve.transform import Transform
from rag.runtime.options import Count, check_fields
from rag.types import Hit, UserError


@dataclass(frozen=True)
class Dense:
    """Search by the cosine of the embedder's vectors, exactly unless `index` says otherwise."""

    index: VectorSearch = field(default_factory=Exact)

    depends_on: ClassVar[tuple[str, ...]] = ("embedder",)
    lowest: ClassVar[float] = -1.0  # the lowest possible score

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        index = collection.dense(self.index)
        scores, rows = index.search(encode_queries(collection.embedder, questions), k)
        return [collection.hits(*found) for found in zip(rows, scores, strict=True)]


@dataclass(frozen=True)
class Lexical:
    """Search by the words that question and passage share; `weights` chooses BM25 or the cosine of TF-IDF vectors."""

    weights: BM25Weights | TfIdfWeights = BM25Weights()
    analyzer: Analyzer = Analyzer()

    depends_on: ClassVar[tuple[str, ...]] = ()
    lowest: ClassVar[float] = 0.0

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        found = collection.lexical(self.analyzer).search(questions, k, self.weights)
        return [collection.hits(rows, scores) for scores, rows in found]


@dataclass(frozen=True)
class Hybrid:
    """Search with several methods, the arms, and fuse the `depth` best of each.

    The arms are in the order of their names, and so are a fusion's weights.
    """

    arms: Mapping[str, Retriever] = field(default_factory=lambda: {"dense": Dense(), "lexical": Lexical()})
    fusion: Fusion = ReciprocalRank()
    depth: Count = 100

    def __post_init__(self):
        if len(self.arms) < 2:
            raise UserError(f"retriever.arms has {len(self.arms)} method: a hybrid needs two or more")
        check_fields(self)
        object.__setattr__(self, "arms", dict(sorted(self.arms.items())))

    @property
    def depends_on(self) -> tuple[str, ...]:
        return dependencies_of(*self.arms.values())

    @property
    def lower_bounds(self) -> list[float] | None:
        """Return the lowest score that each arm can give; None if it is unknown for any arm."""
        lowest = [getattr(arm, "lowest", None) for arm in self.arms.values()]
        known = [bound for bound in lowest if bound is not None]
        return known if len(known) == len(lowest) else None

    def inner(self, k: int) -> list[tuple[Retriever, int]]:
        """Return the methods that are searched with the same questions, each with its k: for estimates and tuning."""
        return [(arm, max(k, self.depth)) for arm in self.arms.values()]

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        arms = [cached_search(collection, arm, questions, depth) for arm, depth in self.inner(k)]
        fused = fuse(self.fusion, list(zip(*arms, strict=True)), self.lower_bounds)
        return [hits[:k] for hits in fused]


@dataclass(frozen=True)
class Reranked:
    """Rerank the first `depth` hits of a retriever; the others keep their order, with lower scores."""

    retriever: Retriever
    reranker: Reranker
    depth: Count = 50

    def __post_init__(self):
        check_fields(self)

    @property
    def depends_on(self) -> tuple[str, ...]:
        return dependencies_of(self.retriever, self.reranker)

    def inner(self, k: int) -> list[tuple[Retriever, int]]:
        """Return the method that is searched with the same questions, with its k: for estimates and tuning."""
        return [(self.retriever, max(k, self.depth))]

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        [(retriever, depth)] = self.inner(k)
        found = cached_search(collection, retriever, questions, depth)
        best = cached_rerank(collection, self.reranker, questions, [hits[: self.depth] for hits in found])
        return [[*top, *_below(top, hits[self.depth :])][:k] for top, hits in zip(best, found, strict=True)]


def _below(top: Sequence[Hit], rest: Sequence[Hit]) -> list[Hit]:
    """Return the rest with its scores moved below the last of the top."""
    if not top or not rest:
        return list(rest)
    shift = top[-1].score - 1.0 - rest[0].score
    return [replace(hit, score=hit.score + shift) for hit in rest]


@dataclass(frozen=True)
class Transformed:
    """Search with the texts that a transform writes in place of a question, and fuse the results."""

    retriever: Retriever
    transform: Transform
    fusion: Fusion = ReciprocalRank()
    depth: Count = 100  # hits of each text

    def __post_init__(self):
        check_fields(self)

    @property
    def depends_on(self) -> tuple[str, ...]:
        return dependencies_of(self.retriever, self.transform)

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        expanded = cached_expand(collection, self.transform, questions)
        flat = [text for texts in expanded for text in texts]
        found = iter(cached_search(collection, self.retriever, flat, max(k, self.depth)))
        arms = [[next(found) for _ in texts] for texts in expanded]
        return [hits[:k] for hits in fuse_searches(self.fusion, arms, self.retriever)]


def fuse_searches(
    fusion: Fusion, searches: Sequence[Sequence[Sequence[Hit]]], retriever: Retriever
) -> list[list[Hit]]:
    """Fuse the hits of one retriever's searches for each question; one search alone keeps its scores."""
    lowest = getattr(retriever, "lowest", None)
    fused = fuse(fusion, searches, None if lowest is None else [lowest])
    return [list(arms[0]) if len(arms) == 1 else hits for arms, hits in zip(searches, fused, strict=True)]


def fuse(
    fusion: Fusion, arms: Sequence[Sequence[Sequence[Hit]]], lower_bounds: Sequence[float] | None
) -> list[list[Hit]]:
    """Return all hits of each question's arms as one ranking, with the scores of the fusion."""
    rankings = [[[(hit.row, hit.score) for hit in hits] for hits in question] for question in arms]
    results = []
    for question, ranking in zip(arms, fusion.fuse_batch(rankings, lower_bounds), strict=True):
        hit_of = {hit.row: hit for hits in question for hit in hits}
        results.append([replace(hit_of[row], score=score) for row, score in ranking])
    return results


@dataclass(frozen=True)
class Search:
    """Search a collection with a method, for the pipeline: the k best passages for a question."""

    collection: Collection
    method: Retriever
    k: Count = 3

    def __post_init__(self):
        check_fields(self)

    def __call__(self, question: str) -> list[Hit]:
        """Return at most k hits, best first."""
        [hits] = cached_search(self.collection, self.method, [question], self.k)
        return hits

    @property
    def score_threshold(self) -> float | None:
        """Return the score from which a hit is likely to be about the question; None where that is not known."""
        return self.collection.embedder.score_threshold if isinstance(self.method, Dense) else None
