"""Nested cross-validation: which point of a grid is best, without reporting a figure on the queries it was chosen on.

    Q queries, X points of the grid

The queries are split into folds; a fold's reported scores come from the point that did best on the other folds,
so no reported figure was tuned on its own queries. (The inner cross-validation of a grid point, which has nothing
to fit, is its mean over all queries of the other folds, however they are split.) The naive figure, the best point
on all queries judged on the same, is reported beside it: the difference is its optimism.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from jaxtyping import Float32

from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.retrieval import Qrels
from rag.evaluate.tuning.grids import Point, Tuning
from rag.types import UserError

# Returns the run of some queries at a point.
Runs = Callable[[Point, Sequence[str]], Mapping[str, Mapping[str, float]]]

_PLATEAU = 1e-6  # points whose means differ by less are equally good: the first is taken


@dataclass(frozen=True)
class Fold:
    """One part of the queries, and the parameters that were chosen on the others."""

    parameters: Point
    train: float  # mean of the chosen point over the other folds
    test: float  # mean over this fold
    queries: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """The figure of nested cross-validation with its run, and the naive figure."""

    family: str
    measure: str
    folds: tuple[Fold, ...]
    nested: float  # mean of the out-of-fold run over the judged queries
    naive: float  # mean of the best point on all queries, over the same queries
    naive_parameters: Point
    run: dict[str, dict[str, float]] = field(repr=False)  # out of fold: query -> document -> score
    per_query: dict[str, float] = field(repr=False)  # of that run

    @property
    def optimism(self) -> float:
        """By how much the naive figure is too high; noise can make it negative."""
        return self.naive - self.nested

    def as_json(self) -> dict[str, Any]:
        """Return the contents of tuning.json."""
        folds = [{**vars(fold), "queries": len(fold.queries)} for fold in self.folds]
        names = ("family", "measure", "nested", "naive", "naive_parameters", "optimism")
        return {name: getattr(self, name) for name in names} | {"folds": folds}


def nested_cross_validation(
    options: Tuning,
    qrels: Qrels,
    points: Sequence[Point],
    values: Float32[np.ndarray, "Q X"],
    runs: Runs,
) -> Tuned:
    """Choose a point for each fold on the other folds, and evaluate it on that fold.

    Args:
        options: The metric, the number of folds, at most that of the judged queries, and the seed of their split.
        qrels: The judgements.
        points: The points of the grid.
        values: The metric at each point, of the queries of `qrels` by ascending id.
        runs: Returns the run of some queries at a point.

    Raises:
        UserError: for more folds than queries.
    """
    queries, folds, measure = sorted(qrels), options.folds, options.measure
    if folds > len(queries):
        raise UserError(f"tuning.folds is {folds} for {len(queries)} judged queries: give fewer folds.")
    shuffled = np.random.default_rng(options.seed).permutation(len(queries))
    parts = [np.sort(part) for part in np.array_split(shuffled, folds)]
    others = [np.setdiff1d(shuffled, part) for part in parts]
    chosen = [_best(values[rows]) for rows in others]
    run: dict[str, dict[str, float]] = {}
    for part, point in zip(parts, chosen, strict=True):
        run |= {q: dict(found) for q, found in runs(points[point], [queries[i] for i in part]).items()}
    means, per_query = retrieval_metrics.evaluate(qrels, run, [measure])
    scores = np.array([per_query[query][measure] for query in queries])
    naive = points[_best(values)]
    return Tuned(
        family=options.grid.family,
        measure=measure,
        folds=tuple(
            Fold(
                parameters=points[point],
                train=float(values[rows, point].mean(dtype=np.float64)),
                test=float(scores[part].mean()),
                queries=tuple(queries[i] for i in part),
            )
            for part, rows, point in zip(parts, others, chosen, strict=True)
        ),
        nested=means[measure],
        naive=retrieval_metrics.evaluate(qrels, runs(naive, queries), [measure])[0][measure],
        naive_parameters=naive,
        run=run,
        per_query={query: per_query[query][measure] for query in qrels},
    )


def _best(values: Float32[np.ndarray, "Q X"]) -> int:
    means = values.mean(axis=0, dtype=np.float64)
    return int(np.flatnonzero(means >= means.max() - _PLATEAU)[0])
