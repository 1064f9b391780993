"""The settings of each row of a report, its costs, and the machine it ran on."""

from collections.abc import Iterator, Mapping, Sequence

from rag.report.leaderboard import Leaderboard
from rag.report.numbers import LONGEST, MISSING, byte_size, duration, plain, rate, setting, shortened
from rag.report.page import Block, Details, Heading, Paragraph, Table
from rag.report.results import Run

_PATHS = {"path", "dir", "output", "runs"}  # last words of settings that are paths and change no result
_MOMENTARY = {"load_average", "peak_memory_bytes"}  # of an environment: they change from moment to moment
_USUAL = 0.7  # share of the rows: a setting that more of them have is a column
_WIDEST = 6  # such columns
_MOST = 3  # different values of one property of the environment that are all listed
_COSTS = {
    "index build": ("index_build_s", duration),
    "index size": ("index_bytes", byte_size),
    "query p50": ("query_p50_s", duration),
    "query p95": ("query_p95_s", duration),
    "queries timed": ("query_n", lambda x: f"{x:,.0f}"),
    "compiling": ("compile_s", duration),
    "passages/s": ("passages_per_s", rate),
    "tokens/s": ("tokens_per_s", rate),
    "peak memory": ("peak_memory_bytes", byte_size),
}


def costs(table: Leaderboard) -> Iterator[Block]:
    """Yield the table of costs; columns that no run can fill are left out."""
    counted = [run for run in table.runs if run.costs]
    columns = {
        title: [MISSING if (x := cost(run, key)) is None else shown(x) for run in counted]
        for title, (key, shown) in _COSTS.items()
    }
    columns = {title: cells for title, cells in columns.items() if set(cells) - {MISSING}}
    if not columns:
        return
    names = [table.name(run) for run in counted]
    yield Heading(3, "Cost")
    yield Table(["system", *columns], [list(row) for row in zip(names, *columns.values(), strict=True)])
    cached = [[table.name(run), *row] for run in counted for row in _cached(run)]
    if cached:
        header = ["system", "stage", "cached", "of"]
        yield Details("What was cached from earlier runs", [Table(header, cached)])


def cost(run: Run, key: str) -> float | int | None:
    """Return a figure of the run's costs; None where it has none."""
    value = (run.costs or {}).get(key)
    return value if isinstance(value, float | int) and not isinstance(value, bool) else None


def _cached(run: Run) -> Iterator[list[str]]:
    """Yield the stages of which results were cached, how many, and how many there were."""
    for name, stage in (run.costs or {})["stages"].items():
        if stage["reused"]:
            yield [name, f"{stage['reused']:,}", f"{stage['items']:,}"]


# --- settings


def differing_settings(table: Leaderboard) -> Iterator[Block]:
    """Yield the table of settings that differ, a column for each that most rows have, and hidden all others."""
    settings = [_without_paths(run.settings) for run in table.runs]
    known = [row for row in settings if row]
    if not known:
        return
    yield Heading(3, "Settings that differ")
    keys = dict.fromkeys(key for row in known for key in row)
    differing = [key for key in keys if len({row.get(key) for row in known}) > 1]
    if not differing:
        yield Paragraph("Their settings do not differ.")
        return
    columns = {key: _shown(key, [row.get(key) for row in settings]) for key in differing}
    usual = [key for key, cells in columns.items() if sum(map(bool, cells)) > _USUAL * len(cells)][:_WIDEST]
    rows = [
        [str(row + 1), run.label, *(columns[key][row] for key in usual)] for row, run in enumerate(table.runs)
    ]
    yield Table(["#", "label", *usual], rows)
    others = [
        [table.name(run), key, cells[row]]
        for row, run in enumerate(table.runs)
        for key, cells in columns.items()
        if key not in usual and cells[row]
    ]
    if others:
        header = ["system", "setting", "value"]
        yield Details("Further settings that differ", [Table(header, others)])
    same = [[key, setting(known[0][key])] for key in keys if key not in differing and known[0].get(key)]
    if same:
        yield Details("Settings that all share", [Table(["setting", "value"], same)])


def _without_paths(settings: Mapping[str, object]) -> dict[str, str]:
    """Return settings as text by name, without paths."""
    return {
        key: plain(value)
        for key, value in settings.items()
        if key.rpartition(".")[2] not in _PATHS and not key.startswith("hydra.")
    }


def _shown(key: str, values: Sequence[str | None]) -> list[str]:
    """Return the values of one setting, shortened where they stay different; "" for a row without it."""
    texts = [None if value is None else " ".join(value.split()) or '""' for value in values]
    short = [
        text and (text.rpartition(".")[2] if key.endswith("_target_") else shortened(text, LONGEST))
        for text in texts
    ]
    return [text or "" for text in (short if len(set(short)) == len(set(texts)) else texts)]


# --- environment


def environment(runs: Sequence[Run]) -> Iterator[Block]:
    """Yield the table of the machines that the runs' costs record; where they differ, every value."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, value in (run.costs or {}).get("environment", {}).items():
            if name not in _MOMENTARY:
                found.setdefault(name, set()).add(_plain(value))
    if found:
        yield Table(["environment", ""], [[name.replace("_", " "), _joined(v)] for name, v in found.items()])


def _joined(values: set[str]) -> str:
    ordered = sorted(values)
    return "; ".join(ordered) if len(ordered) <= _MOST else f"{ordered[0]} to {ordered[-1]}"


def _plain(value: object) -> str:
    match value:
        case Mapping():
            return ", ".join(f"{name} {_plain(item)}" for name, item in value.items())
        case list():
            return " ".join(_plain(item) for item in value)
        case bool():
            return "yes" if value else "no"
        case None:
            return MISSING
    return str(value)
