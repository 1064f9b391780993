"""The summary of an evaluation: the mean of each metric, its interval, and warnings."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float64

from rag.evaluate import statistics as paired_statistics
from rag.evaluate.ablation import Reply
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import RESERVED_KEYS
from rag.evaluate.metrics.retrieval import cutoff_of
from rag.evaluate.per_query import Row
from rag.evaluate.statistics import Statistics, interval_or_none


def summary(
    dataset: Dataset, per_query: Mapping[str, Row], options: Statistics, key: str, notes: Sequence[str]
) -> dict[str, Any]:
    """Return the contents of metrics.json but for the label and the dataset's name, which the script adds.

    Each metric is one number at the top, which other programs read, and None where no query defines it. The same
    numbers are under "means", beside the keys in RESERVED_KEYS.

    Args:
        dataset: What was evaluated on.
        per_query: The metrics of each query.
        options: How the intervals are computed.
        key: Cache key of the evaluation.
        notes: Warnings that are added to those of the statistics.
    """
    measures = list(next(iter(per_query.values())))
    values = paired_statistics.table(per_query, measures)
    bounds = paired_statistics.intervals(values, options)
    means = {name: _mean(column) for name, column in zip(measures, values.T, strict=True)}
    if taken := RESERVED_KEYS & means.keys():
        raise ValueError(f"a metric is called {min(taken)!r}, which is another key of metrics.json")
    return means | {
        "key": key,
        "dataset": {
            "fingerprint": dataset.fingerprint,
            "queries": len(dataset.queries),
            "limit": dataset.limit,
            "seed": dataset.seed,
        },
        "means": means,
        "intervals": dict(zip(measures, map(interval_or_none, bounds), strict=True)),
        "statistics": {
            "confidence": options.confidence,
            "resamples": options.resamples,
            "seed": options.seed,
        },
        "warnings": [*paired_statistics.warnings(values, measures, options), *notes],
    }


def _mean(values: Float64[np.ndarray, "Q"]) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def beyond_depth(measures: Sequence[str], depth: int, documents: int) -> list[str]:
    """Return a warning for each measure whose cut-off is beyond the documents that were retrieved.

    Args:
        measures: Names of retrieval metrics.
        depth: Documents retrieved for each query.
        documents: Documents of the corpus.
    """
    return [
        f"{name} saw only the first {depth} documents of each query: raise evaluation.depth."
        for name in measures
        if min(cutoff_of(name), documents) > depth
    ]


def too_long(replies: Sequence[Reply]) -> list[str]:
    """Return a warning that names the questions that are too long for the model's context, or no warning."""
    long = {reply.query for reply in replies if not reply.fits}
    if not long:
        return []
    named = ", ".join(sorted(long)[:5])
    return [
        f"{len(long)} questions leave no room for a passage in the model's context and count as not answered: "
        f"{named}{' and more' if len(long) > 5 else ''}."
    ]
