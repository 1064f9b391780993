"""Tuning inside one program: fusion weights and constants, BM25's k1 and b, and cut-offs, over cached results.

    Q queries, P points of the grid, A arms, C candidates of a query, T terms of a question
    D depths, W weights, K constants

What is tuned works on results that are already there: the arms' scores, or the counts behind BM25. So a grid
costs no search. The program only chooses (rag/evaluate/selection.py): what is reported is ranked by the code
that searches use, and measured by metrics.evaluate.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Annotated, ClassVar, Protocol, get_args, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le, MinLen
from jaxtyping import Array, Bool, Float32, Int32

from rag.evaluate.metrics.retrieval import Qrels
from rag.evaluate.tuning.cross_validation import (
    Judged,
    Measure,
    Point,
    Tuned,
    best_documents,
    nested_cross_validation,
    value,
)
from rag.index.fusion import (
    Convex,
    Fusion,
    Id,
    Normalizer,
    RankConstant,
    Ranking,
    ReciprocalRank,
    ScoreTable,
    convex,
    normalize,
    reciprocal_rank,
    score_table,
)
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights, Variant, bm25_scores
from rag.runtime.options import Count, Filled, Seed, Share, check_fields
from rag.types import UserError

_ELEMENTS = 1 << 22  # numbers that a block of queries holds at once: 16 MiB
_ALL = int(np.iinfo(np.int32).max)  # the depth that cuts nothing off
_STEPS = 100  # finer weights than hundredths no number of queries can tell apart
_K1 = 1000  # from here on term frequencies just add up


@runtime_checkable
class FusionGrid(Protocol):
    """Ways to fuse: every choice of the family x depths x weights."""

    steps: int
    depths: Sequence[int]
    family: ClassVar[str]

    def choices(self) -> list[Point]:
        """Parameters of the family, besides depths and weights."""
        ...

    def fusion(self, point: Point) -> Fusion:
        """What fuses at a point."""
        ...


Steps = Annotated[int, Ge(1), Le(_STEPS)]
K1 = Annotated[float, Ge(0), Le(_K1)]


@dataclass(frozen=True)
class ConvexGrid:
    """Weighted means of normalised scores: normalisers x depths x weights.

    Weights are the multiples of 1 / steps that sum to 1, nearest to equal first: among equals the first is
    taken. `depths`: what an arm may be cut to, each by itself; none leaves the arms as they are.
    """

    normalizers: Annotated[Sequence[Normalizer], MinLen(1)] = get_args(Normalizer)
    steps: Steps = 10
    depths: Sequence[Count] = ()

    family: ClassVar[str] = "convex"

    def __post_init__(self):
        check_fields(self)

    def choices(self) -> list[Point]:
        return [{"normalizer": name} for name in self.normalizers]

    def fusion(self, point: Point) -> Fusion:
        return Convex(point["normalizer"], point["weights"])


@dataclass(frozen=True)
class ReciprocalRankGrid:
    """Reciprocal rank fusion: constants x depths x weights; the latter as in ConvexGrid."""

    constants: Annotated[Sequence[RankConstant], MinLen(1)] = (10, 20, 40, 60, 80, 100)
    steps: Steps = 10
    depths: Sequence[Count] = ()

    family: ClassVar[str] = "rrf"

    def __post_init__(self):
        check_fields(self)

    def choices(self) -> list[Point]:
        return [{"constant": constant} for constant in self.constants]

    def fusion(self, point: Point) -> Fusion:
        return ReciprocalRank(point["constant"], point["weights"])


@dataclass(frozen=True)
class BM25Grid:
    """BM25 of the retriever's variant: k1 x b."""

    k1: Annotated[Sequence[K1], MinLen(1)] = (0.4, 0.6, 0.9, 1.2, 1.5, 2.0, 3.0)
    b: Annotated[Sequence[Share], MinLen(1)] = (0.0, 0.2, 0.4, 0.6, 0.75, 0.9, 1.0)

    family: ClassVar[str] = "bm25"

    def __post_init__(self):
        check_fields(self)

    def points(self) -> list[Point]:
        return [{"k1": k1, "b": b} for k1, b in product(self.k1, self.b)]


@dataclass(frozen=True)
class Tuning:
    """What is tried, what it is to be good at, and how the queries are split (by `seed`)."""

    grid: ConvexGrid | ReciprocalRankGrid | BM25Grid = ConvexGrid()
    measure: Filled = "nDCG@10"  # or MRR, Recall, Precision, Success, at any cut-off
    folds: Annotated[int, Ge(2), Le(_ALL)] = 5
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self)
        Measure.named(self.measure)


# --- fusion -------------------------------------------------------------------------------------------------


def tune_fusion(
    rankings: Mapping[str, Sequence[Ranking]],
    qrels: Qrels,
    options: Tuning,
    lower_bounds: Sequence[float | int] | None = None,
    document: Callable[[Id], str] = str,
    depth: int = 100,
) -> Tuned:
    """Tune how the arms' rankings are fused.

    `rankings`: query id -> one ranking per arm, best first. Their ids are documents, or passages of which
    `document` names the document; a document scores as its best passage, and the `depth` best documents of a
    query count. `lower_bounds`: the lowest score that each arm can give, or one for all, for theoretical_min_max. A
    judged query without rankings counts as 0. Raises UserError for a BM25Grid, arms that are not as many for
    every query, lower_bounds that are missing or not as many, and fewer judged queries than folds.
    """
    grid = options.grid
    if not isinstance(grid, FusionGrid):
        raise UserError("tuning.grid is one of BM25, which has no arms to fuse: choose a grid of fusions.")
    if len(counts := {len(arms) for arms in rankings.values()}) != 1:
        raise UserError(f"The queries to tune with have {sorted(counts)} arms: give each the same arms.")
    if lower_bounds is None and {"normalizer": "theoretical_min_max"} in grid.choices():
        raise UserError(
            "theoretical_min_max needs each arm's lowest score: give lower_bounds, or tune without it."
        )
    arms = counts.pop()
    if lower_bounds is not None and len(lower_bounds) not in (1, arms):
        raise UserError(
            f"There are {len(lower_bounds)} lower_bounds for {arms} arms: give one for each arm, or one for all."
        )

    def runs(point: Point, queries: Sequence[str]) -> dict[str, dict[str, float]]:
        asked = [query for query in queries if query in rankings]
        depths = point.get("depths", [None] * arms)
        cut = [[arm[:most] for arm, most in zip(rankings[q], depths, strict=True)] for q in asked]
        found = grid.fusion(point).fuse_batch(cut, lower_bounds)
        return {q: best_documents(ranking, document, depth) for q, ranking in zip(asked, found, strict=True)}

    tables = [score_table(rankings.get(query, [()] * arms)) for query in sorted(qrels)]
    measure = Measure.named(options.measure, depth)
    judged = _judged([[document(i) for i in table.ids] for table in tables], qrels, measure)
    values = _fusion_values(grid, tables, judged, lower_bounds, measure)
    points = _fusion_points(grid, arms)
    return nested_cross_validation(
        grid.family, options.measure, options.folds, options.seed, qrels, points, values, runs
    )


def _judged(documents: Sequence[Sequence[str]], qrels: Qrels, measure: Measure) -> Judged:
    return Judged.of(documents, [qrels[query] for query in sorted(qrels)], measure)


def _fusion_points(grid: FusionGrid, arms: int) -> list[Point]:
    """In the order in which the program has them."""
    depths = [{"depths": list(cut)} for cut in product(grid.depths, repeat=arms)] if grid.depths else [{}]
    weights = [{"weights": weights} for weights in _simplex(arms, grid.steps)]
    return [c | w | d for c, d, w in product(grid.choices(), depths, weights)]


def _simplex(arms: int, steps: int) -> list[list[float]]:
    whole = [w for w in product(range(steps + 1), repeat=arms) if sum(w) == steps]
    return [[n / steps for n in w] for w in sorted(whole, key=lambda w: sum(n * n for n in w))]


def _fusion_values(
    grid: FusionGrid,
    tables: Sequence[ScoreTable],
    judged: Judged,
    lower_bounds: Sequence[float | int] | None,
    measure: Measure,
) -> Float32[np.ndarray, "Q P"]:
    """The measure of every query at every point."""
    arms, width = len(tables[0].scores), judged.owners.shape[1]
    scores = np.stack([_widened(table.scores, width) for table in tables])
    ranks = np.stack([_widened(table.ranks, width) for table in tables])
    low = np.broadcast_to(np.asarray([0.0] if lower_bounds is None else lower_bounds, np.float32), arms)
    depths = np.array(list(product(grid.depths or [_ALL], repeat=arms)), np.int32)
    weights = np.array(_simplex(arms, grid.steps), np.float32)
    normalizers = tuple(point["normalizer"] for point in grid.choices() if "normalizer" in point)
    constants = np.array([point["constant"] for point in grid.choices() if "constant" in point], np.float32)
    points = len(grid.choices()) * len(depths) * len(weights)
    block = max(1, _ELEMENTS // (points * width * arms))
    inputs = (scores, ranks, judged, low, depths, constants, weights)
    return np.asarray(_fused_values(*inputs, normalizers, measure, block))


def _widened(array: np.ndarray, *shape: int) -> np.ndarray:
    """Filled up with zeros at the end of the last axes, to this shape."""
    missing = [(0, n - have) for n, have in zip(shape, array.shape[-len(shape) :], strict=True)]
    return np.pad(array, [(0, 0)] * (array.ndim - len(shape)) + missing)


@partial(jax.jit, static_argnames=("normalizers", "measure", "block"))
def _fused_values(
    scores: Float32[Array, "Q A C"],
    ranks: Int32[Array, "Q A C"],
    judged: Judged,
    lower_bounds: Float32[Array, "A"],
    depths: Int32[Array, "D A"],
    constants: Float32[Array, "K"],
    weights: Float32[Array, "W A"],
    normalizers: tuple[str, ...],
    measure: Measure,
    block: int,
) -> Float32[Array, "Q P"]:
    """P is (normalisers and constants) x depths x weights."""

    def one(scores: Float32[Array, "A C"], ranks: Int32[Array, "A C"], known: Judged) -> Float32[Array, "P"]:
        def each_weight(fuse: Callable, depth: Int32[Array, "A"]) -> Float32[Array, "W"]:
            found = (ranks > 0) & (ranks <= depth[:, None])
            fused = jax.vmap(fuse(found))(weights)
            return jax.vmap(lambda row: value(measure, row, found.any(axis=0), known))(fused)

        def by_scores(normalizer: str, found: Bool[Array, "A C"]) -> Callable:
            return partial(convex, jax.vmap(partial(normalize, normalizer))(scores, found, lower_bounds))

        def by_ranks(constant: Float32[Array, ""], found: Bool[Array, "A C"]) -> Callable:
            return partial(reciprocal_rank, ranks, found, constant)

        def each_depth(fuse: Callable) -> Float32[Array, "D W"]:
            return jax.vmap(partial(each_weight, fuse))(depths)

        convexes = [each_depth(partial(by_scores, name)).ravel() for name in normalizers]
        reciprocal = jax.vmap(lambda constant: each_depth(partial(by_ranks, constant)))(constants)
        return jnp.concatenate([*convexes, reciprocal.ravel()])

    return jax.lax.map(lambda query: one(*query), (scores, ranks, judged), batch_size=block)


# --- BM25 ---------------------------------------------------------------------------------------------------


def tune_bm25(
    index: LexicalIndex,
    questions: Mapping[str, str],
    qrels: Qrels,
    options: Tuning,
    document: Callable[[int], str],
    depth: int = 100,
    weights: BM25Weights = BM25Weights(),
) -> Tuned:
    """Tune k1 and b for the questions, query id -> text; `document` names the document of a row of the index.

    `weights` says all else of BM25. The candidates of a question are the passages that the extreme points of the
    grid find on the way to their `depth` best documents. What is reported is found by whole searches, as deep. A
    judged query without a question counts as 0. Raises UserError for a grid of fusions, fewer judged queries than
    folds.
    """
    grid = options.grid
    if not isinstance(grid, BM25Grid):
        raise UserError(f"tuning.grid is one of {grid.family}, which fuses arms: choose a BM25Grid.")

    def search(texts: Sequence[str], k1: float, b: float) -> list[Ranking]:
        return _deep(index, texts, replace(weights, k1=k1, b=b), document, depth)

    def runs(point: Point, queries: Sequence[str]) -> dict[str, dict[str, float]]:
        asked = [query for query in queries if query in questions]
        found = search([questions[query] for query in asked], **point)
        return {q: best_documents(ranking, document, depth) for q, ranking in zip(asked, found, strict=True)}

    texts = [questions.get(query, "") for query in sorted(qrels)]
    corners = product({min(grid.k1), max(grid.k1)}, {min(grid.b), max(grid.b)})
    found = [search(texts, float(k1), float(b)) for k1, b in corners]
    pools = [sorted({row for ranking in each for row, _ in ranking}) for each in zip(*found, strict=True)]
    measure = Measure.named(options.measure, depth)
    judged = _judged([[document(row) for row in rows] for rows in pools], qrels, measure)
    values = _bm25_values(index, texts, pools, grid, weights, judged, measure)
    folds, seed = options.folds, options.seed
    return nested_cross_validation(
        grid.family, options.measure, folds, seed, qrels, grid.points(), values, runs
    )


def _deep(
    index: LexicalIndex,
    texts: Sequence[str],
    weights: BM25Weights,
    document: Callable[[int], str],
    depth: int,
) -> list[Ranking]:
    """Each question's passages, deep enough for `depth` documents where so many can be found."""
    found: list[Ranking] = [[] for _ in texts]
    short, k = list(range(len(texts))), depth
    while short:
        for i, (scores, rows) in zip(short, index.search([texts[i] for i in short], k, weights), strict=True):
            found[i] = list(zip(rows.tolist(), scores.tolist(), strict=True))
        full = [i for i in short if len(found[i]) == k]
        short = [i for i in full if len({document(row) for row, _ in found[i]}) < depth]
        k *= 4
    return found


def _bm25_values(
    index: LexicalIndex,
    texts: Sequence[str],
    pools: Sequence[Sequence[int]],
    grid: BM25Grid,
    weights: BM25Weights,
    judged: Judged,
    measure: Measure,
) -> Float32[np.ndarray, "Q P"]:
    """The measure of every query at every point."""
    features = [index.features(t, np.array(rows, np.int32)) for t, rows in zip(texts, pools, strict=True)]
    terms = 1 << (max(len(df) for _, df, _ in features) - 1).bit_length()
    width = judged.owners.shape[1]
    tf = np.stack([_widened(tf, terms, width) for tf, _, _ in features])
    df = np.stack([_widened(df, terms) for _, df, _ in features])
    lengths = np.stack([_widened(lengths, width) for _, _, lengths in features])
    listed = np.arange(width) < np.array([len(rows) for rows in pools])[:, None]
    points = np.array([[point["k1"], point["b"]] for point in grid.points()], np.float32)
    size = np.array([len(index), index.average_length], np.float32)
    block = max(1, _ELEMENTS // (len(points) * width * terms))
    inputs = (tf, df, lengths, listed, judged, points, size)
    return np.asarray(_weighted_values(*inputs, weights.variant, weights.delta, measure, block))


@partial(jax.jit, static_argnames=("variant", "delta", "measure", "block"))
def _weighted_values(
    tf: Int32[Array, "Q T C"],
    df: Int32[Array, "Q T"],
    lengths: Int32[Array, "Q C"],
    listed: Bool[Array, "Q C"],
    judged: Judged,
    points: Float32[Array, "P 2"],
    size: Float32[Array, "2"],
    variant: Variant,
    delta: float,
    measure: Measure,
    block: int,
) -> Float32[Array, "Q P"]:
    """`points` are k1 and b; `size` the number of passages and their average length."""

    def one(tf, df, lengths, listed, known) -> Float32[Array, "P"]:
        def measured(point: Float32[Array, "2"]) -> Float32[Array, ""]:
            scores = bm25_scores(tf, df, lengths, *size, *point, variant=variant, delta=delta)
            return value(measure, scores, listed, known)

        return jax.vmap(measured)(points)

    return jax.lax.map(lambda query: one(*query), (tf, df, lengths, listed, judged), batch_size=block)
