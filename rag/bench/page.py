"""Show the record of a benchmark, a line made by rag.bench.record.bench_json, as a Markdown table and as pictures."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, NullFormatter

from rag.bench.record import columns, rows_of
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


def markdown(record: Mapping[str, Any]) -> str:
    """Return a table of all figures, below one paragraph that says what ran on which machine, and its load."""
    headers, lines = columns(rows_of(record))
    table = [headers, ["---", *("---:" for _ in headers[1:])], *lines]
    return f"{_provenance(record)}\n\n" + "".join(
        f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in table
    )


def _provenance(record: Mapping[str, Any]) -> str:
    machine = record["machine"]
    peaks = machine["peaks"]
    rates = {
        "float32": peaks.get("gemm_flops"),
        "bfloat16": peaks.get("bf16_flops"),
        "int8": peaks.get("int8_ops"),
    }
    products = ", ".join(f"{rate / 1e9:,.0f} {name}" for name, rate in rates.items() if rate is not None)
    device = "" if machine["device"].lower() == "cpu" else f" and {machine['device']}"
    load = machine["load_average"][0]
    if "load_before" in record:
        load = f"{record['load_before'][0]:.2g} before, {load:.2g} after"
    dirty = " (changed)" if machine["dirty"] else ""
    facts = [
        f"{machine['date'][:10]}, commit {(machine['commit'] or 'unknown')[:8]}{dirty}",
        f"{machine['cores']} cores of {machine['cpu']}{device}, JAX {machine['versions']['jax']}",
        f"peaks {products} billion operations/s, {peaks['read_bytes_per_s'] / 1e9:.3g} GB/s",
        f"load average {load}",
        f"peak memory {byte_size(machine['peak_memory_bytes'])}, peers included",
    ]
    said = "Median [least, most]; a ratio above 1 means that ours is better."
    return f"`{record.get('command') or record['bench']}`: {'; '.join(facts)}. {said}"


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
