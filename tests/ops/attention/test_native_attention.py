"""Attention in C++: any shape, and the gradients of its own backward pass."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from rag import native
from tests.ops.attention.cases import CAUSAL, Case, both_ways, check, inputs, needs_native


@settings(max_examples=15, deadline=None)
@given(
    t=st.integers(1, 150),
    s=st.integers(1, 150),
    d=st.sampled_from([1, 7, 16, 40, 64, 100, 256]),
    k=st.integers(1, 2),
    group=st.integers(1, 9),
    options=st.sampled_from([{}, CAUSAL, CAUSAL | {"window": 70}]),
)
def test_native_code_takes_any_shape(t, s, d, k, group, options):
    """Both directions, with lengths around the 64 rows and slots of a tile."""
    check(Case(b=1, h=k * group, k=k, t=t, s=s, d=d, options=options), "native")


@needs_native
def test_gradients_of_native_code_have_the_same_bits_for_any_number_of_threads(monkeypatch):
    *qkv, dout, _ = inputs(Case(b=1, h=6, k=2, t=300, s=300))
    runs = []
    for threads in (1, 2, 2, 16):
        monkeypatch.setattr(native, "cores", lambda threads=threads: threads)
        jax.clear_caches()
        runs.append(both_ways(*qkv, dout, causal=True, implementation="native")[1])
    for run in runs[1:]:
        jax.tree.map(np.testing.assert_array_equal, run, runs[0])


@needs_native
def test_cotangents_of_the_log_sum_exp_of_padding_queries_are_not_read():
    """That of -inf, the log-sum-exp of a fully masked row, may be NaN."""
    *qkv, dout, dlse = inputs(Case())
    options = {"return_lse": True, "implementation": "native"}
    segments = {"q_segments": jnp.full((2, 20), -1).at[:, 3:9].set(0), "kv_segments": jnp.zeros((2, 45), int)}
    nan = jnp.where(segments["q_segments"][:, None] < 0, jnp.nan, dlse)
    _, want = both_ways(*qkv, (dout, dlse), **segments, **options)
    _, got = both_ways(*qkv, (dout, nan), **segments, **options)
    jax.tree.map(np.testing.assert_array_equal, got, want)
