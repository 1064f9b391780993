"""The clock: seconds by the wall, and those of them in which JAX made or loaded programs."""

import bisect
import functools
import math
import threading
import time
from dataclasses import dataclass


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
