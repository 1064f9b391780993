"""Whether a scan of codes is expected to be faster than exact search: counted, not timed.

A choice that hung on a clock would differ from run to run, and with it what an approximate index finds. So both
ways are counted in one unit, the time in which exact search for one query reads one vector. The figures are rounded
from timings with 20,000 and 200,000 vectors of 384 dimensions on Intel with AMX, with and without native code
(LOG.md), to the side of exact search; `pays` leaves a margin on top, for processors that differ.
"""

from rag.index.dense.growing import _round_up

_MARGIN = 0.8  # of the cost of exact search that a scan may take at most
_MOST = 16  # queries past which exact search costs no more, where the processor has bfloat16 products


def exact(rows: int, queries: int) -> float:
    """What exact search costs: several queries are a product of matrices, then the vectors are read once."""
    return rows * (1.0 if queries == 1 else 1.5 + min(_round_up(queries, 1), _MOST) / 32)


def pays(scan: float | int, rows: int, queries: int) -> bool:
    """Whether a scan that costs so much is expected to be faster than exact search by a clear margin."""
    return scan <= _MARGIN * exact(rows, queries)
