"""Estimate whether a scan of codes is faster than exact search, by counting operations, not by timing.

A choice by a clock would differ from run to run, and with it the results of an approximate index. So both ways are
counted in one unit: the time in which exact search for one query reads one vector. The numbers are rounded from timings
with 20,000 and 200,000 vectors of 384 dimensions on Intel with AMX, with and without native code (LOG.md), in favour of
exact search; `pays` leaves a margin on top, for processors that differ.
"""

from rag.runtime.shapes import next_power_of_two

_MARGIN = 0.8  # of the cost of exact search that a scan may take at most
_MOST = 16  # queries past which exact search costs no more, where the processor has bfloat16 products


def exact(rows: int, queries: int) -> float:
    """Return the cost of exact search: for several queries it is a product of matrices that reads the vectors once."""
    return rows * (1.0 if queries == 1 else 1.5 + min(next_power_of_two(queries), _MOST) / 32)


def pays(scan: float | int, rows: int, queries: int) -> bool:
    """Return whether a scan of this cost is expected to be faster than exact search by a clear margin."""
    return scan <= _MARGIN * exact(rows, queries)
