"""The report of a measurement of numerical sensitivity: how much each variation changed."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from rag.evaluate.sensitivity.options import SensitivityOptions

_BATCH_AXES = ("tokens_per_batch", "search_batches", "answer_batches", "answer_budgets")


@dataclass(frozen=True, slots=True)
class MetricChange:
    """A metric under a variation, compared with the reference; None where no query defines it."""

    mean: float | None
    change: float | None  # of the mean
    largest: float | None  # absolute change of a single query

    @staticmethod
    def between(before: Sequence[float | None], after: Sequence[float | None]) -> "MetricChange":
        """Compare the values of the queries that have one both times."""
        both = [pair for pair in zip(before, after, strict=True) if None not in pair]
        if not both:
            return MetricChange(None, None, None)
        old, new = np.array(both, np.float64).T
        return MetricChange(float(new.mean()), float((new - old).mean()), float(np.abs(new - old).max()))


@dataclass(frozen=True, slots=True)
class ListChanges:
    """The top-k lists of a variation, compared with those of the reference."""

    axis: str
    setting: str
    lists: int
    changed: tuple[str, ...]  # ids of the queries whose list differs, if only in its order
    replaced: tuple[str, ...]  # of those, the queries whose list has other passages
    score_difference: float  # the largest, of a passage that is in both lists of a query
    movements: Mapping[str, MetricChange]  # by metric


@dataclass(frozen=True, slots=True)
class AnswerChanges:
    """The answers of a variation, compared with those of the reference."""

    axis: str
    setting: str
    answers: int
    changed: tuple[str, ...]  # ids of the queries whose text differs
    movements: Mapping[str, MetricChange]  # by metric


@dataclass(frozen=True)
class SensitivityReport:
    """How much each variation changed."""

    variations: SensitivityOptions
    dataset: Mapping[str, Any]  # its name, fingerprint, queries
    method: str
    means: Mapping[str, float | None]  # of the reference, by metric
    lists: tuple[ListChanges, ...]
    answers: tuple[AnswerChanges, ...]
    skipped: tuple[str, ...]  # a sentence for each axis that was left out

    @property
    def verdict(self) -> str:
        """One sentence that counts the changes."""
        lists = _effects(self.lists, self.variations.measure)
        texts = _effects(self.answers, "F1")
        parts = [f"of {self.lists[0].lists} top-{self.variations.k} lists {lists}"] if lists else []
        parts += [f"of {self.answers[0].answers} answers {texts}"] if texts else []
        sentence = "; ".join(parts) or "nothing was varied"
        return f"{sentence[0].upper()}{sentence[1:]}."

    def summary(self) -> dict[str, Any]:
        """Return the contents of sensitivity.json but for the environment."""
        return {"verdict": self.verdict} | asdict(self)


def _effects(rows: Sequence[ListChanges | AnswerChanges], measure: str) -> str:
    """Return how many lists or answers change with each cause, and how far the mean moves at most."""
    causes: dict[str, list[ListChanges | AnswerChanges]] = {}
    for row in rows:
        dtype = f"with {row.setting} vectors" if row.axis == "vector_dtypes" else f"in {row.setting}"
        cause = "with the batch size" if row.axis in _BATCH_AXES else dtype
        if cause != "with float32 vectors":  # which the vectors are
            causes.setdefault(cause, []).append(row)
    parts = []
    for cause, some in causes.items():
        changed = {query for row in some for query in row.changed}
        farthest = max(abs(row.movements[measure].change or 0.0) for row in some)
        moved = f" and move {measure} by up to {farthest:.4f}" if changed else ""
        parts.append(f"{len(changed)} change {cause}{moved}")
    return ", ".join(parts)
