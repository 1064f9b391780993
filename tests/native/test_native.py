"""The C++ kernels against the same maths in JAX and NumPy."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag import native
from rag.generate.engine import Engine
from rag.models.layers import quantize_weights
from rag.models.llama import model as llama
from tests.generate.decode import alone, batch
from tests.tiny_models import DECODER, tiny_decoder

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")


# Widths that AMX tiles divide, and DECODER's, which they don't.
WIDE = replace(DECODER, hidden_size=64, intermediate_size=128, head_dim=48, vocab_size=320)
SLOTS = 96  # more than one tile of attention


@pytest.fixture
def model():
    return quantize_weights(tiny_decoder())


def filled_cache(config: llama.LlamaConfig, batch: int) -> llama.KVCache:
    rng = np.random.default_rng(0)
    shape = (batch, config.num_key_value_heads, SLOTS, config.head_dim)

    def arrays():
        count = config.num_hidden_layers
        return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float16) for _ in range(count))

    return llama.KVCache(arrays(), arrays())


@needs_compiler
@pytest.mark.parametrize("config", [DECODER, WIDE], ids=["tiny", "wide"])
@pytest.mark.parametrize(
    "positions",
    [
        [[0]],
        [[SLOTS - 1]],
        [[70], [3], [40]],  # a batch, a token each
        [[12, 13, 14]],
        [list(range(60, 69))],  # one more than a block of tokens
        [[5, 2, 80, 77, 31], [90, 0, 1, 64, 63]],  # anywhere, in any order
        [list(range(30, 94))],
    ],
    ids=lambda positions: f"{len(positions)}x{len(positions[0])}",
)
def test_tokens_through_all_layers_equal_jax(config, positions):
    model = quantize_weights(tiny_decoder(config=config))
    at, cache = np.asarray(positions, np.int32), filled_cache(config, len(positions))
    tokens = np.arange(at.size, dtype=np.int32).reshape(at.shape) * 7 % 300
    want, want_cache = jax.jit(llama.forward)(model, tokens, at, cache)
    want_logits = llama.logits(model, want[:, -1])
    llama.use_native(model)
    assert model.native
    got, got_cache = jax.jit(llama.forward)(model, tokens, at, cache)
    close(got, want)
    close(llama.logits(model, want[:, -1]), want_logits)
    for new, old in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        close(new, old)


@needs_compiler
@pytest.mark.parametrize("position", [-1, SLOTS, SLOTS + 7])
def test_a_position_outside_of_the_cache_is_refused(position):
    """It would be written in front of the cache's memory, or over its last slot."""
    model, cache = quantize_weights(tiny_decoder()), filled_cache(DECODER, 2)
    llama.use_native(model)
    at = np.asarray([[3], [position]], np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside of the cache"):
        jax.block_until_ready(jax.jit(llama.forward)(model, np.ones((2, 1), np.int32), at, cache))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_longer_than_a_call_are_read_in_blocks(rows, monkeypatch):
    monkeypatch.setattr(native, "_MOST_TOKENS", 20)
    model = quantize_weights(tiny_decoder(config=WIDE))
    tokens, starts = np.arange(rows * 40, dtype=np.int32).reshape(rows, 40), np.zeros(rows, np.int32)
    empty = jax.tree.map(lambda a: jnp.zeros_like(a[:, :, :40]), filled_cache(WIDE, rows))
    want, want_cache = jax.jit(llama.forward)(model, tokens, starts, empty)
    llama.use_native(model)
    got, got_cache = jax.jit(llama.forward)(model, tokens, starts)
    close(got, want, 5e-3)  # without AMX a prompt is read before it is rounded to float16
    for new, old in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        close(new, old, 5e-3)


def close(got, want, by: float = 2e-3) -> None:
    np.testing.assert_allclose(got, want, atol=by * np.abs(want).max())


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "width", "outputs"),
    [(1, 64, 48), (1, 50, 7), (3, 64, 33), (20, 192, 80), (70, 128, 16), (9, 128, 37)],
)
def test_products_equal_numpy(rows, width, outputs):
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, width)) * rng.exponential(size=width)).astype(np.float32)
    values = rng.integers(-127, 128, (outputs, width)).astype(np.int8)
    scale = rng.exponential(size=outputs).astype(np.float32)
    want = x.astype(np.float64) @ (values * scale[:, None].astype(np.float64)).T
    got = jax.jit(native.linear)(x, values, scale)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@needs_compiler
def test_rows_of_zeros_stay_zero():
    got = native.linear(jnp.zeros((3, 64)), jnp.ones((16, 64), jnp.int8), jnp.ones(16))
    np.testing.assert_array_equal(got, 0)


@needs_compiler
def test_decoding_writes_the_same_tokens(model):
    prompts = [[5, 9, 200, 31, 7], list(range(40, 120))]
    want = [alone(Engine(model, ()), prompt, 12) for prompt in prompts]
    llama.use_native(model)
    engine = Engine(model, ())
    assert [alone(engine, prompt, 12) for prompt in prompts] == want
    assert batch(engine, prompts, 12) == want


def test_what_it_cannot_read_is_left_to_xla():
    plain = tiny_decoder()
    llama.use_native(plain)
    assert not plain.native  # float weights
    biased = quantize_weights(llama.Llama(replace(DECODER, qkv_bias=True), nnx.Rngs(0)))
    llama.use_native(biased)
    assert not biased.native
