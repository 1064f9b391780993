"""A metric of the user's own, beside those of the table: of rankings, of answers, or of both."""

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from numbers import Real
from typing import Protocol, runtime_checkable

from rag.evaluate.metrics import METRICS, RESERVED_KEYS
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.metrics.retrieval import Qrels, Run, canonical_scores, is_measure
from rag.evaluate.metrics.spans import is_span_measure
from rag.runtime.stages import name_with_file, wrong_result
from rag.types import UserError

Row = dict[str, float | None]  # the metric's name -> its value; None where a query does not define it


@runtime_checkable
class OwnMetric(Protocol):
    """A frozen dataclass with a name, and with one or both of these methods; higher values are better.

    of_ranking(documents, grades) takes the ids of the documents found, best first, and document id -> grade of those
    that are judged (1 or more is relevant). of_answer(answer) takes a JudgedAnswer. Each returns a number, or None
    where the query does not define the metric.
    """

    @property
    def name(self) -> str:
        """Return the name in tables and files."""
        ...


def check_own(metric: OwnMetric) -> None:
    """Raise UserError for a metric without a name or a method, or with the name of another metric."""
    name = getattr(metric, "name", None)
    if not isinstance(name, str) or not name.isprintable() or not name or _is_taken(name):
        raise UserError(
            f"{name_with_file(metric)} is called {name!r}: give it a name that no other metric has, such as "
            'name: ClassVar = "skipped".'
        )
    if not hasattr(metric, "of_ranking") and not hasattr(metric, "of_answer"):
        raise UserError(
            f"{name_with_file(metric)} measures nothing: give it a method of_ranking or of_answer, or both."
        )


def _is_taken(name: str) -> bool:
    """Return whether a name is that of a metric of the table, with or without a cut-off, or of another key."""
    taken = {label for row in METRICS for label in (row.name.lower(), *row.aliases)} | RESERVED_KEYS
    return name.lower() in taken or is_span_measure(name) or is_measure(name)


def own_ranking_rows(metric: OwnMetric, qrels: Qrels, ranking: Run) -> dict[str, Row]:
    """Return query id -> the metric of its ranking; nothing for a metric of answers."""
    if (measure := getattr(metric, "of_ranking", None)) is None:
        return {}
    return {
        query: _row(metric, measure, list(canonical_scores(ranking.get(query, {}))), dict(grades))
        for query, grades in qrels.items()
    }


def own_answer_row(metric: OwnMetric, answer: JudgedAnswer) -> Row:
    """Return the metric of an answer; nothing for a metric of rankings."""
    measure = getattr(metric, "of_answer", None)
    return {} if measure is None else _row(metric, measure, answer)


def _row(metric: OwnMetric, measure: Callable, *arguments: Sequence | Mapping | JudgedAnswer) -> Row:
    value = measure(*arguments)
    if value is None:
        return {metric.name: None}
    if not isinstance(value, bool) and isinstance(value, Real):
        with suppress(OverflowError):  # a whole number beyond float
            if math.isfinite(value):
                return {metric.name: float(value)}
    raise wrong_result(metric, measure.__name__, value, "a finite number or None")
