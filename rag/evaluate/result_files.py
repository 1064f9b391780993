"""The result files of an evaluation: how JSON is written, and the schemas by which scripts and reports read it.

rag.evaluate.experiment writes them. A field that is not declared is read too; a report shows only those of costs.json
and per_query.jsonl, which have types as well.
"""

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

from annotated_types import Ge, Len
from pydantic import AfterValidator

from rag.evaluate.statistics import Confidence
from rag.runtime.options import Seed, Whole
from rag.runtime.records import OpenRecord

REMEDY = "run that evaluation again"


def json_text(value: object) -> str:
    """Return a value as the content of a JSON file."""
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def json_lines(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return objects as the content of a JSON lines file."""
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)


def _flat(value: object, depth: int = 2) -> object:
    """Check a value that is only shown: text, a number, or a list or object of such, at most two levels deep.

    Raises:
        ValueError: for anything else.
    """
    match value:
        case None | bool() | str():
            return value
        case int() | float() if abs(value) < 2**63:  # no NaN either
            return value
        case list() if depth:
            return [_flat(item, depth - 1) for item in value]
        case dict() if depth:
            return {name: _flat(item, depth - 1) for name, item in value.items()}
    raise ValueError("it is no text, number, or flat list or object of them")


Value = float | None  # of a metric: None where no query defines it
Interval = Annotated[list[float], Len(2, 2)] | None  # None where there are too few values for one
Flat = Annotated[Any, AfterValidator(_flat)]
Amount = Annotated[float, Ge(0)]


class SampleRecord(OpenRecord):
    """The queries of an evaluation: `limit` drawn by `seed`, or all."""

    fingerprint: str
    queries: Whole
    limit: Whole | None
    seed: Seed | None


class DatasetRecord(SampleRecord):
    """The queries, and the name that the run gave the dataset."""

    name: str
    unjudged: Whole = 0  # queries that are left out


class StatisticsRecord(OpenRecord):
    """The options of the intervals."""

    confidence: Confidence
    resamples: Annotated[Whole, Ge(100)]
    seed: Seed


class CachedMetrics(OpenRecord):
    """metrics.json as it is cached. Other fields are the metrics: each one's mean under its name."""

    dataset: SampleRecord
    means: dict[str, Value]
    intervals: dict[str, Interval]
    statistics: StatisticsRecord
    warnings: list[str]
    key: str = ""


class Metrics(CachedMetrics):
    """metrics.json in a run's folder, with the names that the run gave its result."""

    label: str
    dataset: DatasetRecord


class FailureRecord(OpenRecord):
    """failure.json."""

    label: str
    error: str


class ErrorBreakdown(OpenRecord):
    """error_breakdown.json: what `n` questions miss of the best value, `ceiling`: the mean over them by cause."""

    measure: str
    n: Whole
    ceiling: float
    scores: dict[str, float]
    errors: dict[str, float]
    intervals: dict[str, Interval]


class FoldRecord(OpenRecord):
    """One fold of tuning.json."""

    parameters: dict[str, Flat]
    train: float
    test: float
    queries: Whole


class TuningRecord(OpenRecord):
    """tuning.json."""

    family: str
    measure: str
    folds: list[FoldRecord]
    nested: float
    naive: float
    naive_parameters: dict[str, Flat]
    optimism: float


class StageCost(OpenRecord):
    """The cost of one stage: how many items it had, and how many of them were cached."""

    seconds: Amount
    items: Whole
    reused: Whole


class Costs(OpenRecord):
    """costs.json. Other fields are figures by name."""

    __pydantic_extra__: dict[str, Flat]

    stages: dict[str, StageCost]
    environment: dict[str, Flat]
    generator: str | None = None


class QueryValues(OpenRecord):
    """A line of per_query.jsonl. Other fields are the query's metrics by name."""

    __pydantic_extra__: dict[str, Value]

    query: str


class QueryText(OpenRecord):
    """A line of queries.jsonl: the text of a query, and the grades of its relevant documents."""

    query: str
    text: str
    relevant: dict[str, int]
