"""Time calls in turns, and compare ours with its peers.

A time alone says little on a shared machine. So calls alternate (A B A B ...), which spreads a slow minute over all of
them, and their ratio is reported.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rag.runtime.machine.measurement import Figure, Timing


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a benchmark: our figures by name, those of each peer, and how many times better ours are."""

    case: str
    ours: Mapping[str, Figure]
    peers: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    ratio: Mapping[str, float | int] = field(default_factory=dict)  # peer -> above 1 when ours is better


def alternate(
    calls: Mapping[str, Callable[[], object]],
    *,
    repeats: int,
    warmup: int = 1,
    warmup_each_turn: bool = False,
) -> dict[str, Timing]:
    """Time the callables in turns and return each one's Timing.

    A call ends when the arrays that it returns are ready (jax.block_until_ready takes any pytree).

    Args:
        calls: The callables by name.
        repeats: The rounds that are timed.
        warmup: The rounds before them that are not, where programs compile and memory is first touched.
        warmup_each_turn: Whether each timed call follows an untimed one of the same callable, so that none
            starts with the caches that another callable has filled.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            if warmup_each_turn:
                jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            if turn >= warmup:
                seconds[name].append(time.perf_counter() - start)
    return {name: Timing(statistics.median(s), min(s), max(s), repeats) for name, s in seconds.items()}


def ratio(ours: Timing, peer: Timing) -> float:
    """Return how many times faster ours is, by the medians."""
    return peer.median / ours.median


def compiled_temp_bytes(fn: Callable[..., object], *args: object) -> int:
    """Return the bytes of temporary memory that XLA plans for `fn(*args)`, arguments and results left out."""
    import jax

    analysis = jax.jit(fn).lower(*args).compile().memory_analysis()
    assert analysis is not None, "this backend does not report its memory"
    return analysis.temp_size_in_bytes
