"""The options of tuning: which parameters are tried, for which metric, and how the queries are split.

conf/tuning/ has the defaults.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import Annotated, Any, ClassVar, Protocol, runtime_checkable

import numpy as np
from annotated_types import Ge, Le, MinLen

from rag.evaluate.tuning.ranking_metric import RankingMetric
from rag.index.fusion import Convex, Fusion, Normalizer, RankConstant, ReciprocalRank
from rag.runtime.options import Count, Filled, Seed, Share, check_fields

_MOST_FOLDS = int(np.iinfo(np.int32).max)
_STEPS = 100  # no number of queries shows a difference between finer weights than hundredths
_K1 = 1000  # from here on term frequencies just add up

Point = dict[str, Any]  # the parameters of one point of a grid, ready for JSON
Steps = Annotated[int, Ge(1), Le(_STEPS)]
K1 = Annotated[float, Ge(0), Le(_K1)]


@runtime_checkable
class FusionGrid(Protocol):
    """Ways to fuse: every choice of the family x depths x weights."""

    steps: int
    depths: Sequence[int]
    family: ClassVar[str]

    def choices(self) -> list[Point]:
        """Return the parameters of the family, besides depths and weights."""
        ...

    def fusion(self, point: Point) -> Fusion:
        """Return the fusion of a point."""
        ...


@dataclass(frozen=True)
class ConvexGrid:
    """Weighted means of normalised scores: normalisers x depths x weights.

    Weights are the multiples of 1 / steps that sum to 1, nearest to equal first: among equals the first is
    taken. `depths` are lengths that each arm's results are cut to, in all combinations; none cuts nothing.
    """

    normalizers: Annotated[Sequence[Normalizer], MinLen(1)]
    steps: Steps
    depths: Sequence[Count]

    family: ClassVar[str] = "convex"

    def __post_init__(self) -> None:
        check_fields(self)

    def choices(self) -> list[Point]:
        """Return a point for each normaliser."""
        return [{"normalizer": name} for name in self.normalizers]

    def fusion(self, point: Point) -> Fusion:
        """Return the fusion of a point."""
        return Convex(point["normalizer"], point["weights"])


@dataclass(frozen=True)
class ReciprocalRankGrid:
    """Reciprocal rank fusion: constants x depths x weights; depths and weights are those of ConvexGrid."""

    constants: Annotated[Sequence[RankConstant], MinLen(1)]
    steps: Steps
    depths: Sequence[Count]

    family: ClassVar[str] = "rrf"

    def __post_init__(self) -> None:
        check_fields(self)

    def choices(self) -> list[Point]:
        """Return a point for each constant."""
        return [{"constant": constant} for constant in self.constants]

    def fusion(self, point: Point) -> Fusion:
        """Return the fusion of a point."""
        return ReciprocalRank(point["constant"], point["weights"])


@dataclass(frozen=True)
class BM25Grid:
    """Parameters of the retriever's variant of BM25: k1 x b."""

    k1: Annotated[Sequence[K1], MinLen(1)]
    b: Annotated[Sequence[Share], MinLen(1)]

    family: ClassVar[str] = "bm25"

    def __post_init__(self) -> None:
        check_fields(self)

    def points(self) -> list[Point]:
        """Return every pair of k1 and b."""
        return [{"k1": k1, "b": b} for k1, b in product(self.k1, self.b)]


@dataclass(frozen=True)
class Tuning:
    """The grid, the metric to choose by, and the number of folds that the queries are split into by `seed`."""

    grid: ConvexGrid | ReciprocalRankGrid | BM25Grid
    measure: Filled  # or MRR, Recall, Precision, Success, at any cut-off
    folds: Annotated[int, Ge(2), Le(_MOST_FOLDS)]
    seed: Seed

    def __post_init__(self) -> None:
        check_fields(self)
        RankingMetric.named(self.measure)
