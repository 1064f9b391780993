"""Honest measuring: alternating timings, the clock of compiling, and the record of where a figure came from.

A figure alone says little on a shared machine. So calls are timed in turns (A B A B ...), which spreads a
slow minute over all of them, their ratio is quoted, and every file of results carries `environment()`.
"""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from rag.runtime.measurement import Figure, Timing


@dataclass(frozen=True, slots=True)
class Row:
    """One case of a benchmark: our figures by name, each peer's, and how much better we are."""

    case: str
    ours: Mapping[str, Figure]
    peers: Mapping[str, Mapping[str, Figure]] = field(default_factory=dict)
    ratio: Mapping[str, float | int] = field(default_factory=dict)  # peer -> above 1 when ours is better


def alternate(
    calls: Mapping[str, Callable[[], object]], *, repeats: int, warmup: int = 1, warm_up: bool = False
) -> dict[str, Timing]:
    """Time the callables in turns and return each one's Timing.

    What a call returns is waited for (jax.block_until_ready, so any pytree or none will do). The first
    `warmup` rounds, where programs compile and memory is touched for the first time, do not count. With `warm_up`
    each call is made once untimed right before: nobody begins with caches that the one before has filled.
    """
    import jax

    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(warmup + repeats):
        for name, call in calls.items():
            if warm_up:
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
