"""Tuning how rankings are fused: weights, constants, normalisers and depths, over the arms' results.

    Q queries, X points of the grid, A arms, C candidates of a query
    Y depths, W weights, U constants

The arms' scores are there already, so a grid costs no search. The compiled program only chooses
(rag.evaluate.tuning.cross_validation): what is reported is fused by the code that searches use, and measured by
rag.evaluate.metrics.retrieval.evaluate.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import product

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from rag.evaluate.metrics.retrieval import Qrels
from rag.evaluate.retrieval import best_documents
from rag.evaluate.tuning.cross_validation import Tuned, nested_cross_validation
from rag.evaluate.tuning.grids import FusionGrid, Point, Tuning
from rag.evaluate.tuning.ranking_metric import JudgedCandidates, RankingMetric, value
from rag.index.fusion import (
    Id,
    Normalizer,
    Ranking,
    ScoreTable,
    convex,
    normalize,
    reciprocal_rank,
    score_table,
)
from rag.types import UserError

ELEMENTS = 1 << 22  # numbers that a block of queries holds at once: 16 MiB
_ALL = int(np.iinfo(np.int32).max)  # the depth that cuts nothing off


def tune_fusion(
    rankings: Mapping[str, Sequence[Ranking]],
    qrels: Qrels,
    options: Tuning,
    lower_bounds: Sequence[float | int] | None = None,
    document: Callable[[Id], str] = str,
    depth: int = 100,
) -> Tuned:
    """Tune how the arms' rankings are fused.

    Args:
        rankings: Query id -> one ranking per arm, best first, of documents or of passages. A judged query without
            rankings counts as 0.
        qrels: The judgements.
        options: What is tried; its grid is one of fusions.
        lower_bounds: The lowest score that each arm can give, or one for all, for theoretical_min_max.
        document: Returns the document of a ranking's id; a document scores as its best passage.
        depth: How many of the best documents of a query count.

    Raises:
        UserError: for a BM25Grid, arms that are not as many for every query, lower_bounds that are missing or not as
            many, and fewer judged queries than folds.
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

    empty: Sequence[Ranking] = [()] * arms
    tables = [score_table(rankings.get(query, empty)) for query in sorted(qrels)]
    metric = RankingMetric.named(options.measure, depth)
    owners = [[document(i) for i in table.ids] for table in tables]
    judged = JudgedCandidates.of(owners, [qrels[query] for query in sorted(qrels)], metric)
    values = fusion_values(grid, tables, judged, lower_bounds, metric)
    return nested_cross_validation(options, qrels, fusion_points(grid, arms), values, runs)


def fusion_points(grid: FusionGrid, arms: int) -> list[Point]:
    """Return the points of a grid, in the order of the columns of fusion_values."""
    depths = [{"depths": list(cut)} for cut in product(grid.depths, repeat=arms)] if grid.depths else [{}]
    weights = [{"weights": weights} for weights in _simplex(arms, grid.steps)]
    return [c | w | d for c, d, w in product(grid.choices(), depths, weights)]


def _simplex(arms: int, steps: int) -> list[list[float]]:
    whole = [w for w in product(range(steps + 1), repeat=arms) if sum(w) == steps]
    return [[n / steps for n in w] for w in sorted(whole, key=lambda w: sum(n * n for n in w))]


def fusion_values(
    grid: FusionGrid,
    tables: Sequence[ScoreTable],
    judged: JudgedCandidates,
    lower_bounds: Sequence[float | int] | None,
    metric: RankingMetric,
) -> Float32[np.ndarray, "Q X"]:
    """Compute the metric of every query at every point.

    Args:
        grid: The points, which fusion_points lists.
        tables: The scores and ranks of each query's candidates in each arm.
        judged: The grades of these candidates.
        lower_bounds: The lowest score that each arm can give; None where no normaliser of the grid needs them.
        metric: The metric.
    """
    arms, width = len(tables[0].scores), judged.owners.shape[1]
    scores = np.stack([padded(table.scores, width) for table in tables])
    ranks = np.stack([padded(table.ranks, width) for table in tables])
    low = np.broadcast_to(np.asarray([0.0] if lower_bounds is None else lower_bounds, np.float32), arms)
    depths = np.array(list(product(grid.depths or [_ALL], repeat=arms)), np.int32)
    weights = np.array(_simplex(arms, grid.steps), np.float32)
    normalizers = tuple(point["normalizer"] for point in grid.choices() if "normalizer" in point)
    constants = np.array([point["constant"] for point in grid.choices() if "constant" in point], np.float32)
    points = len(grid.choices()) * len(depths) * len(weights)
    block = max(1, ELEMENTS // (points * width * arms))
    inputs = (scores, ranks, judged, low, depths, constants, weights)
    return np.asarray(_fused_values(*inputs, normalizers, metric, block))


def padded(array: np.ndarray, *shape: int) -> np.ndarray:
    """Return the array with zeros at the end of its last axes, which then have this shape."""
    missing = [(0, n - have) for n, have in zip(shape, array.shape[-len(shape) :], strict=True)]
    return np.pad(array, [(0, 0)] * (array.ndim - len(shape)) + missing)


@partial(jax.jit, static_argnames=("normalizers", "metric", "block"))
def _fused_values(
    scores: Float32[Array, "Q A C"],
    ranks: Int32[Array, "Q A C"],
    judged: JudgedCandidates,
    lower_bounds: Float32[Array, "A"],
    depths: Int32[Array, "Y A"],
    constants: Float32[Array, "U"],
    weights: Float32[Array, "W A"],
    normalizers: tuple[Normalizer, ...],
    metric: RankingMetric,
    block: int,
) -> Float32[Array, "Q X"]:
    """X is (normalisers and constants) x depths x weights; `block` queries are measured at once."""

    def one(
        scores: Float32[Array, "A C"], ranks: Int32[Array, "A C"], known: JudgedCandidates
    ) -> Float32[Array, "X"]:
        def each_weight(fuse: Callable, depth: Int32[Array, "A"]) -> Float32[Array, "W"]:
            found = (ranks > 0) & (ranks <= depth[:, None])
            fused = jax.vmap(fuse(found))(weights)
            return jax.vmap(lambda row: value(metric, row, found.any(axis=0), known))(fused)

        def by_scores(normalizer: Normalizer, found: Bool[Array, "A C"]) -> Callable:
            return partial(convex, jax.vmap(partial(normalize, normalizer))(scores, found, lower_bounds))

        def by_ranks(constant: Float32[Array, ""], found: Bool[Array, "A C"]) -> Callable:
            return partial(reciprocal_rank, ranks, found, constant)

        def each_depth(fuse: Callable) -> Float32[Array, "Y W"]:
            return jax.vmap(partial(each_weight, fuse))(depths)

        convexes = [each_depth(partial(by_scores, name)).ravel() for name in normalizers]
        reciprocal = jax.vmap(lambda constant: each_depth(partial(by_ranks, constant)))(constants)
        return jnp.concatenate([*convexes, reciprocal.ravel()])

    return jax.lax.map(lambda query: one(*query), (scores, ranks, judged), batch_size=block)
