"""Seconds that JAX spent compiling or loading programs, however its events nest or overlap."""

import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime.machine import clock as clocks
from rag.runtime.machine.clock import Clock, compile_seconds

_TICKS = 60


@given(st.lists(st.tuples(st.integers(0, _TICKS), st.integers(0, _TICKS)), max_size=40))
def test_the_union_of_intervals_counts_every_moment_once(intervals):
    union, covered = clocks.Intervals(), np.zeros(_TICKS, bool)
    for start, end in intervals:  # in any order, nested, overlapping, adjoining, empty, reversed
        union.add(float(start), float(end))
        covered[start:end] = True
        assert union.seconds == covered.sum()


class _Wall:
    """A clock of whole seconds in place of the wall clock."""

    now = 1000.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"]),
            st.integers(0, 9),  # ticks since the event before
            st.integers(-3, 40),  # its duration; the wall's clock that JAX reads may be set back
        ),
        max_size=30,
    )
)
def test_events_that_nest_never_take_longer_than_the_time_that_passed(events):
    with pytest.MonkeyPatch.context() as patch:
        heard, wall = [], _Wall()
        patch.setattr(jax.monitoring, "register_event_duration_secs_listener", heard.append)
        patch.setattr(clocks.time, "perf_counter", lambda: wall.now)
        clock = clocks._compile_clock.__wrapped__()
        covered = np.zeros(10 * len(events) + 1, bool)
        for name, passed, seconds in events:
            wall.now += passed
            heard[0](f"/jax/core/compile/{name}_duration", float(seconds), fun_name="f")
            heard[0](
                "/jax/compilation_cache/cache_retrieval_time_sec", float(seconds)
            )  # inside backend_compile
            end = int(wall.now - 1000)
            covered[max(0, end - seconds) : end] = True
            assert clock.seconds == covered.sum() <= end


def test_a_function_that_is_compiled_while_another_is_traced_counts_once():
    """A computation during tracing is compiled inside it, so the sum of all events is more than the time."""
    reported = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: reported.append(seconds) if "/core/compile/" in event else None
    )

    @jax.jit
    def inner(x):
        return jnp.sin(x) @ jnp.cos(x)

    @jax.jit
    def outer(x):
        with jax.ensure_compile_time_eval():
            known = inner(jnp.ones((7, 7)))
        return inner(x * 3) + known

    x = jnp.ones((7, 7)).block_until_ready()
    begin, reported[:] = Clock.now(), []
    outer(x).block_until_ready()
    raw = compile_seconds() - begin.compiling
    taken = Clock.now() - begin
    assert 0 < raw <= taken.wall and raw == taken.compiling
    assert raw < sum(reported)
    assert taken.working == taken.wall - taken.compiling > 0
    begin = Clock.now()
    outer(x).block_until_ready()
    assert (Clock.now() - begin).compiling == 0


def test_threads_that_compile_at_once_spend_the_time_once():
    def compiled(size):
        jax.jit(lambda x: jnp.tanh(x) @ x)(np.ones((size, size), np.float32)).block_until_ready()

    threads = [threading.Thread(target=compiled, args=(size,)) for size in (31, 33)]
    begin = Clock.now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raw = compile_seconds() - begin.compiling
    assert 0 < raw <= Clock.now().wall - begin.wall


@given(*(st.floats(0, 1e6) for _ in range(4)))
def test_differences_of_clocks_are_never_negative(wall, compiling, later, more):
    taken = Clock(later, more) - Clock(wall, compiling)
    assert taken.wall >= 0 and taken.compiling >= 0 and taken.working >= 0
    if later >= wall and 0 <= more - compiling <= later - wall:
        assert taken == Clock(later - wall, more - compiling)
    sum_of = Clock(wall, compiling) + Clock(later, more)
    assert (sum_of.wall, sum_of.compiling) == (wall + later, compiling + more)
