"""The schemas of an evaluation's result files: rag/evaluate/job.py writes them, eval.py and a report read them back.

A field that is not declared stays; a report shows only those of costs.json and per_query.jsonl, which have types too.
"""

from typing import Annotated, Any

from annotated_types import Ge, Len
from pydantic import AfterValidator

from rag.evaluate.statistics import Confidence
from rag.runtime.options import Seed, Whole
from rag.runtime.records import OpenRecord

REMEDY = "run that evaluation again"


def _flat(value: object, depth: int = 2) -> object:
    """A value that is only shown: text, a number, or a list or object of them, and of such. ValueError for others."""
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


Value = float | None  # of a measure: None where nothing defines it
Interval = Annotated[list[float], Len(2, 2)] | None  # None where there are too few values for one
Flat = Annotated[Any, AfterValidator(_flat)]
Amount = Annotated[float, Ge(0)]


class Sampled(OpenRecord):
    """What was evaluated on: `limit` queries drawn by `seed`, or all."""

    fingerprint: str
    queries: Whole
    limit: Whole | None
    seed: Seed | None


class Named(Sampled):
    name: str


class Resampling(OpenRecord):
    """How the intervals were made."""

    confidence: Confidence
    resamples: Annotated[Whole, Ge(100)]
    seed: Seed


class Measured(OpenRecord):
    """metrics.json as an evaluation leaves it; beside these fields stands each measure's mean by its name."""

    dataset: Sampled
    means: dict[str, Value]
    intervals: dict[str, Interval]
    statistics: Resampling
    warnings: list[str]
    key: str = ""


class Metrics(Measured):
    """metrics.json with the names that a run gave its result."""

    label: str
    dataset: Named


class Failed(OpenRecord):
    """failure.json."""

    label: str
    error: str


class ErrorBreakdown(OpenRecord):
    """losses.json: what is missing to `ceiling` over `n` questions, by cause."""

    measure: str
    n: Whole
    ceiling: float
    scores: dict[str, float]
    losses: dict[str, float]
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
    seconds: Amount
    items: Whole
    reused: Whole


class Costs(OpenRecord):
    """costs.json; the fields besides are figures of costs by name."""

    __pydantic_extra__: dict[str, Flat]

    stages: dict[str, StageCost]
    environment: dict[str, Flat]
    generator: str | None = None


class QueryValues(OpenRecord):
    """A line of per_query.jsonl: the measures of a query, by name."""

    __pydantic_extra__: dict[str, Value]

    query: str
