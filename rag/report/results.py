"""Read and check the result folders of evaluations.

A folder holds metrics.json and per_query.jsonl, or failure.json; and where the evaluation wrote them config.yaml,
error_breakdown.json, tuning.json, costs.json, queries.jsonl and run.trec. A file that does not fit its schema is an
error that names it: a report over half of the results would be worse than none.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rag.evaluate import result_files as files
from rag.runtime.records import Record, fitted_record, parse_yaml, parsed_json, read_record, reason
from rag.types import UserError

PerQuery = Mapping[str, Mapping[str, float | None]]  # metric -> query id -> value; None: not defined there

_FORMER_NAMES = ("ledger.json", "losses.json")  # of costs.json and error_breakdown.json


@dataclass(frozen=True)
class Run:
    """One finished evaluation: a row of the report."""

    label: str
    folder: Path  # where it is; the file itself for per-query values given without metrics
    per_query: PerQuery
    dataset: str = "queries given by hand"
    fingerprint: str = ""  # of the dataset
    queries: int = 0  # of the dataset
    limit: int | None = None  # a seeded sample of so many queries
    seed: int | None = None  # the sample's
    key: str = ""  # content key of the whole evaluation; "" when unknown
    means: Mapping[str, float | None] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float] | None] = field(default_factory=dict)  # metric -> [low, high]
    statistics: Mapping[str, float | int] = field(default_factory=dict)  # confidence, resamples, seed
    warnings: Sequence[str] = ()
    error_breakdown: Mapping | None = None
    tuning: Mapping | None = None
    costs: Mapping | None = None
    settings: Mapping[str, object] = field(default_factory=dict)  # of the configuration, by dotted names
    unjudged: int = 0  # queries of the dataset that are left out, since nothing is judged for them
    questions: Mapping[str, files.QueryText] = field(default_factory=dict)  # by query id


@dataclass(frozen=True)
class Failure:
    """One evaluation that ended with an error."""

    label: str
    folder: Path
    error: str


def read(paths: Sequence[Path]) -> tuple[list[Run], list[Failure]]:
    """Read all results at and below `paths`, in the natural order of their names, each folder once.

    Args:
        paths: Folders, or files: metrics.json, failure.json, or per-query values on their own.

    Returns:
        The finished evaluations, each once and with labels that differ, and the failed ones.

    Raises:
        UserError: for a path without results, and for a file that does not fit its schema.
    """
    sources = list(dict.fromkeys(source for path in paths for source in _sources(path)))
    results = [_read(source) for source in sources]
    runs = [result for result in results if isinstance(result, Run)]
    return _unique(runs), [result for result in results if isinstance(result, Failure)]


def _sources(path: Path) -> list[Path]:
    """Return the result folders at and below a folder; for a file the folder it is part of, or the file."""
    if path.is_file():
        whole = path.name in ("metrics.json", "failure.json") or (
            path.name == "per_query.jsonl" and (path.parent / "metrics.json").exists()
        )
        return [(path.parent if whole else path).resolve()]
    if not path.is_dir():
        raise UserError(f"There is no {path}: runs= takes a folder of results, or a list of them.")
    found = {file.parent for name in ("metrics.json", "failure.json") for file in path.rglob(name)}
    if not found:
        raise UserError(f"No metrics.json and no failure.json is below {path}: give a folder of results.")
    return sorted((folder.resolve() for folder in found), key=_natural)


def _natural(path: Path) -> list[list[tuple[int, int, str]]]:
    """Return a sort key that puts job 2 before job 10."""
    return [
        [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"([0-9]+)", part)]
        for part in path.parts
    ]


def _unique(runs: Sequence[Run]) -> list[Run]:
    """Return the runs without repetitions of one cache key, and add the folder to labels that are equal."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.key or str(run.folder), run)
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in first.values():
        alike.setdefault((run.dataset, run.fingerprint, run.label), []).append(run)
    return [_relabelled(run, alike[run.dataset, run.fingerprint, run.label]) for run in first.values()]


def _relabelled(run: Run, alike: Sequence[Run]) -> Run:
    if len(alike) == 1:
        return run
    shared = os.path.commonpath([other.folder for other in alike])
    return replace(run, label=f"{run.label} ({run.folder.relative_to(shared)})")


# --- reading


def _read(source: Path) -> Run | Failure:
    if source.is_file():
        name = source.parent.name if source.name == "per_query.jsonl" else source.stem
        return Run(label=name, folder=source, per_query=_per_query(source))
    if not (source / "metrics.json").exists():
        failed = read_record(source / "failure.json", files.FailureRecord, files.REMEDY)
        return Failure(label=failed.label, folder=source, error=failed.error)
    for name in _FORMER_NAMES:
        if (source / name).exists():
            raise UserError(f"{source / name} was written by an earlier version: {files.REMEDY}.")
    metrics = read_record(source / "metrics.json", files.Metrics, files.REMEDY)
    dataset = metrics.dataset
    return Run(
        label=metrics.label,
        folder=source,
        key=metrics.key,
        dataset=dataset.name,
        fingerprint=dataset.fingerprint,
        queries=dataset.queries,
        limit=dataset.limit,
        seed=dataset.seed,
        means=metrics.means,
        intervals={name: pair for name, pair in metrics.intervals.items() if pair},
        statistics=metrics.statistics.model_dump(),
        warnings=tuple(metrics.warnings),
        per_query=_per_query(source / "per_query.jsonl"),
        error_breakdown=_if_there(source / "error_breakdown.json", files.ErrorBreakdown),
        tuning=_if_there(source / "tuning.json", files.TuningRecord),
        costs=_if_there(source / "costs.json", files.Costs),
        settings=_settings(source / "config.yaml"),
        unjudged=dataset.unjudged,
        questions=_questions(source / "queries.jsonl"),
    )


def _if_there(path: Path, schema: type[Record]) -> dict | None:
    return read_record(path, schema, files.REMEDY).model_dump() if path.exists() else None


def _text(path: Path) -> str:
    """Return the file's text. Raise UserError when it cannot be read or is empty."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): {files.REMEDY}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: {files.REMEDY}.") from error
    if not text.strip():
        raise UserError(f"{path} is empty: {files.REMEDY}, or leave it out.")
    return text


def _per_query(path: Path) -> dict[str, dict[str, float | None]]:
    """Return metric -> query id -> value, in the file's order. Raise UserError for a line that does not fit."""
    columns: dict[str, dict[str, float | None]] = {}
    seen: set[str] = set()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        where, remedy = f"{path}, line {number}", "give a query and its measures"
        row = fitted_record(where, parsed_json(where, line, remedy), files.QueryValues, remedy)
        if row.query in seen:
            raise UserError(f"{where} gives query {row.query!r} a second time.")
        seen.add(row.query)
        for measure, value in (row.model_extra or {}).items():
            columns.setdefault(measure, {})[row.query] = value
    if not columns:
        raise UserError(f"{path} names no measure: give a file of per-query values.")
    return columns


def _questions(path: Path) -> dict[str, files.QueryText]:
    """Return query id -> its text and its relevant documents; nothing where the evaluation wrote none."""
    if not path.exists():
        return {}
    rows = {}
    for number, line in enumerate(_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            row = fitted_record(where, parsed_json(where, line, files.REMEDY), files.QueryText, files.REMEDY)
            rows[row.query] = row
    return rows


# --- settings


def _settings(path: Path) -> dict[str, object]:
    """Return a configuration's leaves under dotted names; a list is a leaf. Raise UserError for a file not in YAML."""
    if not path.exists():
        return {}
    try:
        tree = parse_yaml(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not YAML ({reason(error)}): {files.REMEDY}.") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds no settings: {files.REMEDY}.")
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping, prefix: str) -> Iterable[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
