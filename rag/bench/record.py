"""Write the record of a benchmark: a table on the terminal and one JSON line."""

import json
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rag.bench.timing import Row
from rag.runtime.machine import environment
from rag.runtime.measurement import Figure, Spread


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
        lines.append([row.case, *("-" if value is None else _short(value) for value in figures)])
    return headers + [f"ratio to: {peer}" for peer in ratios], lines


def _ordered(items: Iterable) -> list:
    """Return each item once, in the order of its first occurrence."""
    return list(dict.fromkeys(items))


def _short(value: Figure) -> str:
    """Format with four significant digits, large numbers without an exponent, a Spread as median [least, most]."""
    if isinstance(value, Spread):
        return f"{_short(value.median)} [{_short(value.low)}, {_short(value.high)}]"
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


def rows_of(record: Mapping[str, Any]) -> list[Row]:
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
