"""Numbers as text, spelled in the same way everywhere in a report."""

import json
import math
from collections.abc import Sequence

MISSING = "n/a"
LONGEST = 70  # characters of a setting's value


def number(value: float | int | None) -> str:
    """Return a number with four decimals, as retrieval papers do."""
    return MISSING if value is None or not math.isfinite(value) else f"{value:z.4f}"


def with_interval(mean: float | int | None, interval: Sequence[float | int] | None) -> str:
    """Return "0.3995 [0.3621, 0.4370]", or without the interval where there is none."""
    return number(mean) + bounds(interval)


def difference(value: float | int, interval: Sequence[float | int] | None = None) -> str:
    """Return "+0.0123 [-0.0010, +0.0250]": always with its sign."""
    return f"{value:+z.4f}{bounds(interval, '+')}"


def bounds(interval: Sequence[float | int] | None, sign: str = "") -> str:
    """Return an interval after a space, or "" where there is none."""
    if interval is None or not all(map(math.isfinite, interval)):
        return ""
    return f" [{interval[0]:{sign}z.4f}, {interval[1]:{sign}z.4f}]"


def p_value(value: float) -> str:
    """Return p with four decimals, or "<0.0001"."""
    return "<0.0001" if value < 0.0001 else f"{value:.4f}"


def duration(seconds: float | int) -> str:
    """Return seconds in a unit that fits: 1.23 ms, 4.5 s."""
    if seconds == 0:
        return "0 s"
    for unit, scale in (("µs", 1e-6), ("ms", 1e-3)):
        if seconds < 999.5 * scale:
            return f"{seconds / scale:.3g} {unit}"
    return f"{seconds:.3g} s" if seconds < 999.5 else f"{seconds:,.0f} s"


def byte_size(count: float | int) -> str:
    """Return bytes in units of 1024: 1.5 MiB."""
    for unit, scale in (("GiB", 1 << 30), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= scale:
            return f"{count / scale:.3g} {unit}" if count < 999.5 * scale else f"{count / scale:,.0f} {unit}"
    return f"{count:.0f} B"


def rate(value: float | int) -> str:
    """Return a rate with three digits, without an exponent."""
    return f"{value:.3g}" if value < 999.5 else f"{value:,.0f}"


def shortened(text: str, width: int) -> str:
    """Return at most `width` characters: the middle is cut out, since names differ at both ends."""
    if len(text) <= width:
        return text
    head = (width - 1) // 2
    return f"{text[:head]}…{text[len(text) - (width - 1 - head) :]}"


def setting(value: object) -> str:
    """Return a setting's value on one line, as YAML would write it; the middle of a long text is cut out."""
    return shortened(" ".join(plain(value).split()) or '""', LONGEST)


def plain(value: object) -> str:
    """Return a setting's value in full, floats with ten digits at most."""
    match value:
        case str():
            return value
        case float():
            return f"{value:.10g}"
    return json.dumps(value, ensure_ascii=False, default=str)
