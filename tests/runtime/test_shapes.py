"""Rounding of sizes: never down, idempotent, and to few sizes."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime import shapes

ROUNDINGS = {
    "next_power_of_two": shapes.next_power_of_two,
    "next_power_of_two from 16": lambda n: shapes.next_power_of_two(n, 16),
    "round_up to 48": lambda n: shapes.round_up(n, 48),
    "round_up_text": lambda n: shapes.round_up_text(n, 10_000),
    "round_up_prompt": shapes.round_up_prompt,
    "round_up_suffix": shapes.round_up_suffix,
    "round_up_cache": shapes.round_up_cache,
}


@pytest.mark.parametrize("name", ROUNDINGS)
@given(n=st.integers(1, 10_000), m=st.integers(1, 10_000))
def test_a_rounded_size_holds_the_size_and_stays(name, n, m):
    rounded = ROUNDINGS[name]
    assert rounded(n) >= n
    assert rounded(rounded(n)) == rounded(n)
    assert n > m or rounded(n) <= rounded(m)


@given(n=st.integers(-1000, 1000), divisor=st.integers(1, 50))
def test_ceil_div_rounds_up(n, divisor):
    assert shapes.ceil_div(n, divisor) == math.ceil(n / divisor)
    assert shapes.ceil_div(np.array([n, 0]), divisor).tolist() == [math.ceil(n / divisor), 0]


@given(n=st.integers(1, 1 << 40))
def test_powers_of_two(n):
    above, below, root = (
        shapes.next_power_of_two(n),
        shapes.previous_power_of_two(n),
        shapes.power_of_two_near_sqrt(n),
    )
    assert above.bit_count() == below.bit_count() == root.bit_count() == 1
    assert below <= n <= above < 2 * n + (n == 1)
    assert root * root / 2 <= n <= 4 * root * root


def test_texts_are_no_longer_than_the_longest():
    assert [shapes.round_up_text(n, 100) for n in (1, 16, 17, 97, 100)] == [16, 16, 32, 100, 100]


def test_sizes_of_nothing():
    assert shapes.next_power_of_two(0) == shapes.power_of_two_near_sqrt(0) == 1
    assert shapes.round_up(0, 8) == 0
