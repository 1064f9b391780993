"""Measure wall-clock seconds, and the seconds of them in which JAX compiled or loaded programs."""

import bisect
import functools
import math
import threading
import time
from dataclasses import dataclass


class Intervals:
    """The union of intervals of time that are added in any order; `seconds` is the length of the union."""

    def __init__(self) -> None:
        self._starts: list[float] = []  # of disjoint intervals, ascending; so are their ends
        self._ends: list[float] = []
        self.seconds = 0.0

    def add(self, start: float, end: float) -> None:
        """Add an interval; one that ends before it starts is ignored."""
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
    """Return the intervals of time that JAX has spent compiling or loading programs since the first call.

    JAX reports the duration of tracing, lowering and compiling (or of loading from the compilation cache) when they
    end. These nest: a computation that runs while a function is traced is itself traced, lowered and compiled. Each
    event is added as an interval that ends now, so that overlaps count once. The intervals of all threads are in one
    union: when two threads compile at the same time, that time counts once.
    """
    import jax

    since, lock, clock = time.perf_counter(), threading.Lock(), Intervals()

    def add(event: str, duration_secs: float, **_: object) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            with lock:
                clock.add(max(since, now - duration_secs), now)

    jax.monitoring.register_event_duration_secs_listener(add)
    return clock


def compile_seconds() -> float:
    """Return the seconds spent compiling or loading programs since the first call of this function.

    Only differences of it are meaningful; use those of `Clock` where the rest of the time is needed too.
    """
    return _compile_clock().seconds


@dataclass(frozen=True, slots=True)
class Clock:
    """Wall-clock seconds, and the seconds of them spent compiling or loading programs: use `Clock.now() - begin`.

    A difference is never negative and never has more compiling than wall-clock time, although another thread may have
    begun to compile before `begin` and the two clocks round differently: this is the only place that corrects for both.
    While one thread compiles, the work of another thread counts as compiling too.
    """

    wall: float = 0.0
    compiling: float = 0.0

    @staticmethod
    def now() -> "Clock":
        """Return the current time."""
        return Clock(time.perf_counter(), compile_seconds())

    @property
    def working(self) -> float:
        """Return the seconds that were not spent compiling."""
        return self.wall - self.compiling

    def __add__(self, other: "Clock") -> "Clock":
        return Clock(self.wall + other.wall, self.compiling + other.compiling)

    def __sub__(self, other: "Clock") -> "Clock":
        wall = max(0.0, self.wall - other.wall)
        return Clock(wall, min(wall, max(0.0, self.compiling - other.compiling)))
