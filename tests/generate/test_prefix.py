"""Prompts that begin alike: what is reused changes nothing that is written."""

import jax
import numpy as np
import pytest

from rag.generate.engine import Decoding, Engine
from rag.generate.kv.prefix import PrefixCache
from rag.ops.sampling import Sampling
from rag.types import UserError
from tests.tiny import CONFIG, IM_END, tiny_model

GREEDY = Sampling()
PLENTY = 1 << 30


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_model(), [IM_END])


def random_ids(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


def written(engine, state):
    return [token for [tokens] in Decoding(engine, state, GREEDY) for token in tokens]


SHARED = random_ids(0, 70)
PROMPTS = [
    SHARED + random_ids(1, 20),
    SHARED + random_ids(2, 45),  # shares the beginning
    SHARED + random_ids(2, 45),  # the same again
    SHARED[:30],  # a beginning of it
    SHARED + random_ids(2, 45) + random_ids(3, 100),  # goes on, in a larger cache
    random_ids(4, 50),  # shares nothing
    SHARED[:17] + random_ids(5, 3),
]


def test_a_reused_beginning_changes_nothing(engine):
    kept, shared = PrefixCache(engine, PLENTY), []
    for prompt in PROMPTS:
        before = kept.reused
        ours, plain = kept.start(prompt, 12), engine.prefill([prompt], 12)
        shared.append(kept.reused - before)
        for one, other in zip(jax.tree.leaves(ours.cache), jax.tree.leaves(plain.cache), strict=True):
            np.testing.assert_allclose(
                one[:, :, : len(prompt)], other[:, :, : len(prompt)], rtol=1e-4, atol=1e-4
            )
        assert (np.asarray(ours.seen) == np.asarray(plain.seen)).all()
        assert written(engine, ours) == written(engine, plain)
    assert shared == [0, 70, 114, 29, 115, 0, 17]
    assert kept.read + kept.reused == sum(map(len, PROMPTS))


def test_a_seed_draws_what_it_draws_in_a_plain_prefill(engine):
    sampling, kept = Sampling(temperature=1.0), PrefixCache(engine, PLENTY)
    kept.start(PROMPTS[0], 8)
    tokens = [int(kept.start(PROMPTS[1], 8, sampling, seed).token[0]) for seed in range(6)]
    assert tokens == [int(engine.prefill([PROMPTS[1]], 8, sampling, [seed]).token[0]) for seed in range(6)]
    assert len(set(tokens)) > 1


def test_the_budget_holds_and_the_least_recently_used_goes_first(engine):
    slot = 2 * CONFIG.num_hidden_layers * CONFIG.num_key_value_heads * CONFIG.head_dim * 4
    kept = PrefixCache(engine, 2 * 64 * slot)  # two prompts of up to 64 tokens
    first, second, third = (random_ids(seed, 40) for seed in (10, 11, 12))
    for prompt in (first, second, first, third):  # the first is used once more before the third comes
        kept.start(prompt, 4)
        assert kept.nbytes <= 2 * 64 * slot
    before = kept.reused
    kept.start([*second, 1], 4)
    assert kept.reused == before
    kept.start([*third, 1], 4)
    assert kept.reused == before + 40
    nothing = PrefixCache(engine, 0)
    for _ in range(2):
        assert written(engine, nothing.start(first, 4)) == written(engine, engine.prefill([first], 4))
    assert nothing.nbytes == nothing.reused == 0


def test_what_no_engine_can_read_is_refused(engine):
    kept = PrefixCache(engine, PLENTY)
    with pytest.raises(UserError, match="no tokens"):
        kept.start([], 4)
    with pytest.raises(UserError, match="context of 512"):
        kept.start(random_ids(0, 510), 4)
