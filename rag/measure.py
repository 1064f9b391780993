"""Honest measuring: alternating timings, the clock of compiling, and the record of where a figure came from.

A figure alone says little on a shared machine. So rivals are timed in turns (A B A B ...), which spreads a
slow minute over all of them, their ratio is quoted, and every file of results carries `environment()`.
"""

import bisect
import contextlib
import functools
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

# Instruction sets that decide how fast array code can be; the rest of a processor's flags is noise.
_SIMD = ("sse4", "ssse3", "avx", "fma", "f16c", "amx", "neon", "asimd", "sve", "i8mm", "bf16", "dotprod")
# Figures of a row: the memory that one call reads from, and how fast; by the first rag.roofs chooses the second's roof.
WORKING_SET, READ_RATE = "working set MB", "GB/s read"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, the fastest and the slowest of `repeats`."""

    median: float
    minimum: float
    maximum: float
    repeats: int

    def times(self, factor: float | int) -> "Spread":
        """The seconds in another unit, as in `ms=timing.times(1000)`."""
        return Spread(factor * self.median, factor * self.minimum, factor * self.maximum)

    def rate(self, work: float | int) -> "Spread":
        """How much of `work`, which one call does, is done in a second."""
        return Spread(work / self.median, work / self.maximum, work / self.minimum)


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure that was taken several times: its median, the least and the most."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float | int]) -> "Spread":
        return Spread(float(statistics.median(values)), float(min(values)), float(max(values)))


Figure = float | int | Spread


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a benchmark: our figures by name, each peer's, and how much better we are."""

    case: str
    ours: Mapping[str, Figure]
    peers: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    ratio: Mapping[str, float | int] = field(default_factory=dict)  # peer -> above 1 when ours is better


@dataclass(frozen=True, slots=True)
class Work:
    """What a computation does: the bytes that it reads, and operations by type, a multiply-add being two.

    `working_set` is the memory that is read from, less than `nbytes` where it is read several times; of a sum it is the
    larger of the two. The types are those of the multiplication, whatever the operands are stored in.
    """

    nbytes: int = 0
    working_set: int = 0
    float32: int = 0
    bfloat16: int = 0
    int8: int = 0

    def __add__(self, other: "Work") -> "Work":
        pairs = zip(astuple(self), astuple(other), strict=True)
        summed = Work(*(one + more for one, more in pairs))
        return replace(summed, working_set=max(self.working_set, other.working_set))

    def rates(self, timing: Timing) -> dict[str, Figure]:
        """The figures of a row for a call that does this, what it does nothing of left out; each names its type."""
        figures: dict[str, Figure] = {}
        if self.nbytes:
            figures |= {WORKING_SET: self.working_set / 1e6, READ_RATE: timing.rate(self.nbytes / 1e9)}
        for kind, unit in (("float32", "GFLOP/s"), ("bfloat16", "GFLOP/s"), ("int8", "GOP/s")):
            if operations := getattr(self, kind):
                figures[f"{kind} {unit}"] = timing.rate(operations / 1e9)
        return figures


def alternate(
    rivals: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, rehearse: bool = False
) -> dict[str, Timing]:
    """Time the callables in turns and return each one's Timing.

    What a call returns is waited for (jax.block_until_ready, so any pytree or none will do). The first
    `warmup` rounds, where programs compile and memory is touched for the first time, do not count. With `rehearse`
    each call is made once untimed right before: nobody begins with caches that the one before has filled.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in rivals}
    for turn in range(warmup + repeats):
        for name, call in rivals.items():
            if rehearse:
                jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s), repeats) for name, s in seconds.items()}


def ratio(ours: Timing, peer: Timing) -> float:
    """How many times faster we are, by the medians: above 1 means that ours is faster."""
    return peer.median / ours.median


def compiled_temp_bytes(fn: Callable[..., object], *args: object) -> int:
    """Bytes of temporary memory that XLA plans for `fn(*args)`, beside its arguments and results."""
    import jax

    return jax.jit(fn).lower(*args).compile().memory_analysis().temp_size_in_bytes


def environment() -> dict[str, object]:
    """The record that every JSON of ours carries: what ran, on what, how busy it was."""
    import jax

    return {
        **_revision(),
        "python": platform.python_version(),
        "versions": {name: metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy")},
        **_cpu(),
        "cores": cores(),
        "device": jax.devices()[0].device_kind,
        "xla_flags": os.environ.get("XLA_FLAGS", ""),
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "peak_memory_bytes": peak_memory_bytes(),
        **_peak_device_memory(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }


class Intervals:
    """The union of intervals of time that are told in any order: `seconds` is how long at least one of them lasted."""

    def __init__(self) -> None:
        self._starts: list[float] = []  # of disjoint intervals, ascending, as their ends are
        self._ends: list[float] = []
        self.seconds = 0.0

    def add(self, start: float, end: float) -> None:
        """Add an interval; one that ends before it starts counts nothing."""
        if end <= start:
            return
        first, last = bisect.bisect_left(self._ends, start), bisect.bisect_right(self._starts, end)
        covered = math.fsum(
            b - a for a, b in zip(self._starts[first:last], self._ends[first:last], strict=True)
        )
        if first < last:
            start, end = min(start, self._starts[first]), max(end, self._ends[last - 1])
        self._starts[first:last], self._ends[first:last] = [start], [end]
        self.seconds += end - start - covered


@functools.cache
def _compile_clock() -> Intervals:
    """The intervals of time that JAX has spent making or loading programs since the first call.

    JAX reports tracing, lowering and compiling (which fetches from the compilation cache, where it can) at their ends,
    with how long they took. They nest: what is computed at once while a function is traced is itself traced, lowered
    and compiled, inside the tracing of the other. Each event is an interval that ends now, and overlaps count once.
    Those of all threads are in one union: two threads that compile at once spend the time once.
    """
    import jax

    since, lock, clock = time.perf_counter(), threading.Lock(), Intervals()

    def add(event: str, seconds: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            with lock:
                clock.add(max(since, now - seconds), now)

    jax.monitoring.register_event_duration_secs_listener(add)
    return clock


def compile_seconds() -> float:
    """Seconds spent making or loading programs so far, from the first call on; never more than have passed since then.

    Take differences, of `Clock` where the rest of the time is asked for too.
    """
    return _compile_clock().seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Seconds by the wall, and those of them that went into making or loading programs: `Clock.now() - begin`.

    A difference is never negative and never holds more compiling than time: that another thread began to compile
    before `begin`, and that two clocks round differently, is cut off here and nowhere else. While one thread compiles,
    another's work counts as compiling too.
    """

    wall: float = 0.0
    compiling: float = 0.0

    @staticmethod
    def now() -> "Clock":
        return Clock(time.perf_counter(), compile_seconds())

    @property
    def working(self) -> float:
        """The seconds without those of compiling."""
        return self.wall - self.compiling

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(self.wall + other.wall, self.compiling + other.compiling)

    def __sub__(self, other: "Clock") -> "Clock":
        wall = max(0.0, self.wall - other.wall)
        return Clock(wall, min(wall, max(0.0, self.compiling - other.compiling)))


def peak_memory_bytes() -> int:
    """The most memory that this process has held, since the last forget_peak_memory() where there is one."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # macOS counts bytes, Linux KiB


def _peak_device_memory() -> dict[str, int]:
    """The most that this process has held on an accelerator; nothing where the device does not tell, as a CPU."""
    import jax

    peak = (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use")
    return {} if peak is None else {"peak_device_bytes": peak}


def forget_peak_memory() -> None:
    """Let the peak begin at what is held now, where the system can (Linux); elsewhere it stays the process's."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def _revision() -> dict[str, object]:
    """The commit of this checkout and whether it was changed since; both None for an installed copy."""
    root = Path(__file__).resolve().parent.parent
    if not (
        root / ".git"
    ).exists():  # else git would answer for whatever repository we are installed inside of
        return {"commit": None, "dirty": None}
    commit = _output("git", "-C", str(root), "rev-parse", "HEAD")
    changes = _output("git", "-C", str(root), "status", "--porcelain")
    return {"commit": commit, "dirty": None if changes is None else bool(changes)}


@functools.cache
def cpu_flags() -> tuple[str, ...]:
    """The processor's SIMD instruction sets, in the operating system's words, lower case."""
    return tuple(_cpu()["cpu_flags"])


def _cpu() -> dict[str, object]:
    """The processor's name and its SIMD instruction sets: from Linux's /proc, else from macOS's sysctl."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        name = _output("sysctl", "-n", "machdep.cpu.brand_string") or platform.machine()
        words = (_output("sysctl", "-n", "machdep.cpu.features", "machdep.cpu.leaf7_features") or "").split()
    else:
        facts = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
        name = facts.get("model name") or platform.machine()
        words = (facts.get("flags") or facts.get("Features") or "").split()  # x86, ARM
    simd = sorted({word.lower() for word in words if any(part in word.lower() for part in _SIMD)})
    return {"cpu": name, "cpu_flags": simd}


def cores() -> int:
    """Cores that this process may use, which a container may limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _output(*command: str) -> str | None:
    """What a command prints, or None where it is missing or fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError:
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def print_table(rows: Sequence[Row], title: str = "") -> None:
    """Print the rows on stdout: a column for each figure of ours and of each peer, then the ratios."""
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
    """The headers, "ours: ms" or "ratio to: torch", and each row's cells; "-" where a row has no such figure."""
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
    """Each item once, where it was first seen."""
    return list(dict.fromkeys(items))


def _short(value: Figure) -> str:
    """Four significant digits, without an exponent for large ones; of a Spread the median [least, most]."""
    if isinstance(value, Spread):
        return f"{_short(value.median)} [{_short(value.low)}, {_short(value.high)}]"
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e15 else f"{value:.4g}"


def bench_json(
    bench: str, rows: Sequence[Row], roofs: Mapping[str, float], **facts: Sequence[float] | str
) -> str:
    """A benchmark's one JSON line: {"bench", "machine", "rows": [{"case", "ours", "peers", "ratio"}]} and any `facts`.

    `machine` is environment() with what roofs() said before the benchmark. A Spread becomes {"median", "low", "high"}.
    """
    machine = environment() | {"roofs": dict(roofs)}
    record = {"bench": bench, **facts, "machine": machine, "rows": [asdict(row) for row in rows]}
    return json.dumps(record, allow_nan=False)


def rows_of(record: Mapping[str, Any]) -> list[Row]:
    """The rows that a line of bench_json holds, parsed."""

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
