"""Attribute what the answers miss of a perfect score to the stages of the pipeline.

What the condition `retrieved` misses is split, question by question, into four parts that sum to it. The reader's part
is what even `oracle` misses. The rest, oracle - retrieved, is

    retrieval miss  where nothing relevant was among the k passages (or above the context's min_score)
    truncation      where something was, but the prompt had no room for it
    distraction     where it was in the prompt and the answer is worse (or better) than from the oracle's passages

Relevant is the evidence, nine tenths of a span of it; without evidence a passage of a document judged relevant.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rag.evaluate import statistics as paired_statistics
from rag.evaluate.ablation import Condition, Reply
from rag.evaluate.metrics import METRICS
from rag.evaluate.per_query import Row
from rag.evaluate.statistics import Statistics, interval_or_none
from rag.types import UserError

ERRORS = ("retrieval miss", "truncation", "distraction", "reader")

Scores = Mapping[tuple[str, Condition], float | None]  # (query, condition) -> value of the metric


def error_parts(replies: Sequence[Reply], scores: Scores, best: float = 1.0) -> dict[str, list[float]]:
    """Return cause -> its part in each question that was answered under both `oracle` and `retrieved`.

    `scores` are of a metric whose best value is `best`. The parts of a question sum to `best` minus its score under
    `retrieved`. Questions without a score are left out.
    """
    parts: dict[str, list[float]] = {name: [] for name in ERRORS}
    for reply in replies:
        oracle = scores.get((reply.query, "oracle"))
        retrieved = scores.get((reply.query, "retrieved"))
        if reply.condition != "retrieved" or oracle is None or retrieved is None:
            continue
        cause = "distraction" if reply.shown else "truncation" if reply.found else "retrieval miss"
        row = dict.fromkeys(ERRORS, 0.0) | {"reader": best - oracle, cause: oracle - retrieved}
        for name in ERRORS:
            parts[name].append(row[name])
    return parts


def error_breakdown(
    replies: Sequence[Reply], metrics: Sequence[Row], measure: str, options: Statistics
) -> dict[str, Any]:
    """Return the contents of error_breakdown.json: the mean of each part with its interval, and of each condition.

    Args:
        replies: The answers.
        metrics: Of each of them.
        measure: The metric to split, one that compares with gold answers.
        options: How the intervals are computed.

    Raises:
        UserError: when no question has the metric under both conditions.
    """
    best = next(metric.best for metric in METRICS if metric.name == measure)
    scores = {(r.query, r.condition): row[measure] for r, row in zip(replies, metrics, strict=True)}
    parts = error_parts(replies, scores, best)
    values = np.array([parts[cause] for cause in ERRORS]).T
    if not len(values):
        raise UserError(
            f"no question has the measure {measure!r} under oracle and retrieved: choose ablation.measure"
        )
    bounds = paired_statistics.intervals(values, options)
    known: dict[str, list[float]] = {}
    for (_, condition), score in scores.items():
        if score is not None:
            known.setdefault(condition, []).append(score)
    return {
        "measure": measure,
        "n": len(values),
        "ceiling": best,
        "scores": {condition: float(np.mean(found)) for condition, found in known.items()},
        "errors": dict(zip(ERRORS, values.mean(axis=0).tolist(), strict=True)),
        "intervals": dict(zip(ERRORS, map(interval_or_none, bounds), strict=True)),
    }
