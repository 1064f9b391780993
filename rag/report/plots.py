"""Draw the report's figures as PNG bytes, with matplotlib's objects (no pyplot, which has global state).

Colours are Okabe and Ito's (2008), which colour-blind readers can distinguish; shapes, positions or words always
repeat what a colour means. Pictures have twice the pixels at which they are shown.
"""

import io
import itertools
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from matplotlib.transforms import Bbox

from rag.evaluate.statistics import Comparison
from rag.report.numbers import duration, shortened

Significance = Literal["baseline", "better", "worse", "open"]  # open: no significant difference

_BLUE, _ORANGE, _GREEN, _VERMILION = "#0072B2", "#E69F00", "#009E73", "#D55E00"
_SKY, _PURPLE, _YELLOW, _GREY, _INK = "#56B4E9", "#CC79A7", "#F0E442", "#7A828A", "#1c2024"
_LOOK: Mapping[Significance, tuple[str, str, str]] = {  # colour, marker, legend
    "baseline": (_INK, "D", "baseline"),
    "better": (_BLUE, "^", "significantly better than the baseline"),
    "worse": (_VERMILION, "v", "significantly worse"),
    "open": (_GREY, "o", "no significant difference"),
}
_CAUSES = (_SKY, _ORANGE, _PURPLE, _VERMILION, _YELLOW, _GREY)  # of errors, in the order given
PALETTE = (_BLUE, _VERMILION, _GREEN, _ORANGE, _PURPLE, _SKY)  # of series in any order
_STYLE: dict[Any, Any] = {
    "text.parse_math": False,  # a label's $ is a $
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#9aa5b1",
    "axes.axisbelow": True,
    "axes.grid": True,
    "grid.color": "#e3e7eb",
    "text.color": _INK,
    "axes.labelcolor": _INK,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
}
_WIDTH, _DPI = 9.2, 200  # inches, dots an inch: 1840 pixels, shown as 920
_LONGEST, _LONGEST_BESIDE = 42, 34  # characters of a label at an axis, and beside a point
_ANGLES, _RINGS, _FURTHER = (
    12,
    9,
    0.15,
)  # positions of a point's label, and the cost of each ring further away


@dataclass(frozen=True)
class Mark:
    """One system's mean of the main metric with its interval, and the median seconds of a query (NaN: not timed)."""

    label: str
    mean: float
    low: float
    high: float
    significance: Significance
    query_s: float = math.nan
    sample: bool = False  # evaluated on fewer queries than others: its mean is not comparable by itself


def png(height: float, draw: Callable[[Figure], None], width: float = _WIDTH) -> bytes:
    """Return what `draw` draws on a figure of this height and width in inches."""
    with matplotlib.rc_context(_STYLE), warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .*missing from", UserWarning)  # it is drawn as a box
        figure = Figure(figsize=(width, height), dpi=_DPI, layout="constrained")
        FigureCanvasAgg(figure)
        draw(figure)
        file = io.BytesIO()
        figure.savefig(file, format="png", metadata={"Software": None})
    return file.getvalue()


def _names(axes: Axes, labels: Sequence[str]) -> None:
    """Label the rows of the y axis, the first at the top."""
    axes.set_yticks(range(len(labels)), [shortened(label, _LONGEST) for label in labels])
    axes.set_ylim(len(labels) - 0.5, -0.5)
    axes.tick_params(axis="y", length=0)
    axes.grid(axis="y", visible=False)


def forest(marks: Sequence[Mark], measure: str, confidence: float) -> bytes:
    """Draw each system's mean and interval on one axis, in the order given: a forest plot, as PNG bytes."""

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        for significance, (colour, marker, legend) in _LOOK.items():
            chosen = [(row, mark) for row, mark in enumerate(marks) if mark.significance == significance]
            if not chosen:
                continue
            for row, mark in chosen:
                axes.plot([mark.low, mark.high], [row, row], color=colour, lw=2.2, solid_capstyle="butt")
                _point(axes, mark.mean, row, marker, colour, mark.sample)
            axes.plot([], [], marker, color=colour, label=legend)
        _sample_legend(axes, marks)
        for mark in marks:
            if mark.significance == "baseline":
                axes.axvline(mark.mean, color=_INK, lw=0.9, ls=(0, (4, 3)), zorder=1)
        _names(axes, [mark.label for mark in marks])
        axes.set_xlabel(f"{measure}, mean and {confidence:.0%} interval")
        figure.legend(loc="outside upper center", ncols=3)

    return png(1.2 + 0.3 * len(marks), draw)


def _point(axes: Axes, x: float, y: float | int, marker: str, colour: str, hollow: bool) -> None:
    face, edge, width = ("white", colour, 1.6) if hollow else (colour, "white", 0.8)
    axes.plot(x, y, marker, ms=7, mfc=face, mec=edge, mew=width, zorder=3)


def _sample_legend(axes: Axes, marks: Sequence[Mark]) -> None:
    if any(mark.sample for mark in marks):
        axes.plot(
            [], [], "o", mfc="white", mec=_GREY, mew=1.6, label="hollow: on a sample of the queries only"
        )


# --- quality against cost


def front(marks: Sequence[Mark], *, lower: bool = False) -> list[int]:
    """Return the positions of the marks on the Pareto front: no other is as fast and better, or as good and faster.

    Better is higher, or with `lower` lower. Means over different queries are not comparable, so marks on a sample are
    left out.
    """
    whole, sign = [mark for mark in marks if not mark.sample], -1 if lower else 1

    def beaten(one: Mark) -> bool:
        return any(
            other.query_s <= one.query_s
            and sign * other.mean >= sign * one.mean
            and (other.query_s, other.mean) != (one.query_s, one.mean)
            for other in whole
        )

    return [position for position, mark in enumerate(marks) if not mark.sample and not beaten(mark)]


def pareto(marks: Sequence[Mark], measure: str, confidence: float, *, lower: bool = False) -> bytes:
    """Draw the mean metric (better when higher, or `lower`) against the median seconds of a query, as PNG bytes.

    Every mark has its `query_s`.
    """
    best = set(front(marks, lower=lower))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        steps = sorted((marks[position].query_s, marks[position].mean) for position in best)
        axes.step([x for x, _ in steps], [y for _, y in steps], where="post", color=_GREEN, lw=1.4, zorder=2)
        for position, mark in enumerate(marks):
            colour = _GREEN if position in best else _GREY
            axes.plot([mark.query_s] * 2, [mark.low, mark.high], color=colour, lw=1.2, alpha=0.55, zorder=1)
            shape = "D" if mark.significance == "baseline" else "o"
            _point(axes, mark.query_s, mark.mean, shape, colour, mark.sample)
        axes.set_xscale("log")
        _log_seconds(axes, [mark.query_s for mark in marks])
        axes.set_ylabel(f"{measure}, mean and {confidence:.0%} interval")
        axes.set_xlabel("median time of a query (log scale)")
        axes.plot([], [], "o-", color=_GREEN, lw=1.4, label="Pareto front")
        axes.plot([], [], "o", color=_GREY, label="not on it")
        axes.plot([], [], "D", color=_GREY, label="baseline")
        _sample_legend(axes, marks)
        figure.legend(loc="outside upper center", ncols=4)
        _label_points(figure, axes, marks, steps)

    return png(5.6, draw)


def _log_seconds(axes: Axes, seconds: Sequence[float]) -> None:
    """Set limits with room for labels on both sides, and ticks with units: 10 ms, 1 s."""
    low, high = math.log10(min(seconds)), math.log10(max(seconds))
    margin = max(0.35, 0.12 * (high - low))
    axes.set_xlim(10 ** (low - margin), 10 ** (high + margin))
    narrow = high - low + 2 * margin < 1.6
    axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5) if narrow else (1,), numticks=20))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: duration(value)))
    axes.xaxis.set_minor_formatter(NullFormatter())


def _label_points(figure: Figure, axes: Axes, marks: Sequence[Mark], line: Sequence[tuple]) -> None:
    """Draw each label where it hides least: next to its point, or further away with a line to it, the best first.

    `line` has the corners of the Pareto front in the order drawn.
    """
    figure.draw_without_rendering()  # settles the layout
    figure.set_layout_engine("none")  # and keeps it
    points = axes.transData.transform([(mark.query_s, mark.mean) for mark in marks])
    dot = 6 * _DPI / 72
    taken = [Bbox.from_bounds(x - dot, y - dot, 2 * dot, 2 * dot) for x, y in points]
    ends = [((mark.query_s, mark.low), (mark.query_s, mark.high)) for mark in marks]
    for (x, y), (next_x, next_y) in itertools.pairwise(line):  # along, then up
        ends += [((x, y), (next_x, y)), ((next_x, y), (next_x, next_y))]
    strokes = [Bbox(axes.transData.transform(pair)).padded(2) for pair in ends]
    inside = axes.get_window_extent().padded(-dot)
    for position in np.argsort([-mark.mean for mark in marks]).tolist():
        text = axes.annotate(
            shortened(marks[position].label, _LONGEST_BESIDE), points[position], xycoords="figure pixels"
        )
        text.set(fontsize=8, path_effects=[withStroke(linewidth=2.5, foreground="white")], zorder=5)
        box = text.get_window_extent()
        spots = [
            _spot(points[position], box, angle, away) for away in range(_RINGS) for angle in range(_ANGLES)
        ]
        hidden = [_hidden(spot, taken, strokes, inside) for spot in spots]
        costs = [cost + _FURTHER * (position // _ANGLES) for position, cost in enumerate(hidden)]
        spot = spots[chosen := int(np.argmin(costs))]
        text.set_position((spot.x0, spot.y0 - box.y0 + points[position][1]))
        taken.append(spot)
        if chosen >= _ANGLES:
            _leader(axes, points[position], spot)


def _spot(point: np.ndarray, box: Bbox, angle: int, away: int) -> Bbox:
    """Return a label's box in one of the directions from its point: right first, then turning to both sides."""
    turn = (angle + 1) // 2 * (1 if angle % 2 else -1) * math.tau / _ANGLES
    reach = (9 + 11 * away) * _DPI / 72
    x = point[0] + reach * math.cos(turn) + (math.cos(turn) - 1) / 2 * box.width
    y = point[1] + reach * math.sin(turn) + (math.sin(turn) - 1) / 2 * box.height
    return Bbox.from_bounds(x, y, box.width, box.height)


def _hidden(spot: Bbox, taken: Sequence[Bbox], strokes: Sequence[Bbox], inside: Bbox) -> float:
    """Return the cost of what a label there would hide: labels and points most, then lines; never outside the axes."""
    if not (inside.x0 <= spot.x0 and spot.x1 <= inside.x1 and inside.y0 <= spot.y0 and spot.y1 <= inside.y1):
        return 1000.0
    return 10.0 * spot.count_overlaps(taken) + 0.6 * spot.count_overlaps(strokes)


def _leader(axes: Axes, point: np.ndarray, spot: Bbox) -> None:
    end = (float(np.clip(point[0], spot.x0, spot.x1)), float(np.clip(point[1], spot.y0, spot.y1)))
    line = {"arrowstyle": "-", "color": _GREY, "lw": 0.7, "shrinkA": 0, "shrinkB": 4}
    axes.annotate(
        "", (point[0], point[1]), end, xycoords="figure pixels", textcoords="figure pixels", arrowprops=line
    )


# --- query by query, and the error breakdown


def win_loss(
    panels: Mapping[str, tuple[Sequence[float], Comparison]],
    measure: str,
    baseline: str,
    *,
    lower: bool = False,
) -> bytes:
    """Draw a small panel for each system: its sorted differences to the baseline on common queries, as PNG bytes.

    A query with a higher value is won; with `lower` it is lost, and the differences are drawn with the opposite sign.
    """
    if lower:
        panels = {
            name: ([-value for value in values], replace(found, wins=found.losses, losses=found.wins))
            for name, (values, found) in panels.items()
        }
    columns = min(4, len(panels))
    lines = math.ceil(len(panels) / columns)
    largest = max(abs(value) for values, _ in panels.values() for value in values) or 1.0

    def draw(figure: Figure) -> None:
        grid = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel().tolist()
        for axes, (label, (values, found)) in zip(grid, panels.items(), strict=False):
            _panel(axes, label, np.sort(np.asarray(values, float))[::-1], found)
            axes.set_ylim(-1.05 * largest, 1.05 * largest)
        for axes in grid[len(panels) :]:
            axes.set_visible(False)
        other = shortened(baseline, 30)
        difference = (
            f"{measure} of {other} minus the system's" if lower else f"{measure} minus that of {other}"
        )
        figure.supylabel(difference, fontsize=9)
        figure.supxlabel("queries, from most won to most lost", fontsize=9)

    return png(0.6 + 1.65 * lines, draw, width=max(4.6, _WIDTH * columns / 4))


def _panel(axes: Axes, label: str, values: np.ndarray, found: Comparison) -> None:
    edges = np.arange(len(values) + 1) - 0.5
    axes.stairs(np.maximum(values, 0), edges, fill=True, color=_BLUE)
    axes.stairs(np.minimum(values, 0), edges, fill=True, color=_VERMILION)
    axes.axhline(0, color=_INK, lw=0.7)
    axes.set_xlim(-0.5, len(values) - 0.5)
    axes.set_xticks([])
    axes.grid(axis="x", visible=False)
    axes.set_title(shortened(label, 30), fontsize=8.5, pad=4)
    note: dict[str, Any] = {"fontsize": 8, "transform": axes.transAxes}
    axes.text(0.98, 0.96, f"{found.wins} won", color=_BLUE, ha="right", va="top", **note)
    axes.text(0.5, 0.96, f"{found.ties} same", color=_GREY, ha="center", va="top", **note)
    axes.text(0.02, 0.04, f"{found.losses} lost", color=_VERMILION, ha="left", va="bottom", **note)


def error_breakdown(
    rows: Sequence[tuple[str, float, Mapping[str, float]]], measure: str, ceiling: float
) -> bytes:
    """Draw one stacked bar for each (label, score, error by cause), which add up to the ceiling, as PNG bytes.

    A cause that helped is negative: it is drawn left of zero, and the bar ends that much beyond the ceiling.
    """
    causes = list(dict.fromkeys(cause for _, _, parts in rows for cause in parts))

    def draw(figure: Figure) -> None:
        axes = figure.add_subplot()
        right, left = np.zeros(len(rows)), np.zeros(len(rows))
        series = [(f"{measure} reached", _BLUE, [score for _, score, _ in rows])]
        for number, cause in enumerate(causes):
            amounts = [parts.get(cause, 0.0) for _, _, parts in rows]
            series.append((f"lost: {cause}", _CAUSES[number % len(_CAUSES)], amounts))
        for name, colour, amounts in series:
            widths = np.asarray(amounts, float)
            start = np.where(widths >= 0, right, left)
            bars = axes.barh(
                range(len(rows)), widths, 0.72, start, color=colour, ec="white", lw=0.8, label=name
            )
            dark = colour in (_BLUE, _VERMILION, _GREY)
            texts = [f"{width:.2f}" if abs(width) >= 0.04 * ceiling else "" for width in widths]
            axes.bar_label(bars, texts, label_type="center", color="white" if dark else _INK, fontsize=8)
            right, left = right + np.maximum(widths, 0), left + np.minimum(widths, 0)
        axes.axvline(ceiling, color=_INK, lw=0.9, ls=(0, (4, 3)))
        axes.axvline(0, color=_INK, lw=0.9)
        _names(axes, [label for label, _, _ in rows])
        axes.set_xlabel(f"{measure} (dashed: the ceiling)")
        figure.legend(loc="outside upper center", ncols=3)

    return png(1.35 + 0.32 * len(rows), draw)
