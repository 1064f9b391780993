"""Result folders of evaluations, read back and checked: what a report is made of.

A folder holds metrics.json (or failure.json) and, beside it, per_query.jsonl; config.yaml, losses.json,
tuning.json and costs.json when the evaluation had something to say there. Whatever does not read as that is
named in one sentence: a report over half-read results would be worse than none.
"""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from rag.evaluate import result_files as files
from rag.runtime.records import Record, fitted_record, parse_yaml, parsed_json, read_record, reason
from rag.types import UserError

PerQuery = Mapping[str, Mapping[str, float | None]]  # measure -> query id -> value; None: not defined there


@dataclass(frozen=True)
class Run:
    """One finished evaluation: a row of the report."""

    label: str
    folder: Path  # where it was read; the file itself for one given by hand without metrics
    per_query: PerQuery
    dataset: str = "queries given by hand"
    fingerprint: str = ""
    queries: int = 0  # in the dataset, as the evaluation says
    limit: int | None = None  # a seeded sample of so many queries
    seed: int | None = None  # the sample's
    key: str = ""  # content key of the whole evaluation; "" when unknown
    means: Mapping[str, float | None] = field(default_factory=dict)
    intervals: Mapping[str, Sequence[float] | None] = field(default_factory=dict)  # measure -> [low, high]
    statistics: Mapping[str, float | int] = field(default_factory=dict)  # confidence, resamples, seed
    warnings: Sequence[str] = ()
    losses: Mapping | None = None
    tuning: Mapping | None = None
    ledger: Mapping | None = None
    settings: Mapping[str, object] = field(default_factory=dict)  # the configuration, with dotted names


@dataclass(frozen=True)
class Failure:
    """One evaluation that ended with an error."""

    label: str
    folder: Path
    error: str


def read(paths: Sequence[Path]) -> tuple[list[Run], list[Failure]]:
    """All results at and below `paths`, in the natural order of their names; the same folder only once.

    A path is a folder, or by hand one file: metrics.json, failure.json, or per-query values on their own.
    Raises UserError for a path without results, and for a file that is not what its name says.
    """
    places = list(dict.fromkeys(place for path in paths for place in _places(path)))
    results = [_read(place) for place in places]
    runs = [result for result in results if isinstance(result, Run)]
    return _unlike(runs), [result for result in results if isinstance(result, Failure)]


def _places(path: Path) -> list[Path]:
    """The result folders at and below a folder; for a file the folder it is part of, or itself."""
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
    """Sorts job 2 before job 10."""
    return [
        [(0, int(piece), "") if piece.isdecimal() else (1, 0, piece) for piece in re.split(r"([0-9]+)", part)]
        for part in path.parts
    ]


def _unlike(runs: Sequence[Run]) -> list[Run]:
    """Without the repetitions of one evaluation, which its key tells; labels made different with the folder."""
    first: dict[str, Run] = {}
    for run in runs:
        first.setdefault(run.key or str(run.folder), run)
    alike: dict[tuple[str, str, str], list[Run]] = {}
    for run in first.values():
        alike.setdefault((run.dataset, run.fingerprint, run.label), []).append(run)
    return [_told_apart(run, alike[run.dataset, run.fingerprint, run.label]) for run in first.values()]


def _told_apart(run: Run, alike: Sequence[Run]) -> Run:
    if len(alike) == 1:
        return run
    shared = os.path.commonpath([other.folder for other in alike])
    return replace(run, label=f"{run.label} ({run.folder.relative_to(shared)})")


# --- reading


def _read(place: Path) -> Run | Failure:
    if place.is_file():
        name = place.parent.name if place.name == "per_query.jsonl" else place.stem
        return Run(label=name, folder=place, per_query=_per_query(place))
    if not (place / "metrics.json").exists():
        failed = read_record(place / "failure.json", files.Failed, files.REMEDY)
        return Failure(label=failed.label, folder=place, error=failed.error)
    metrics = read_record(place / "metrics.json", files.Metrics, files.REMEDY)
    dataset = metrics.dataset
    return Run(
        label=metrics.label,
        folder=place,
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
        per_query=_per_query(place / "per_query.jsonl"),
        losses=_if_there(place / "losses.json", files.ErrorBreakdown),
        tuning=_if_there(place / "tuning.json", files.TuningRecord),
        ledger=_if_there(place / "costs.json", files.Costs),
        settings=_settings(place / "config.yaml"),
    )


def _if_there(path: Path, schema: type[Record]) -> dict | None:
    return read_record(path, schema, files.REMEDY).model_dump() if path.exists() else None


def _text(path: Path) -> str:
    """The file's text. Raises UserError when it cannot be read, or holds nothing."""
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
    """Measure -> query id -> value, in the file's order. Raises UserError for a line that is not that."""
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
        for measure, value in row.model_extra.items():
            columns.setdefault(measure, {})[row.query] = value
    if not columns:
        raise UserError(f"{path} names no measure: give a file of per-query values.")
    return columns


# --- settings


def _settings(path: Path) -> dict[str, object]:
    """A configuration's leaves under dotted names; lists are leaves. Raises UserError for what is no YAML."""
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
