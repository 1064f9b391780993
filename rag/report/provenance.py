"""What each row of a report is, what it cost, and on what it ran: from the runs' ledgers and configurations."""

from collections.abc import Iterator, Mapping, Sequence

from rag.report.leaderboard import Leaderboard
from rag.report.numbers import LONGEST, MISSING, byte_size, duration, plain, rate, shortened
from rag.report.page import Block, Heading, Paragraph, Table
from rag.report.results import Run

_NOISE = {"path", "dir", "output", "runs"}  # last words of settings that say where, not what
_MOMENTARY = {"load_average", "peak_memory_bytes"}  # of an environment: the ledger tells what matters of it
_USUAL = 0.7  # of the rows: a setting that more of them have is a column of its own
_WIDEST = 6  # such columns
_MOST = 3  # different values of one thing in the environment that are all told
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
    """What each run cost, from its ledger; columns that no run can fill are left out."""
    counted = [run for run in table.runs if run.ledger]
    columns = {
        title: [MISSING if (x := cost(run, key)) is None else shown(x) for run in counted]
        for title, (key, shown) in _COSTS.items()
    }
    columns = {title: cells for title, cells in columns.items() if set(cells) - {MISSING}}
    if not columns:
        return
    reused = [_reused(run) for run in counted]
    rows = [
        [table.name(run), *cells, kept]
        for run, kept, *cells in zip(counted, reused, *columns.values(), strict=True)
    ]
    yield Heading(3, "Cost")
    yield Table(["system", *columns, "kept from earlier runs"], rows)


def cost(run: Run, key: str) -> float | int | None:
    """A figure of the run's ledger; None where it has none."""
    value = (run.ledger or {}).get(key)
    return value if isinstance(value, float | int) and not isinstance(value, bool) else None


def _reused(run: Run) -> str:
    stages = run.ledger["stages"].items()
    return ", ".join(f"{name} {s['reused']:,} of {s['items']:,}" for name, s in stages if s["reused"])


# --- what each row is


def separating(table: Leaderboard) -> Iterator[Block]:
    """The settings that not all rows share: a column for each that most rows have, the rest in words."""
    settings = [_telling(run.settings) for run in table.runs]
    known = [row for row in settings if row]
    if not known:
        return
    yield Heading(3, "What separates the rows")
    keys = dict.fromkeys(key for row in known for key in row)
    differing = [key for key in keys if len({row.get(key) for row in known}) > 1]
    if not differing:
        yield Paragraph("Their settings do not differ.")
        return
    columns = {key: _shown(key, [row.get(key) for row in settings]) for key in differing}
    usual = [key for key, cells in columns.items() if sum(map(bool, cells)) > _USUAL * len(cells)][:_WIDEST]
    own = {key: cells for key, cells in columns.items() if key not in usual}
    rows = [
        [str(row + 1), run.label, *(columns[key][row] for key in usual)]
        + ([", ".join(f"{key}={cells[row]}" for key, cells in own.items() if cells[row])] if own else [])
        for row, run in enumerate(table.runs)
    ]
    yield Table(["#", "label", *usual, *(["its other settings"] if own else [])], rows)


def _telling(settings: Mapping[str, object]) -> dict[str, str]:
    """Settings as text by name, without those that say where things lie."""
    return {
        key: plain(value)
        for key, value in settings.items()
        if key.rpartition(".")[2] not in _NOISE and not key.startswith("hydra.")
    }


def _shown(key: str, values: Sequence[str | None]) -> list[str]:
    """The values of one setting, made short where that leaves them different; "" for a row without it."""
    texts = [None if value is None else " ".join(value.split()) or '""' for value in values]
    short = [
        text and (text.rpartition(".")[2] if key.endswith("_target_") else shortened(text, LONGEST))
        for text in texts
    ]
    return [text or "" for text in (short if len(set(short)) == len(set(texts)) else texts)]


# --- on what it ran


def environment(runs: Sequence[Run]) -> Iterator[Block]:
    """What the runs' ledgers say they ran on; where they differ, every value."""
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, value in (run.ledger or {}).get("environment", {}).items():
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
