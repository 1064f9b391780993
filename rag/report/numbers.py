"""Figures in words, the same everywhere in a report."""

import json
import math
from collections.abc import Sequence

MISSING = "n/a"
LONGEST = 70  # characters of a setting's value


def number(value: float | int | None) -> str:
    """Four decimals, as retrieval papers give their measures."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:.4f}"


def with_interval(mean: float | int | None, interval: Sequence[float | int] | None) -> str:
    """0.3995 [0.3621, 0.4370], or without the interval where there is none."""
    return number(mean) + bounds(interval)


def difference(value: float | int, interval: Sequence[float | int] | None = None) -> str:
    """+0.0123 [-0.0010, +0.0250]: always with its sign."""
    return f"{value:+.4f}{bounds(interval, '+')}"


def bounds(interval: Sequence[float | int] | None, sign: str = "") -> str:
    """An interval after a space; "" where there is none."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" [{interval[0]:{sign}.4f}, {interval[1]:{sign}.4f}]"


def p_value(value: float) -> str:
    """Four decimals; a smaller one is said to be smaller."""
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def duration(seconds: float | int) -> str:
    """Seconds to read: 1.23 ms, 4.5 s."""
    if seconds == 0:
        return "0 s"
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def byte_size(count: float | int) -> str:
    """Bytes in units of 1024: 1.5 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def rate(value: float | int) -> str:
    """Three digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def shortened(text: str, width: int) -> str:
    """At most `width` characters: the middle goes, since names differ at both ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def setting(value: object) -> str:
    """A setting's value on one line, as YAML would show it; a long text loses its middle."""
    return shortened(" ".join(plain(value).split()) or '""', LONGEST)


def plain(value: object) -> str:
    """A setting's value in full, floats as far as they mean something."""
    match value:
        case str():
            return value
        case float():
            return f"{value:.10g}"
    return json.dumps(value, ensure_ascii=False, default=str)
