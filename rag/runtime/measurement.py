"""Measured figures: seconds of a call, spreads of a figure, and counted work (bytes and operations)."""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

# Figures of a row: the memory that one call reads from, and how fast; by the first rag.bench.peak_throughput chooses the second's roof.
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
