"""Every filter against its definition, and draws against the distribution that they should follow."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.ops.sampling import Sampling, filter_logits, sample
from rag.types import UserError
from tests.reference import kept_by_filters

LOGITS = np.log(np.array([[0.4, 0.3, 0.15, 0.1, 0.05], [0.05, 0.1, 0.15, 0.3, 0.4]], np.float32))
UNSEEN = jnp.zeros(LOGITS.shape, bool)


def keys(count, seed=0):
    return jax.random.split(jax.random.key(seed), count)


def not_filtered(options, logits=LOGITS):
    return np.asarray(filter_logits(jnp.asarray(logits), options) > -1e29)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (Sampling(temperature=1.0, top_k=2), [1, 1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_k=99), [1, 1, 1, 1, 1]),
        (Sampling(temperature=1.0, top_p=0.5), [1, 1, 0, 0, 0]),
        (Sampling(temperature=1.0, top_p=0.39), [1, 0, 0, 0, 0]),
        (Sampling(temperature=1.0, min_p=0.3), [1, 1, 1, 0, 0]),
        (Sampling(temperature=1.0, top_k=3, min_p=0.5), [1, 1, 0, 0, 0]),
    ],
)
def test_filters_keep_the_tokens_that_their_definitions_name(options, expected):
    np.testing.assert_array_equal(
        not_filtered(options), [np.array(expected, bool), np.array(expected, bool)[::-1]]
    )


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.floats(-8, 8, width=32), min_size=12, max_size=12, unique=True),
    st.sampled_from([0, 1, 5]),
    st.sampled_from([0.2, 0.7, 1.0]),
    st.sampled_from([0.0, 0.05, 0.4]),
)
def test_filters_equal_the_oracle(values, top_k, top_p, min_p):
    logits = np.array([values], np.float32)
    expected, decided = kept_by_filters(logits[0], top_k, top_p, min_p)
    got = not_filtered(Sampling(temperature=1.0, top_k=top_k, top_p=top_p, min_p=min_p), logits)[0]
    np.testing.assert_array_equal(got[decided], expected[decided])
    assert got[logits[0].argmax()]


def test_greedy_takes_the_best_token_and_ignores_the_filters():
    tokens = sample(jnp.asarray(LOGITS), keys(2), UNSEEN, Sampling(top_k=1, top_p=0.1, min_p=0.9))
    assert tokens.tolist() == [0, 4]


def test_draws_follow_the_filtered_distribution():
    draws = 4000
    logits, seen = jnp.tile(LOGITS[:1], (draws, 1)), jnp.zeros((draws, 5), bool)
    tokens = np.asarray(sample(logits, keys(draws), seen, Sampling(temperature=1.0, top_k=3)))
    share = np.bincount(tokens, minlength=5) / draws
    np.testing.assert_allclose(share, [0.4 / 0.85, 0.3 / 0.85, 0.15 / 0.85, 0, 0], atol=0.04)


def test_low_temperature_sharpens():
    draws = 500
    logits, seen = jnp.tile(LOGITS[:1], (draws, 1)), jnp.zeros((draws, 5), bool)
    cold = np.asarray(sample(logits, keys(draws), seen, Sampling(temperature=0.05)))
    warm = np.asarray(sample(logits, keys(draws), seen, Sampling(temperature=5.0)))
    assert (cold == 0).mean() > 0.95
    assert (warm == 0).mean() < 0.45


def test_a_row_draws_alone_as_in_a_batch():
    options = Sampling(temperature=1.0, top_p=0.9)
    both = sample(jnp.asarray(LOGITS), keys(2), UNSEEN, options)
    alone = sample(jnp.asarray(LOGITS[1:]), keys(2)[1:], UNSEEN[1:], options)
    assert both[1] == alone[0]


def test_repetition_penalty_divides_positive_and_multiplies_negative_logits_of_seen_tokens():
    logits = jnp.array([[2.0, 1.9, -1.0], [-1.0, -1.1, -9.0]])
    seen = jnp.array([[True, False, True], [True, False, False]])
    tokens = sample(logits, keys(2), seen, Sampling(repetition_penalty=1.3))
    assert tokens.tolist() == [1, 1]


@pytest.mark.parametrize(
    "options",
    [
        {"temperature": -1.0},
        {"top_k": -1},
        {"top_p": 0.0},
        {"top_p": 1.1},
        {"min_p": 1.0},
        {"repetition_penalty": 0.0},
    ],
)
def test_values_outside_their_range_are_refused(options):
    with pytest.raises(UserError, match=next(iter(options))):
        Sampling(**options)
