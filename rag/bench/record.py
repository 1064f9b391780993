"""Write the record of a benchmark, a table on the terminal and one JSON line, and read such lines again."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from rag.bench.timing import Row
from rag.runtime import records
from rag.runtime.machine.hardware import environment
from rag.runtime.machine.measurement import Figure, Spread
from rag.types import UserError

Record = dict[str, Any]  # a parsed line of `bench_json`


class _SpreadFields(records.Record):
    median: float
    low: float
    high: float


_Figures = dict[str, float | _SpreadFields]


class _RowFields(records.Record):
    case: str
    ours: _Figures
    peers: dict[str, _Figures]
    ratio: dict[str, float]


class _MachineFields(records.OpenRecord):
    """What tables show of a machine; `environment` and `peak_throughput` write more."""

    cpu: str
    cpu_flags: list[str]
    cores: int
    device: str
    versions: dict[str, str]
    load_average: Annotated[list[float], Field(min_length=1)]
    peak_memory_bytes: int
    commit: str | None
    dirty: bool | None
    date: str
    peaks: dict[str, float]


class _RecordFields(records.OpenRecord):
    bench: str
    command: str | None = None
    load_before: list[float] = Field(default=[0.0], min_length=1)
    machine: _MachineFields
    rows: Annotated[list[_RowFields], Field(min_length=1)]


PERCENT_OF_PEAK = ", % of peak"  # ends the name of a rate's share of its peak

_RENAMED = (  # words of older records -> the words of today's code
    ("tokens anew", "tokens recomputed"),
    ("int8, drafting", "int8, speculative"),
    ('"GFLOP/s', '"float32 GFLOP/s'),
    ("bench=reading bench.path=", "bench=question_answering bench.questions.path="),
    ("bench=quality bench.reading.path=", "bench=quality bench.questions.path="),
)


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """Print the rows on stdout, with a column for each figure of ours and of each peer, then the ratios."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text  # names are text, not rich's markup

    (first, *headers), lines = columns(rows)
    ratios = any(row.ratio for row in rows)
    table = Table(title=title or None, caption="ratio above 1: ours is better" if ratios else None)
    table.add_column(first, no_wrap=True)
    for header in headers:
        table.add_column(Text(header.replace(": ", "\n", 1)), justify="right", no_wrap=True)
    for case, *figures in lines:
        table.add_row(Text(case), *figures)
    wide = None if sys.stdout.isatty() else 1000  # a log has no width: never cut a table that goes into one
    Console(width=wide).print(table)


def columns(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Return the headers, such as "ours: ms" or "ratio to: torch", and the cells of each row, "-" for no figure."""
    ours = _ordered(name for row in rows for name in row.ours)
    peers = _ordered((peer, name) for row in rows for peer, figures in row.peers.items() for name in figures)
    ratios = _ordered(peer for row in rows for peer in row.ratio)
    headers = ["case", *(f"ours: {name}" for name in ours), *(f"{peer}: {name}" for peer, name in peers)]
    lines = []
    for row in rows:
        figures = [row.ours.get(name) for name in ours]
        figures += [row.peers.get(peer, {}).get(name) for peer, name in peers]
        figures += [row.ratio.get(peer) for peer in ratios]
        lines.append([row.case, *("-" if value is None else short(value) for value in figures)])
    return headers + [f"ratio to: {peer}" for peer in ratios], lines


def _ordered(items: Iterable) -> list:
    """Return each item once, in the order of its first occurrence."""
    return list(dict.fromkeys(items))


def short(value: Figure) -> str:
    """Format with four significant digits, large numbers without an exponent, a Spread as median [least, most]."""
    if isinstance(value, Spread):
        return f"{short(value.median)} [{short(value.low)}, {short(value.high)}]"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def bench_json(
    bench: str, rows: Sequence[Row], peaks: Mapping[str, float], **facts: Sequence[float] | str
) -> str:
    """Return the JSON line of a benchmark: {"bench", "machine", "rows": [{"case", "ours", "peers", "ratio"}]}.

    `machine` is environment() with the peak rates, as `peak_throughput.best_peak` returns them. `facts` are added as
    they are. A Spread becomes {"median", "low", "high"}.
    """
    machine = environment() | {"peaks": dict(peaks)}
    record = {"bench": bench, **facts, "machine": machine, "rows": [asdict(row) for row in rows]}
    return json.dumps(record, allow_nan=False)


def rows_of(record: Record) -> list[Row]:
    """Return the rows of a parsed line of `bench_json`."""

    def figures(found: Mapping[str, Any]) -> dict[str, Figure]:
        return {
            name: Spread(**value) if isinstance(value, Mapping) else value for name, value in found.items()
        }

    return [
        Row(
            row["case"],
            figures(row["ours"]),
            {peer: figures(found) for peer, found in row["peers"].items()},
            row["ratio"],
        )
        for row in record["rows"]
    ]


def read_records(path: Path) -> list[Record]:
    """Return the records of a file of JSON lines, oldest first, in today's words.

    Records before 2026-11-26 call two products of int8 digits one bfloat16 product, so these rates are left out.

    Raises:
        UserError: the file is missing, has no line, or a line that is no such record.
    """
    remedy = f"run the benchmark with keep={path.parent}"
    lines = path.read_bytes().splitlines() if path.is_file() else []
    if not lines:
        raise UserError(f"{path} has no record: {remedy}.")
    found = []
    for number, content in enumerate(lines, 1):
        where, take_out = f"{path}, line {number},", f"delete the line, or {remedy}"
        try:
            line = content.decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(f"{where} is not UTF-8 text: {take_out}.") from error
        for old, new in _RENAMED:
            line = line.replace(old, new)
        record = dict(records.parsed_json(where, line, take_out))
        records.fitted_record(where, record, _RecordFields, take_out)
        for row in record["rows"]:
            if record["machine"]["date"] < "2026-11-26" and "int8" in row["case"]:
                row["ours"] = {
                    name: v for name, v in row["ours"].items() if not name.startswith("bfloat16 GFLOP/s")
                }
        found.append(record)
    return found
