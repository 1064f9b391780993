"""Prompts with a common prefix: reusing its keys and values changes no answer."""

import jax
import numpy as np
import pytest

from rag.generate.engine import Engine
from rag.generate.kv.prefix import PrefixCache
from rag.ops.sampling import Sampling
from rag.types import UserError
from tests.generate.decode import alone, request, written
from tests.tiny_models import DECODER, IM_END, tiny_decoder

PLENTY = 1 << 30


@pytest.fixture(scope="module")
def engine():
    return Engine(tiny_decoder(), [IM_END])


class Recording(Engine):
    """Records how many tokens of each prompt came from the cache."""

    def __init__(self, model):
        super().__init__(model, [IM_END])
        self.reused = []

    def prefill(self, request):
        self.reused.append(0)
        return super().prefill(request)

    def prefill_suffix(self, cache, request, fresh):
        self.reused.append(len(request.prompt) - len(fresh))
        return super().prefill_suffix(cache, request, fresh)


def random_ids(seed, count):
    return np.random.default_rng(seed).integers(0, 256, count).tolist()


SHARED = random_ids(0, 70)
PROMPTS = [
    SHARED + random_ids(1, 20),
    SHARED + random_ids(2, 45),  # shares the prefix
    SHARED + random_ids(2, 45),  # the same again
    SHARED[:30],  # a prefix of it
    SHARED + random_ids(2, 45) + random_ids(3, 100),  # goes on, in a larger cache
    random_ids(4, 50),  # shares nothing
    SHARED[:17] + random_ids(5, 3),
]


def test_a_cached_prefix_changes_no_answer(engine):
    recording = Recording(engine.model)
    cache = PrefixCache(recording, PLENTY)
    for prompt in PROMPTS:
        ours, plain = cache.prefill(request(prompt, 12)), engine.prefill(request(prompt, 12))
        for one, other in zip(jax.tree.leaves(ours.cache), jax.tree.leaves(plain.cache), strict=True):
            np.testing.assert_allclose(
                one[:, :, : len(prompt)], other[:, :, : len(prompt)], rtol=1e-4, atol=1e-4
            )
        assert (np.asarray(ours.seen) == np.asarray(plain.seen)).all()
        assert written(engine, ours) == written(engine, plain)
    assert recording.reused == [0, 70, 114, 29, 115, 0, 17]


def test_a_seed_draws_what_it_draws_in_a_plain_prefill(engine):
    sampling, cache = Sampling(temperature=1.0), PrefixCache(engine, PLENTY)
    cache.prefill(request(PROMPTS[0], 8))
    requests = [request(PROMPTS[1], 8, sampling, seed) for seed in range(6)]
    tokens = [int(cache.prefill(one).token[0]) for one in requests]
    assert tokens == [int(engine.prefill(one).token[0]) for one in requests]
    assert len(set(tokens)) > 1


def test_the_budget_holds_and_the_least_recently_used_is_removed_first(engine):
    slot = 2 * DECODER.num_hidden_layers * DECODER.num_key_value_heads * DECODER.head_dim * 4
    recording = Recording(engine.model)
    cache = PrefixCache(recording, 2 * 64 * slot)  # two prompts of up to 64 tokens
    first, second, third = (random_ids(seed, 40) for seed in (10, 11, 12))
    for prompt in (first, second, first, third):  # the first is used once more before the third comes
        cache.prefill(request(prompt, 4))
        assert cache.nbytes <= 2 * 64 * slot
    cache.prefill(request([*second, 1], 4))
    cache.prefill(request([*third, 1], 4))
    assert recording.reused[-2:] == [0, 40]
    recording = Recording(engine.model)
    nothing = PrefixCache(recording, 0)
    for _ in range(2):
        assert written(engine, nothing.prefill(request(first, 4))) == alone(engine, first, 4)
    assert nothing.nbytes == 0 and recording.reused == [0, 0]


def test_what_no_engine_can_prefill_is_refused(engine):
    cache = PrefixCache(engine, PLENTY)
    with pytest.raises(UserError, match="no tokens"):
        cache.prefill(request([], 4))
    with pytest.raises(UserError, match="context of 512"):
        cache.prefill(request(random_ids(0, 510), 4))
