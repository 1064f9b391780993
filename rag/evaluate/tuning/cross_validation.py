"""Which setting of a grid is best, without fooling oneself: measures in the program, and nested cross-validation.

    Q queries, P points of the grid, C candidates of a query (passages, or documents), k the measure's cut-off

The queries are split into folds; a fold's reported scores come from the point that did best on the other folds,
so no reported figure was tuned on its own queries. (The inner cross-validation of a grid point, which has nothing
to fit, is its mean over all queries of the other folds, however they are split.) The naive figure, the best point
on all queries judged on the same, stands beside it: the difference is its optimism.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.retrieval import Qrels
from rag.index.fusion import Id, Ranking
from rag.ops.topk import top_k
from rag.types import UserError

Point = dict[str, Any]  # the parameters of one point of a grid, ready for JSON
Runs = Callable[
    [Point, Sequence[str]], Mapping[str, Mapping[str, float]]
]  # the run of some queries at a point

_LEAST = 32  # candidates of the smallest program; the others are its doubles
_PLATEAU = 1e-6  # points whose means differ by less are equally good: the first is taken
_NAME = re.compile(r"([a-z]+)@([1-9][0-9]{0,8})", re.IGNORECASE)
_MEASURES = {
    "ndcg": "nDCG", "recall": "Recall", "r": "Recall", "mrr": "MRR", "rr": "MRR",
    "precision": "Precision", "p": "Precision", "success": "Success",
}  # fmt: skip


@dataclass(frozen=True)
class Measure:
    """A measure that a program can compute: gain of the k best over `best`, as metrics.evaluate defines it."""

    name: str
    cutoff: int
    depth: int | None = None  # documents that a ranking is cut to; None cuts nothing off

    @staticmethod
    def named(name: str, depth: int | None = None) -> "Measure":
        """From a name such as nDCG@10, in any case; UserError for one that cannot be tuned for."""
        match = _NAME.fullmatch(name)
        if not match or match[1].lower() not in _MEASURES:
            raise UserError(
                f'tuning.measure is "{name}": choose nDCG, MRR, Recall, Precision or Success, as in nDCG@10.'
            )
        return Measure(_MEASURES[match[1].lower()], int(match[2]), depth)

    def best(self, judged: Mapping[str, int]) -> float:
        """What the gain of a query is divided by; 0 for a query that can gain nothing."""
        grades = sorted((grade for grade in judged.values() if grade > 0), reverse=True)
        match self.name:
            case "nDCG":
                return math.fsum(g / math.log2(i + 2) for i, g in enumerate(grades[: self.cutoff]))
            case "Recall":
                return float(len(grades))
            case "Precision":
                return float(self.cutoff)
            case _:  # MRR, Success
                return 1.0

    def gain(self, grades: Float[Array, "k"]) -> Float[Array, ""]:
        """Of the grades of the documents found, best first; fewer than the cut-off where there are fewer."""
        ranks = jnp.arange(1, len(grades) + 1)
        match self.name:
            case "nDCG":
                return (grades / jnp.log2(ranks + 1)).sum()
            case "MRR":
                return ((grades > 0) / ranks).max(initial=0)
            case "Success":
                return (grades > 0).any().astype(grades.dtype)
            case _:  # Recall, Precision
                return (grades > 0).sum().astype(grades.dtype)


class Judged(NamedTuple):
    """What a program must know of the candidates, padded to one width, to measure their rankings."""

    owners: Int32[np.ndarray, "Q C"] | Int32[Array, "..."]  # number of the candidate's document
    grades: Float32[np.ndarray, "Q C"] | Float32[Array, "..."]  # of the documents, in the order of their ids
    best: Float32[np.ndarray, "Q"] | Float32[Array, "..."]  # Measure.best

    @staticmethod
    def of(
        documents: Sequence[Sequence[str]], judged: Sequence[Mapping[str, int]], measure: Measure
    ) -> "Judged":
        """From each query's candidates (the document of each) and judgements."""
        width = max(_LEAST, 1 << (max(map(len, documents), default=1) - 1).bit_length())
        owners = np.zeros((len(documents), width), np.int32)
        grades = np.zeros((len(documents), width), np.float32)
        for row, (names, known) in enumerate(zip(documents, judged, strict=True)):
            order = sorted(set(names))  # the lower id wins a tie
            number = {name: i for i, name in enumerate(order)}
            owners[row, : len(names)] = [number[name] for name in names]
            grades[row, : len(order)] = [max(known.get(name, 0), 0) for name in order]
        return Judged(owners, grades, np.array([measure.best(known) for known in judged], np.float32))


def value(
    measure: Measure, scores: Float[Array, "C"], listed: Bool[Array, "C"], judged: Judged
) -> Float[Array, ""]:
    """The measure of one query's ranking: documents by their best listed candidate, ties to the lower id."""
    documents = jnp.full(len(scores), -jnp.inf).at[judged.owners].max(jnp.where(listed, scores, -jnp.inf))
    found, ids = top_k(documents, min(measure.cutoff, measure.depth or measure.cutoff, len(scores)))
    gain = measure.gain(jnp.where(found > -jnp.inf, judged.grades[ids], 0.0))
    return jnp.where(judged.best > 0, gain / jnp.where(judged.best > 0, judged.best, 1.0), 0.0)


def best_documents(ranking: Ranking, document: Callable[[Id], str], depth: int) -> dict[str, float]:
    """The `depth` best documents of a ranking of passages and their scores, each that of its best passage."""
    best: dict[str, float] = {}
    for passage, score in ranking:
        best.setdefault(document(passage), score)
    return dict(islice(best.items(), depth))


@dataclass(frozen=True)
class Fold:
    """One part of the queries, and what the others chose for it."""

    parameters: Point
    train: float  # mean of the chosen point over the other folds
    test: float  # mean over this fold
    queries: tuple[str, ...]


@dataclass(frozen=True)
class Tuned:
    """The honest figure, the naive one, and the run behind the honest one."""

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
        """What the naive figure promises too much; noise can make it negative."""
        return self.naive - self.nested

    def as_json(self) -> dict[str, Any]:
        """The contents of tuning.json."""
        folds = [{**vars(fold), "queries": len(fold.queries)} for fold in self.folds]
        names = ("family", "measure", "nested", "naive", "naive_parameters", "optimism")
        return {name: getattr(self, name) for name in names} | {"folds": folds}


def nested_cross_validation(
    family: str,
    measure: str,
    folds: int,
    seed: int,
    qrels: Qrels,
    points: Sequence[Point],
    values: Float32[np.ndarray, "Q P"],
    runs: Runs,
) -> Tuned:
    """Choose a point for each fold on the others, and judge it there with metrics.evaluate.

    `values` are those of the queries of `qrels`, by ascending id. Raises UserError for more folds than queries.
    """
    queries = sorted(qrels)
    if folds > len(queries):
        raise UserError(f"tuning.folds is {folds} for {len(queries)} judged queries: give fewer folds.")
    shuffled = np.random.default_rng(seed).permutation(len(queries))
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
        family,
        measure,
        tuple(
            Fold(
                points[point],
                float(values[rows, point].mean(dtype=np.float64)),
                float(scores[part].mean()),
                tuple(queries[i] for i in part),
            )
            for part, rows, point in zip(parts, others, chosen, strict=True)
        ),
        means[measure],
        retrieval_metrics.evaluate(qrels, runs(naive, queries), [measure])[0][measure],
        naive,
        run,
        {query: per_query[query][measure] for query in qrels},
    )


def _best(values: Float32[np.ndarray, "R P"]) -> int:
    means = values.mean(axis=0, dtype=np.float64)
    return int(np.flatnonzero(means >= means.max() - _PLATEAU)[0])
