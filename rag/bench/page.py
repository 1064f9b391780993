"""Show the records of a benchmark, lines made by rag.bench.record.bench_json, as a Markdown page and as pictures."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rag.bench.record import Record, columns, rows_of
from rag.bench.timing import Row
from rag.report.numbers import byte_size, duration
from rag.report.plots import PALETTE, png

_MARKERS = "os^Dv<>p"
_GREY = "#7A828A"


@dataclass(frozen=True, slots=True)
class GrowthSeries:
    """Seconds measured at several sizes, and the power law `scale * size ** exponent` fitted to them."""

    name: str
    sizes: Sequence[int]
    seconds: Sequence[float]
    exponent: float
    scale: float
    theory: float | int  # the exponent of the number of operations


def machine_name(record: Record) -> str:
    """Return the machine in a few words; records of one kind of machine have the same."""
    machine = record["machine"]
    cpu = re.sub(r"\(R\)|\(TM\)| Processor", "", machine["cpu"]).strip()
    tiles = " with AMX" if any(flag.startswith("amx") for flag in machine["cpu_flags"]) else ""
    device = "" if machine["device"].lower() == "cpu" else f" and {machine['device']}"
    return f"{machine['cores']} cores of {cpu}{tiles}{device}"


def latest(records: Sequence[Record]) -> dict[str, Record]:
    """Return the last record of each kind of machine."""
    return {machine_name(record): record for record in records}


def markdown(title: str, records: Sequence[Record], picture: str | None = None) -> str:
    """Return a page: for each kind of machine its last record, as one paragraph and a table of all figures.

    Args:
        title: The heading.
        records: The records of one benchmark, oldest first.
        picture: The file name of a picture to show, or None.
    """
    parts = [f"# {title}"]
    for record in latest(records).values():
        headers, lines = columns(rows_of(record))
        parts += [_provenance(record), table([headers, *lines])]
    return "\n\n".join(parts) + (f"\n\n![{title}]({picture})\n" if picture else "\n")


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table of the header and the lines; all columns but the first are aligned to the right."""
    header, *rest = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    rule = ["---", *("---:" for _ in header[1:])]
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, rule, *rest])


def run_facts(record: Record) -> str:
    """Return the command of a run, its date, commit and load."""
    machine = record["machine"]
    load = f"{machine['load_average'][0]:.2g}"
    if "load_before" in record:
        load = f"{record['load_before'][0]:.2g} before, {load} after"
    dirty = " (changed)" if machine["dirty"] else ""
    commit = (machine["commit"] or "unknown")[:8]
    command = record.get("command") or record["bench"]
    return f"`{command}`: {machine['date'][:10]}, commit {commit}{dirty}; load average {load}"


def _provenance(record: Record) -> str:
    machine = record["machine"]
    peaks = machine["peaks"]
    rates = {
        "float32": peaks.get("gemm_flops"),
        "bfloat16": peaks.get("bf16_flops"),
        "int8": peaks.get("int8_ops"),
    }
    products = ", ".join(f"{rate / 1e9:,.0f} {name}" for name, rate in rates.items() if rate is not None)
    facts = [
        run_facts(record),
        f"{machine_name(record)}, JAX {machine['versions']['jax']}",
        f"peaks {products} billion operations/s, {peaks['read_bytes_per_s'] / 1e9:.3g} GB/s",
        f"peak memory {byte_size(machine['peak_memory_bytes'])}, peers included",
    ]
    return f"{'; '.join(facts)}. Median [least, most]; a ratio above 1 means that ours is better."


def ratios(rows: Sequence[Row]) -> bytes | None:
    """Draw how many times better ours is than each peer in each case; return PNG bytes, or None without peers."""
    peers = list(dict.fromkeys(peer for row in rows for peer in row.ratio))
    cases = [row for row in rows if row.ratio]
    if not peers:
        return None

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for number, peer in enumerate(peers):
            chosen = [(row.ratio[peer], line) for line, row in enumerate(cases) if peer in row.ratio]
            look: dict[str, Any] = {
                "color": PALETTE[number % len(PALETTE)],
                "marker": _MARKERS[number % len(_MARKERS)],
            }
            axes.plot(*zip(*chosen, strict=True), ls="", ms=6, mec="white", mew=0.6, label=peer, **look)
        axes.axvline(1.0, color=_GREY, lw=0.9, ls=(0, (4, 3)), zorder=1)
        axes.set_yticks(range(len(cases)), [row.case for row in cases])
        axes.set_ylim(len(cases) - 0.5, -0.5)
        axes.set_xscale("log")
        _plain_numbers(axes)
        axes.set_xlabel("times better than the peer (log scale); right of the dashed line ours is better")
        figure.legend(loc="outside upper center", ncols=3)

    return png(1.2 + 0.15 * len(peers) + 0.24 * len(cases), draw)


def _plain_numbers(axes: Axes) -> None:
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.xaxis.set_minor_formatter(
        FuncFormatter(lambda value, _: f"{value:g}" if f"{value:.0e}"[0] in "25" else "")
    )


def growth(series: Sequence[GrowthSeries]) -> bytes:
    """Draw a panel for each series, seconds over size on log axes: measured, fitted, theoretical; return PNG bytes."""

    def draw(figure: Figure) -> None:
        panels = figure.subplots(1, len(series), squeeze=False)[0]
        for number, (axes, one) in enumerate(zip(panels, series, strict=True)):
            colour, sizes = PALETTE[number % len(PALETTE)], (min(one.sizes), max(one.sizes))
            axes.plot(one.sizes, one.seconds, "o", color=colour, mec="white", label="measured")
            fitted = [one.scale * size**one.exponent for size in sizes]
            axes.plot(sizes, fitted, color=colour, lw=1.3, label=f"fitted, exponent {one.exponent:.2f}")
            last = fitted[1]
            steep = [last * (size / sizes[1]) ** one.theory for size in sizes]
            axes.plot(
                sizes, steep, color=_GREY, lw=1, ls=(0, (4, 3)), label=f"theory, exponent {one.theory:g}"
            )
            axes.set_xscale("log")
            axes.set_yscale("log")
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
            axes.yaxis.set_minor_formatter(NullFormatter())
            axes.set_title(one.name, fontsize=9)
            axes.legend(loc="upper left")

    return png(3.6, draw, width=4.2 * len(series))
