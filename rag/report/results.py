"""Result folders of evaluations, read back and checked: what a report is made of.

A folder holds metrics.json (or failure.json) and, beside it, per_query.jsonl; config.yaml, losses.json,
tuning.json and ledger.json when the evaluation had something to say there. Whatever does not read as that is
named in one sentence: a report over half-read results would be worse than none.
"""

import json
import os
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

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


# --- what the files must look like: a type, a [list of one shape], a {name: shape}, Each(name's shape), (one, or other)


@dataclass(frozen=True)
class Each:
    """A mapping of any names to one shape."""

    shape: object


_NUMBER = float | int
_OPTIONAL = float | int | None
_METRICS = {
    "label": str,
    "dataset": {"name": str, "fingerprint": str, "queries": int, "limit": int | None, "seed": int | None},
    "means": Each(_OPTIONAL),
    "intervals": Each(([_OPTIONAL], types.NoneType)),
    "statistics": {"confidence": float, "resamples": int, "seed": int},
    "warnings": [str],
}
_FAILURE = {"label": str, "error": str}
_LOSSES = {
    "measure": str,
    "n": int,
    "ceiling": _NUMBER,
    "scores": Each(_NUMBER),
    "losses": Each(_NUMBER),
    "intervals": Each([_NUMBER]),
}
_TUNING = {
    "family": str,
    "measure": str,
    "folds": [{"parameters": Each(object), "train": _NUMBER, "test": _NUMBER, "queries": int}],
    "nested": _NUMBER,
    "naive": _NUMBER,
    "naive_parameters": Each(object),
    "optimism": _NUMBER,
}
_LEDGER = {
    "stages": Each({"seconds": _NUMBER, "items": _NUMBER, "reused": _NUMBER}),
    "environment": Each(object),
}


def _misfit(value: object, shape: object, name: str) -> str:
    """What `value` lacks of `shape`, in words; "" when it fits."""
    match shape:
        case Each(inner):
            if not isinstance(value, Mapping):
                return f"{name} is no object"
            return next(
                (m for key, item in value.items() if (m := _misfit(item, inner, f"{name}.{key}"))), ""
            )
        case dict():
            if not isinstance(value, Mapping):
                return f"{name} is no object"
            if missing := [key for key in shape if key not in value]:
                return f"{name} has no {missing[0]!r}"
            return next((m for key, s in shape.items() if (m := _misfit(value[key], s, f"{name}.{key}"))), "")
        case tuple():
            problems = [_misfit(value, alternative, name) for alternative in shape]
            return "" if "" in problems else problems[0]
        case [inner]:
            if not isinstance(value, list):
                return f"{name} is no list"
            return next(
                (m for i, item in enumerate(value) if (m := _misfit(item, inner, f"{name}[{i}]"))), ""
            )
        case type() | types.UnionType():
            flag = isinstance(value, bool) and shape is not object
            return (
                f"{name} is {json.dumps(value, default=str)[:40]}"
                if flag or not isinstance(value, shape)
                else ""
            )
    raise TypeError(f"no shape: {shape!r}")


# --- reading


def _read(place: Path) -> Run | Failure:
    if place.is_file():
        name = place.parent.name if place.name == "per_query.jsonl" else place.stem
        return Run(label=name, folder=place, per_query=_per_query(place))
    if not (place / "metrics.json").exists():
        record = _json(place / "failure.json", _FAILURE)
        return Failure(label=record["label"], folder=place, error=record["error"])
    record = _json(place / "metrics.json", _METRICS)
    dataset = record["dataset"]
    return Run(
        label=record["label"],
        folder=place,
        key=str(record.get("key", "")),
        dataset=dataset["name"],
        fingerprint=dataset["fingerprint"],
        queries=dataset["queries"],
        limit=dataset["limit"],
        seed=dataset["seed"],
        means={name: _float(mean) for name, mean in record["means"].items()},
        intervals={name: [*map(float, pair)] for name, pair in record["intervals"].items() if _is_pair(pair)},
        statistics=record["statistics"],
        warnings=tuple(record["warnings"]),
        per_query=_per_query(place / "per_query.jsonl"),
        losses=_if_there(place / "losses.json", _LOSSES),
        tuning=_if_there(place / "tuning.json", _TUNING),
        ledger=_if_there(place / "ledger.json", _LEDGER),
        settings=_settings(place / "config.yaml"),
    )


def _float(value: float | int | None) -> float | None:
    return None if value is None else float(value)


def _is_pair(interval: Sequence[float | int | None] | None) -> bool:
    return interval is not None and len(interval) == 2 and None not in interval


def _if_there(path: Path, shape: object) -> dict | None:
    return _json(path, shape) if path.exists() else None


def _json(path: Path, shape: object) -> dict:
    """A JSON object of that shape. Raises UserError for anything else."""
    try:
        record = _strict(_text(path))
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): run that evaluation again.") from error
    if problem := _misfit(record, shape, "it"):
        raise UserError(f"{path} is no such result file ({problem}): run that evaluation again.")
    return record


def _strict(text: str) -> object:
    """Parse JSON as its standard has it: no NaN, no Infinity. Raises ValueError."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no number")

    return json.loads(text, parse_constant=refuse)


def _text(path: Path) -> str:
    """The file's text. Raises UserError when it cannot be read, or holds nothing."""
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): run that evaluation again.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not UTF-8 text: run that evaluation again.") from error
    if not text.strip():
        raise UserError(f"{path} is empty: run that evaluation again, or leave it out.")
    return text


def _per_query(path: Path) -> dict[str, dict[str, float | None]]:
    """Measure -> query id -> value, in the file's order. Raises UserError for a line that is not that."""
    columns: dict[str, dict[str, float | None]] = {}
    seen: set[str] = set()
    for number, line in enumerate(_text(path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = _strict(line)
        except ValueError as error:
            raise UserError(f"{path}, line {number} is not JSON ({error}).") from error
        if problem := _misfit(row, {"query": str}, "it"):
            raise UserError(f"{path}, line {number} is no query with its measures ({problem}).")
        query = row.pop("query")
        if query in seen:
            raise UserError(f"{path}, line {number} gives query {query!r} a second time.")
        seen.add(query)
        if problem := _misfit(row, Each(_OPTIONAL), "it"):
            raise UserError(f"{path}, line {number} has a value that is no number ({problem}).")
        for measure, value in row.items():
            columns.setdefault(measure, {})[query] = _float(value)
    if not columns:
        raise UserError(f"{path} names no measure: give a file of per-query values.")
    return columns


# --- settings


def _settings(path: Path) -> dict[str, object]:
    """A configuration's leaves under dotted names; lists are leaves. Raises UserError for what is no YAML."""
    if not path.exists():
        return {}
    try:
        tree = yaml.safe_load(_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: run that evaluation again.") from error
    if not isinstance(tree, Mapping):
        raise UserError(f"{path} holds no settings: run that evaluation again.")
    return dict(_leaves(tree, ""))


def _leaves(tree: Mapping, prefix: str) -> Iterable[tuple[str, object]]:
    for name, value in tree.items():
        if isinstance(value, Mapping) and value:
            yield from _leaves(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
