"""The C++ decoder layer against the same layer in JAX."""

from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.generate.engine import Engine
from rag.models import llama
from rag.models.checkpoint import quantized
from rag.ops import native
from tests.tiny import CONFIG, tiny_model

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")


@pytest.fixture
def model():
    return quantized(tiny_model())


@needs_compiler
@pytest.mark.parametrize("position", [0, 1, 36, 63])
def test_a_token_through_all_layers_equals_jax(model, position):
    rng = np.random.default_rng(position)
    shape = (1, CONFIG.num_key_value_heads, 64, CONFIG.head_dim)
    arrays = [
        jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2 * CONFIG.num_hidden_layers)
    ]
    cache = llama.KVCache(tuple(arrays[::2]), tuple(arrays[1::2]))
    token, start = jnp.asarray([[17]], jnp.int32), jnp.asarray([position], jnp.int32)
    want, want_cache = jax.jit(llama.forward)(model, token, start, cache)
    llama.use_native(model)
    assert model.native
    got, got_cache = jax.jit(llama.forward)(model, token, start, cache)
    np.testing.assert_allclose(got, want, atol=2e-3 * np.abs(want).max())
    for new, old in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        np.testing.assert_allclose(new, old, atol=2e-3 * np.abs(old).max())


@needs_compiler
def test_decoding_writes_the_same_tokens(model):
    prompts = [[5, 9, 200, 31, 7], list(range(40, 120))]
    want = [Engine(model, ()).generate([prompt], 12)[0] for prompt in prompts]
    llama.use_native(model)
    engine = Engine(model, ())
    assert [engine.generate([prompt], 12)[0] for prompt in prompts] == want
    assert engine.generate(prompts, 12) == want  # two rows: XLA's


def test_what_it_cannot_read_is_left_to_xla():
    plain = tiny_model()
    llama.use_native(plain)
    assert not plain.native  # float weights
    biased = quantized(llama.Llama(replace(CONFIG, qkv_bias=True), nnx.Rngs(0)))
    llama.use_native(biased)
    assert not biased.native


def test_without_a_compiler_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native._library() is None


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", ("--no-such-flag",))
    assert native._library() is None
    assert not list(tmp_path.rglob("*.so"))


@needs_compiler
def test_small_numbers_stay_what_they_are():
    """A library linked with -ffast-math would flush them to zero in the whole process."""
    assert np.float32(1e-45) / np.float32(1) > 0 and np.float64(5e-324) * 1.0 > 0


@needs_compiler
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    built = native._library()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    assert built.is_file() and native._library() == built
