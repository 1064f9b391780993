"""The engine against the plain definition of decoding: feed everything again for each token."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.generate.engine import Decoding, Engine
from rag.models.checkpoint import quantized
from rag.models.llama.model import forward, logits
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_prompt
from rag.types import UserError
from tests.tiny import CONFIG, tiny_model

whole = jax.jit(forward)

PROMPTS = [[5, 9, 200, 31, 7], [1], list(range(40, 120)), [250, 3, 3, 8, 90, 41]]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


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
    assert [engine.generate([prompt], 20)[0] for prompt in PROMPTS] == expected


def test_a_batch_of_different_lengths_gives_the_same_tokens(model, expected):
    assert Engine(model, ()).generate(PROMPTS, 20) == expected


def test_tokens_vary(expected):
    assert len({token for row in expected for token in row}) > 10


@pytest.mark.parametrize("budget", [1, 2, 5, 20])
def test_the_budget_is_exact(model, expected, budget):
    made = Engine(model, (), steps_per_dispatch=4).generate(PROMPTS, budget)
    assert made == [row[:budget] for row in expected]


def test_an_end_token_ends_its_row_alone_and_is_left_out(model, expected):
    end = expected[0][6]
    cut = [row[: row.index(end)] if end in row else row for row in expected]
    assert len(cut[0]) <= 6
    assert Engine(model, (end,)).generate(PROMPTS, 20) == cut


def test_finish_ends_a_row_and_leaves_the_others(model, expected):
    decoding = Engine(model, (), steps_per_dispatch=2).start(PROMPTS[:2], 20)
    made = [[], []]
    for new in decoding:
        for row, tokens in zip(made, new, strict=True):
            row.extend(tokens)
        if len(made[0]) == 5:
            decoding.finish(0)
    assert made == [expected[0][:5], expected[1]]


def test_sampling_depends_on_the_seed_and_not_on_the_batch_or_the_dispatch(model):
    options = Sampling(temperature=1.0, top_p=0.95)
    prompts, seeds = PROMPTS[:2], [1, 2]
    batch = Engine(model, ()).generate(prompts, 12, options, seeds)
    alone = [
        Engine(model, (), steps_per_dispatch=1).generate([prompt], 12, options, seeds=[seed])[0]
        for prompt, seed in zip(prompts, seeds, strict=True)
    ]
    assert batch == alone
    assert Engine(model, ()).generate(prompts, 12, options, seeds=[9, 2])[0] != batch[0]


def test_repetition_penalty_forbids_what_was_seen(model):
    [made] = Engine(model, ()).generate([PROMPTS[0]], 30, Sampling(repetition_penalty=1e6))
    assert len(set(made)) == len(made)
    assert not set(made) & set(PROMPTS[0])


def test_the_cache_is_donated(model):
    engine = Engine(model, ())
    state = engine.prefill([[1, 2, 3, 4]], 9)
    engine.decode(state, Sampling())
    assert state.cache.keys[0].is_deleted()


def test_unrolled_steps_write_what_a_loop_writes(model, expected):
    engine = Engine(model, (), steps_per_dispatch=3)
    engine.loop = False
    assert engine.generate(PROMPTS, 20) == expected


def test_an_int8_model_is_the_float_model_of_its_rounded_weights():
    small, rounded = quantized(tiny_model()), tiny_model()
    for (_, layer), (_, plain) in zip(nnx.iter_modules(small), nnx.iter_modules(rounded), strict=True):
        if getattr(layer, "scale", None) is not None:
            plain.weight = nnx.Param(layer.weight[...] * layer.scale[...][:, None])
    tokens, start = jnp.asarray([PROMPTS[2]], jnp.int32), jnp.zeros(1, jnp.int32)
    want, got = (logits(m, whole(m, tokens, start)[0][0]) for m in (rounded, small))
    assert np.abs(got - want).max() < 1e-2 * np.abs(want).max()
    engine = Engine(small, ())
    assert not engine.loop and engine.steps_per_dispatch == 1
    assert engine.generate(PROMPTS, 8) == [engine.generate([prompt], 8)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("fresh", [[79], [3, 4, 50, 79], list(range(40, 80)), list(range(80))])
def test_a_resumed_prompt_writes_what_a_prefilled_one_writes(model, expected, fresh):
    """Whichever tokens are read behind the others: here exact, because the others were read in full."""
    engine, prompt = Engine(model, ()), PROMPTS[2]
    cache = engine.prefill([prompt], 20).cache
    holes = jax.tree.map(lambda a: a.at[:, :, jnp.asarray(fresh)].set(7.0), cache)
    state = engine.resume(holes, prompt, fresh, 20)
    np.testing.assert_allclose(state.cache.values[1][:, :, :80], cache.values[1][:, :, :80], atol=2e-5)
    assert [token for [made] in Decoding(engine, state, Sampling()) for token in made] == expected[2]


def test_a_prompt_is_resumed_up_to_its_last_token_in_a_cache_of_its_size(model):
    engine = Engine(model, ())
    cache = engine.prefill([[1, 2, 3]], 5).cache
    with pytest.raises(ValueError, match="last token must be fresh"):
        engine.resume(cache, [1, 2, 3], [1], 5)
    with pytest.raises(ValueError, match=r"Engine\.capacity"):
        engine.resume(cache, [1, 2, 3], [2], 500)


def test_a_cached_forward_equals_the_whole_one(model):
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, CONFIG.vocab_size, (2, 24)), jnp.int32)
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
    ("prompts", "budget", "message"),
    [
        ([[1, 2]], 0, "at least one token"),
        ([[1], []], 4, "no tokens"),
        ([], 4, "no tokens"),
        ([[1] * 500], 13, "exceed the model's context of 512"),
    ],
)
def test_what_cannot_be_decoded_is_told(model, prompts, budget, message):
    with pytest.raises(UserError, match=message):
        Engine(model, ()).generate(prompts, budget)
