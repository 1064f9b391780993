"""Retrieval methods: dense, lexical, and those made of others: hybrid, reranked, transformed.

Each is a frozen dataclass of options whose `search` asks the collection for what is heavy. Methods nest, and each
level is searched through `collection.search`, so that an arm of a hybrid is the same kept result as the arm alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import ClassVar

from rag.index import analyzer, dense, fusion, lexical
from rag.index.analyzer import Analyzer
from rag.index.fusion import Convex, ReciprocalRank
from rag.index.lexical import BM25Weights, TfIdfWeights
from rag.ops import topk
from rag.retrieve.collection import Collection, Reranker, Retriever, Transform
from rag.types import Hit, UserError


@dataclass(frozen=True)
class Dense:
    """Exact cosine search over the embedder's vectors."""

    uses: ClassVar = ("embedder",)
    code: ClassVar = (dense, topk)
    lowest: ClassVar = -1.0  # that a score can be

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        scores, rows = collection.dense.search(collection.embedder.encode_queries(questions), k)
        return [collection.hits(*found) for found in zip(rows, scores, strict=True)]


@dataclass(frozen=True)
class BM25:
    """Okapi BM25 and its variants over an inverted index (Robertson et al. 1994; Kamphuis et al. 2020)."""

    weights: BM25Weights = BM25Weights()
    analyzer: Analyzer = Analyzer()

    uses: ClassVar = ()
    code: ClassVar = (lexical, analyzer)
    lowest: ClassVar = 0.0

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        found = collection.lexical(self.analyzer).search(questions, k, self.weights)
        return [collection.hits(rows, scores) for scores, rows in found]


@dataclass(frozen=True)
class TfIdf:
    """The cosine of TF-IDF vectors (Salton and Buckley 1988)."""

    weights: TfIdfWeights = TfIdfWeights()
    analyzer: Analyzer = Analyzer()

    uses: ClassVar = ()
    code: ClassVar = (lexical, analyzer)
    lowest: ClassVar = 0.0

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        found = collection.lexical(self.analyzer).search(questions, k, self.weights)
        return [collection.hits(rows, scores) for scores, rows in found]
