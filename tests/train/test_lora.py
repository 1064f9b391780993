"""Trainable linear layers: an adapter starts as nothing, and the written gradients are those of the formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.models.llama.model import forward
from rag.ops.linear import low_rank_linear, rounded_linear
from rag.train.lora import AdapterParam, TrainableLinear, make_trainable
from tests.tiny_models import tiny_decoder


def arrays(seed: int, *shapes: tuple[int, ...]) -> list[jax.Array]:
    draw = np.random.default_rng(seed).standard_normal
    return [jnp.asarray(draw(shape), jnp.float32) for shape in shapes]


@settings(max_examples=20, deadline=None)
@given(st.integers(1, 70), st.integers(1, 40), st.integers(1, 40), st.integers(1, 9))
def test_low_rank_product_and_its_gradients(rows, width, outputs, rank):
    x, a, b, dy = arrays(rows, (rows, width), (rank, width), (rank, outputs), (rows, outputs))
    y, gradients = jax.vjp(low_rank_linear, x, a, b)
    expected, plain = jax.vjp(lambda x, a, b: x @ a.T @ b, x, a, b)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-4)
    for one, other in zip(gradients(dy), plain(dy), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rounded_product_and_its_gradients(dtype):
    """All three products are those of the rounded factors, computed in float32."""
    x, weight, dy = arrays(0, (2, 33, 24), (40, 24), (2, 33, 40))

    def rounded(array: jax.Array) -> jax.Array:
        return array.astype(dtype).astype(jnp.float32)

    y, gradients = jax.vjp(lambda x, w: rounded_linear(x, w, dtype), x, weight)
    dx, dweight = gradients(dy)
    assert y.dtype == dx.dtype == dweight.dtype == jnp.float32
    np.testing.assert_allclose(y, rounded(x) @ rounded(weight).T, rtol=1e-5, atol=1e-4)
    np.testing.assert_allclose(dx, rounded(dy) @ rounded(weight), rtol=1e-5, atol=1e-4)
    by_hand = jnp.einsum("bto,btm->om", rounded(dy), rounded(x))
    np.testing.assert_allclose(dweight, by_hand, rtol=1e-5, atol=1e-3)


def test_every_linear_layer_becomes_trainable_and_starts_as_it_was():
    tokens, positions = jnp.arange(12).reshape(2, 6), jnp.zeros(2, jnp.int32)
    model = tiny_decoder()
    before, _ = forward(model, tokens, positions)
    make_trainable(model.layers, 4, 8.0, "float32", seed=0)
    layers = [module for _, module in nnx.iter_modules(model) if isinstance(module, TrainableLinear)]
    assert len(layers) == 7 * model.config.num_hidden_layers
    after, _ = forward(model, tokens, positions)
    np.testing.assert_allclose(after, before, rtol=1e-5, atol=1e-5)
    adapters = nnx.to_flat_state(nnx.state(model, AdapterParam))
    assert len(adapters) == 2 * len(layers)


def test_adapters_depend_on_the_seed_and_on_the_layer():
    def first_factors(seed: int) -> list[np.ndarray]:
        model = tiny_decoder()
        make_trainable(model.layers, 4, 8.0, "float32", seed)
        flat = nnx.to_flat_state(nnx.state(model, AdapterParam))
        return [np.asarray(leaf[...]) for path, leaf in flat if path[-1] == "a"]

    one, same, other = first_factors(0), first_factors(0), first_factors(1)
    assert all((a == b).all() for a, b in zip(one, same, strict=True))
    assert all((a != b).any() for a, b in zip(one, other, strict=True))
    assert len({a.tobytes() for a in one}) == len(one)
