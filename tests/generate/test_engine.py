"""The engine against the plain definition of decoding: feed everything again for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.generate.engine import Engine
from rag.models.layers import quantize_weights
from rag.models.llama.model import forward, logits
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_prompt
from rag.types import UserError
from tests.generate.decode import alone, answer, batch, request, together, written
from tests.tiny_models import DECODER, tiny_decoder

whole = jax.jit(forward)

PROMPTS = [[5, 9, 200, 31, 7], [1], list(range(40, 120)), [250, 3, 3, 8, 90, 41]]


@pytest.fixture(scope="module")
def model():
    return tiny_decoder()


def by_definition(model, prompt, new_tokens, end_ids=()):
    """Greedy tokens, each from a forward over the whole text so far; padded on the right to share one shape."""
    ids, made = list(prompt), []
    for _ in range(new_tokens):
        padded = jnp.array([ids + [0] * (128 - len(ids))], jnp.int32)
        hidden, _ = whole(model, padded, jnp.zeros(1, jnp.int32))
        token = int(logits(model, hidden[:, len(ids) - 1]).argmax())
        if token in end_ids:
            break
        ids.append(token)
        made.append(token)
    return made


@pytest.fixture(scope="module")
def expected(model):
    return [by_definition(model, prompt, 20) for prompt in PROMPTS]


@pytest.mark.parametrize("steps", [1, 4, 32])
def test_greedy_tokens_alone_equal_the_definition(model, expected, steps):
    engine = Engine(model, (), steps_per_dispatch=steps)
    assert [alone(engine, prompt, 20) for prompt in PROMPTS] == expected


def test_a_batch_of_different_lengths_gives_the_same_tokens(model, expected):
    assert batch(Engine(model, ()), PROMPTS, 20) == expected


def test_tokens_vary(expected):
    assert len({token for row in expected for token in row}) > 10


@pytest.mark.parametrize("budget", [1, 2, 5, 20])
def test_the_budget_is_exact(model, expected, budget):
    made = batch(Engine(model, (), steps_per_dispatch=4), PROMPTS, budget)
    assert made == [row[:budget] for row in expected]


def test_an_end_token_ends_its_row_alone_and_is_left_out(model, expected):
    end = expected[0][6]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len(cut[0]) <= 6
    assert batch(Engine(model, (end,)), PROMPTS, 20) == cut


def test_sampling_depends_on_the_seed_and_not_on_the_batch_or_the_dispatch(model):
    options = Sampling(temperature=1.0, top_p=0.95)
    requests = [request(prompt, 12, options, seed) for seed, prompt in enumerate(PROMPTS[:2], 1)]
    made = together(Engine(model, ()), requests)
    single = Engine(model, (), steps_per_dispatch=1)
    assert made == [answer(single, one) for one in requests]
    assert alone(Engine(model, ()), PROMPTS[0], 12, options, seed=9) != made[0]


def test_repetition_penalty_forbids_what_was_seen(model):
    made = alone(Engine(model, ()), PROMPTS[0], 30, Sampling(repetition_penalty=1e6))
    assert len(set(made)) == len(made)
    assert not set(made) & set(PROMPTS[0])


def test_the_cache_is_donated(model):
    engine = Engine(model, ())
    state = engine.prefill(request([1, 2, 3, 4], 9))
    engine.decode(state, Sampling())
    assert state.cache.keys[0].is_deleted()


def test_unrolled_steps_write_what_a_loop_writes(model, expected):
    engine = Engine(model, (), steps_per_dispatch=3)
    engine.loop = False
    assert batch(engine, PROMPTS, 20) == expected


def test_an_int8_model_is_the_float_model_of_its_rounded_weights():
    small, rounded = quantize_weights(tiny_decoder()), tiny_decoder()
    for (_, layer), (_, plain) in zip(nnx.iter_modules(small), nnx.iter_modules(rounded), strict=True):
        if getattr(layer, "scale", None) is not None:
            plain.weight = nnx.Param(layer.weight[...] * layer.scale[...][:, None])
    tokens, start = jnp.asarray([PROMPTS[2]], jnp.int32), jnp.zeros(1, jnp.int32)
    want, got = (logits(m, whole(m, tokens, start)[0][0]) for m in (rounded, small))
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    engine = Engine(small, ())
    assert not engine.loop and engine.steps_per_dispatch == 1
    assert batch(engine, PROMPTS, 8) == [alone(engine, prompt, 8) for prompt in PROMPTS]


@pytest.mark.parametrize("fresh", [[79], [3, 4, 50, 79], list(range(40, 80)), list(range(80))])
def test_a_prefilled_suffix_gives_the_answer_of_a_whole_prefill(model, expected, fresh):
    """Whichever tokens are fresh: exact here, because the cache of the others is that of the whole prompt."""
    engine, asked = Engine(model, ()), request(PROMPTS[2], 20)
    cache = engine.prefill(asked).cache
    holes = jax.tree.map(lambda a: a.at[:, :, jnp.asarray(fresh)].set(7.0), cache)
    state = engine.prefill_suffix(holes, asked, fresh)
    np.testing.assert_allclose(state.cache.values[1][:, :, :80], cache.values[1][:, :, :80], atol=2e-5)
    assert written(engine, state) == expected[2]


def test_a_suffix_ends_with_the_last_token_and_needs_a_cache_of_its_size(model):
    engine = Engine(model, ())
    cache = engine.prefill(request([1, 2, 3], 5)).cache
    with pytest.raises(ValueError, match="last token must be fresh"):
        engine.prefill_suffix(cache, request([1, 2, 3], 5), [1])
    with pytest.raises(ValueError, match=r"Engine\.capacity"):
        engine.prefill_suffix(cache, request([1, 2, 3], 500), [2])


def test_a_cached_forward_equals_the_whole_one(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, DECODER.vocab_size, (2, 24)), jnp.int32)
    start = jnp.zeros(2, jnp.int32)
    hidden, _ = whole(model, tokens, start)
    _, cache = whole(model, tokens[:, :17], start)
    rest, _ = whole(model, tokens[:, 17:], start + 17, cache.resized(40))
    np.testing.assert_allclose(rest, hidden[:, 17:], atol=2e-5)


def test_buckets_hold_their_length_and_are_few():
    lengths = np.arange(1, 8193)
    buckets = np.array([round_up_prompt(int(n)) for n in lengths])
    assert (buckets >= lengths).all()
    assert len(set(buckets.tolist())) < 40
    assert (np.diff(buckets) >= 0).all()


@pytest.mark.parametrize(
    ("prompt", "budget", "message"),
    [
        ([1, 2], 0, "at least one token"),
        ([], 4, "no tokens"),
        ([1] * 500, 13, "500 tokens and 13 new ones exceed the model's context of 512"),
    ],
)
def test_a_request_that_cannot_be_decoded_is_an_error(model, prompt, budget, message):
    with pytest.raises(UserError, match=message):
        Engine(model, ()).check(request(prompt, budget))
