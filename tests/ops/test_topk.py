"""Selecting the k highest: the order and its ties against a stable sort, and XLA's fast path in the compiled text."""

import re
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag.ops.topk import top_k, two_level_top_k
from tests.reference import top_k_oracle

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="reads what XLA compiles for CPU")


def _assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_array_equal(np.asarray(ours), theirs)


def _many_ties(rows: int, n: int) -> np.ndarray:
    return np.random.default_rng(n).integers(-3, 4, (rows, n)).astype(np.float32)


@pytest.mark.parametrize(("n", "k"), [(0, 0), (1, 0), (1, 1), (5, 5), (100, 7), (4000, 100)])
def test_top_k_is_a_stable_sort(n, k):
    scores = _many_ties(3, n)
    _assert_same(jax.vmap(partial(top_k, k=k))(scores), top_k_oracle(scores, k))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_top_k_of_other_types_is_float32(dtype):
    scores = jnp.asarray(_many_ties(1, 50)[0], dtype)
    best, ids = top_k(scores, 9)
    assert best.dtype == jnp.float32
    _assert_same((best[None], ids[None]), top_k_oracle(scores[None], 9))


def test_zeros_of_both_signs_tie():
    scores = jnp.array([-1.0, -0.0, 0.0, -0.0, 0.0])
    np.testing.assert_array_equal(jax.jit(partial(top_k, k=4))(scores)[1], [1, 2, 3, 4])
    many = jnp.tile(scores, 200)
    zeros = np.flatnonzero(np.asarray(many) == 0)
    best = jax.jit(partial(two_level_top_k, k=9))(many)
    np.testing.assert_array_equal(best[1], zeros[:9])


def test_infinities_are_scores():
    scores = jnp.array([-jnp.inf, jnp.inf, 0.0, -jnp.inf])
    np.testing.assert_array_equal(top_k(scores, 4)[1], [1, 2, 0, 3])


@pytest.mark.parametrize("n", [0, 1, 7, 8, 9, 63, 64, 65, 640, 645, 1279, 1280, 1281, 1287, 4001])
@pytest.mark.parametrize("k", [1, 3, 10])
def test_two_levels_are_a_stable_sort(n, k):
    k = min(k, n)
    scores = _many_ties(4, n)
    found = jax.vmap(partial(two_level_top_k, k=k))(scores)
    _assert_same(found, top_k_oracle(scores, k))


def test_the_best_may_all_be_in_one_group():
    scores = np.zeros(4096, np.float32)
    scores[2048:2064] = np.arange(16)
    _, ids = two_level_top_k(jnp.asarray(scores), 10)
    np.testing.assert_array_equal(ids, 2063 - np.arange(10))


# --- the compiled text --------------------------------------------------------------------------------------


def topk_operands(text: str) -> list[str]:
    """Return the types of the operands of XLA's TopK, such as f32[8,6250]: its arguments are named, then defined."""
    names = re.findall(r"custom-call\(%?([\w.-]+)\), custom_call_target=\"TopK\"", text)
    return [re.search(rf"%?{re.escape(name)} = (\w+\[[\d,]*\])", text)[1] for name in names]


def sorted_lengths(text: str) -> list[int]:
    """Return the longest dimension of everything that the program sorts."""
    shapes = re.findall(r"= \(?\w+\[([\d,]*)\][^=]*? sort\(", text)
    return [max(map(int, shape.split(","))) for shape in shapes]


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8"])
def test_top_k_never_becomes_a_sort(dtype):
    """XLA selects quickly in float32 only, and slices of the result without a barrier make it sort everything."""

    def sliced(scores):
        best, ids = jax.vmap(partial(top_k, k=100))(scores)
        return best[:, -1], ids[:, :10]

    text = jax.jit(sliced).lower(jnp.zeros((8, 5000), dtype)).compile().as_text()
    assert topk_operands(text) == ["f32[8,5000]"]
    assert sorted_lengths(text) == []


@on_cpu
def test_without_a_barrier_the_test_above_would_fail():
    def sliced(scores):
        best, ids = jax.lax.top_k(scores, 100)
        return best[:, -1], ids[:, :10]

    text = jax.jit(sliced).lower(jnp.zeros((8, 5000), jnp.bfloat16)).compile().as_text()
    assert topk_operands(text) != ["f32[8,5000]"] or sorted_lengths(text) != []


@on_cpu
def test_two_levels_sort_group_numbers_only():
    search = jax.vmap(partial(two_level_top_k, k=10))
    text = jax.jit(search).lower(jnp.zeros((8, 64000))).compile().as_text()
    assert topk_operands(text) == ["f32[8,1000]", "f32[8,704]"]  # maxima of 64 scores each, 11 groups
    assert max(sorted_lengths(text)) == 10
