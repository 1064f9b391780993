"""Records of measurements: seconds of a call, the spread of a value, and counted work (bytes and operations)."""

import statistics
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace

# Column names: the memory that one call reads, and the rate. rag.bench.peak_throughput needs the first to choose the
# peak bandwidth that the second is compared with.
WORKING_SET, READ_RATE = "working set MB", "GB/s read"


@dataclass(frozen=True, slots=True)
class Timing:
    """Seconds of one call: the median, the fastest and the slowest of `repeats`."""

    median: float
    minimum: float
    maximum: float
    repeats: int

    def times(self, factor: float | int) -> "Spread":
        """Return the seconds in another unit, as in `ms=timing.times(1000)`."""
        return Spread(factor * self.median, factor * self.minimum, factor * self.maximum)

    def rate(self, work: float | int) -> "Spread":
        """Return how much work is done in a second, where one call does `work`."""
        return Spread(work / self.median, work / self.maximum, work / self.minimum)


@dataclass(frozen=True, slots=True)
class Spread:
    """A value that was measured several times: the median, the minimum and the maximum."""

    median: float
    low: float
    high: float

    @staticmethod
    def of(values: Sequence[float | int]) -> "Spread":
        """Return the spread of measured values."""
        return Spread(float(statistics.median(values)), float(min(values)), float(max(values)))


Figure = float | int | Spread


@dataclass(frozen=True, slots=True)
class Work:
    """The work of a computation: the bytes that it reads, and its operations by type (a multiply-add is two).

    `working_set` is the size of the memory that is read; it is less than `nbytes` where memory is read several times.
    The working set of a sum is the larger of the two. The types are those in which numbers are multiplied, whatever
    type they are stored in.
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
        """Return the columns of a table row for a call that does this work; work of zero is left out."""
        figures: dict[str, Figure] = {}
        if self.nbytes:
            figures |= {WORKING_SET: self.working_set / 1e6, READ_RATE: timing.rate(self.nbytes / 1e9)}
        for kind, unit in (("float32", "GFLOP/s"), ("bfloat16", "GFLOP/s"), ("int8", "GOP/s")):
            if operations := getattr(self, kind):
                figures[f"{kind} {unit}"] = timing.rate(operations / 1e9)
        return figures
