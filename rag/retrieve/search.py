"""Retrieval methods: dense, lexical, and those made of others: hybrid, reranked, transformed.

Each is a frozen dataclass of options whose `search` asks the collection for what is heavy. Methods nest, and each
level is searched through `collection.search`, so that an arm of a hybrid is the same kept result as the arm alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

from rag.index.dense.binary import Binary
from rag.index.dense.exact import Exact
from rag.index.dense.int8 import Int8Scan
from rag.index.dense.matryoshka import Matryoshka
from rag.index.fusion import Fusion, ReciprocalRank
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights, TfIdfWeights
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker
from rag.retrieve.transform import Transform
from rag.runtime.options import Count, check_fields
from rag.types import Hit, UserError


@dataclass(frozen=True)
class Dense:
    """Cosine search over the embedder's vectors: exact, or as `index` says."""

    index: Exact | Int8Scan | Binary | Matryoshka = field(default_factory=Exact)

    uses: ClassVar[tuple[str, ...]] = ("embedder",)
    lowest: ClassVar[float] = -1.0  # that a score can be

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        index = collection.dense(self.index)
        scores, rows = index.search(collection.embedder.encode_queries(questions), k)
        return [collection.hits(*found) for found in zip(rows, scores, strict=True)]


@dataclass(frozen=True)
class Lexical:
    """Search by the words that question and passage share: BM25, or the cosine of TF-IDF vectors, by `weights`."""

    weights: BM25Weights | TfIdfWeights = BM25Weights()
    analyzer: Analyzer = Analyzer()

    uses: ClassVar[tuple[str, ...]] = ()
    lowest: ClassVar[float] = 0.0

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        found = collection.lexical(self.analyzer).search(questions, k, self.weights)
        return [collection.hits(rows, scores) for scores, rows in found]


@dataclass(frozen=True)
class Hybrid:
    """Several methods' results made one by a fusion; each arm gives its `depth` best.

    The arms stand in the order of their names, and so do a fusion's weights.
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
    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(name for arm in self.arms.values() for name in arm.uses))

    @property
    def lower_bounds(self) -> list[float] | None:
        """The lowest score that each arm can give; None where that is not known of all."""
        lower_bounds = [getattr(arm, "lowest", None) for arm in self.arms.values()]
        return None if None in lower_bounds else lower_bounds

    def inner(self, k: int) -> list[tuple[Retriever, int]]:
        """What is searched for the same questions, and how deep."""
        return [(arm, max(k, self.depth)) for arm in self.arms.values()]

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        arms = [collection.search(arm, questions, depth) for arm, depth in self.inner(k)]
        return _fused(collection, list(zip(*arms, strict=True)), self.fusion, self.lower_bounds, k)


@dataclass(frozen=True)
class Reranked:
    """The reranker's order of the retriever's `depth` best; the rest follows as it was, with scores below."""

    retriever: Retriever
    reranker: Reranker
    depth: Count = 50

    def __post_init__(self):
        check_fields(self)

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.retriever.uses, *self.reranker.uses)))

    def inner(self, k: int) -> list[tuple[Retriever, int]]:
        """What is searched for the same questions, and how deep."""
        return [(self.retriever, max(k, self.depth))]

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        [(retriever, depth)] = self.inner(k)
        found = collection.search(retriever, questions, depth)
        best = collection.rerank(self.reranker, questions, [hits[: self.depth] for hits in found])
        return [[*top, *_below(top, hits[self.depth :])][:k] for top, hits in zip(best, found, strict=True)]


def _below(top: Sequence[Hit], rest: Sequence[Hit]) -> list[Hit]:
    """The rest with its scores moved below the last of the top."""
    if not top or not rest:
        return list(rest)
    shift = top[-1].score - 1.0 - rest[0].score
    return [Hit(hit.chunk, hit.score + shift) for hit in rest]


@dataclass(frozen=True)
class Transformed:
    """A search for the texts that the transform writes in place of each question, their results fused."""

    retriever: Retriever
    transform: Transform
    fusion: Fusion = ReciprocalRank()
    depth: Count = 100  # of each text

    def __post_init__(self):
        check_fields(self)

    @property
    def uses(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys((*self.retriever.uses, *self.transform.uses)))

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        texts = collection.expand(self.transform, questions)
        flat = [text for written in texts for text in written]
        found = iter(collection.search(self.retriever, flat, max(k, self.depth)))
        arms = [[next(found) for _ in written] for written in texts]
        lowest = getattr(self.retriever, "lowest", None)
        fused = _fused(collection, arms, self.fusion, None if lowest is None else [lowest], k)
        return [hits[0][:k] if len(hits) == 1 else mixed for hits, mixed in zip(arms, fused, strict=True)]


def _fused(
    collection: Collection,
    arms: Sequence[Sequence[Sequence[Hit]]],
    fusion: Fusion,
    lower_bounds: Sequence[float] | None,
    k: int,
) -> list[list[Hit]]:
    """For each question the k best of its arms' hits."""
    rankings = [
        [[(collection.row(hit.chunk), hit.score) for hit in hits] for hits in question] for question in arms
    ]
    results = fusion.fuse_batch(rankings, lower_bounds)
    return [
        collection.hits([row for row, _ in found[:k]], [score for _, score in found[:k]]) for found in results
    ]


@dataclass(frozen=True)
class Search:
    """A method over a collection, for the pipeline: the k best passages for a question."""

    collection: Collection
    method: Retriever
    k: Count = 3

    def __post_init__(self):
        check_fields(self)

    def __call__(self, question: str) -> list[Hit]:
        """At most k hits, best first."""
        [hits] = self.collection.search(self.method, [question], self.k)
        return hits

    @property
    def score_threshold(self) -> float | None:
        """The score from which a hit is likely to be about the question; None where that is not known."""
        return self.collection.embedder.score_threshold if isinstance(self.method, Dense) else None
