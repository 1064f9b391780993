"""Int8 weights: the error of rounding, that digits add none, and that the compiled program is the fast one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag import native
from rag.ops import linear as module
from rag.ops.linear import linear, quantize

WIDTH, OUTPUTS = 96, 160


@pytest.fixture(scope="module")
def weight():
    return jnp.asarray(np.random.default_rng(0).standard_normal((OUTPUTS, WIDTH)), jnp.float32)


def rows_of(count, seed=1):
    x = np.random.default_rng(seed).standard_normal((count, WIDTH)).astype(np.float32)
    x[:, 3] *= 50  # one large entry, as transformers have them: one digit would leave little of the others
    return x


def test_quantisation_is_within_half_a_step_and_keeps_zeros(weight):
    weight = weight.at[5].set(0.0)
    values, scale = quantize(weight)
    assert values.dtype == jnp.int8 and np.abs(values).max() == 127
    assert (np.abs(values * scale[:, None] - weight) <= scale[:, None] * 0.5001).all()
    assert not np.any(values[5]) and scale[5] == 0


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",), ("avx512_vnni", "amx_bf16")])
@pytest.mark.parametrize("rows", [1, 2, 32, 33, 128, 129])
def test_every_path_multiplies_by_the_rounded_weight(weight, rows, flags, monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: flags)
    module._multiplies.cache_clear()
    values, scale = quantize(weight)
    x = rows_of(rows)
    want = x.astype(np.float64) @ (np.asarray(values, np.float64) * np.asarray(scale, np.float64)[:, None]).T
    error = np.abs(jax.jit(lambda x: linear(x, values, None, scale))(x) - want).max() / np.abs(want).max()
    coarse = rows > 128 and "amx_bf16" in flags
    assert error < (1e-2 if coarse else 2e-4)
    module._multiplies.cache_clear()


def test_bias_and_leading_dimensions(weight):
    values, scale = quantize(weight)
    x, bias = jnp.asarray(rows_of(6)).reshape(2, 3, WIDTH), jnp.arange(OUTPUTS, dtype=jnp.float32)
    got = linear(x, values, bias, scale)
    np.testing.assert_allclose(
        got.reshape(6, -1), linear(x.reshape(6, WIDTH), values, None, scale) + bias, atol=1e-4
    )
    assert got.shape == (2, 3, OUTPUTS)


def test_zeros_and_tiny_rows_stay_finite(weight):
    values, scale = quantize(weight)
    x = jnp.zeros((3, WIDTH)).at[1].set(1e-42)
    assert not np.any(linear(x, values, None, scale))


@pytest.mark.parametrize("batch", [3, 8, 31])
def test_a_row_does_not_depend_on_its_neighbours(weight, batch, monkeypatch):
    monkeypatch.setattr(module, "cpu_flags", lambda: ("avx512_vnni",))
    module._multiplies.cache_clear()
    values, scale = quantize(weight)
    together = jax.jit(lambda x: linear(x, values, None, scale))
    x = rows_of(batch)
    alone = np.concatenate([together(row[None]) for row in x])
    np.testing.assert_array_equal(together(x), alone)
    module._multiplies.cache_clear()


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="what XLA:CPU compiles to")
@pytest.mark.parametrize("rows", [1, 4, 100])
def test_few_rows_compile_to_int8_products_and_no_converted_weight(weight, rows, monkeypatch):
    """A weight converted to float32 before the product is the slow path: 25 times, for four rows."""
    monkeypatch.setattr(module, "cpu_flags", lambda: ("avx512_vnni",))
    module._multiplies.cache_clear()
    values, scale = quantize(weight)
    program = jax.jit(lambda x, values: linear(x, values, None, scale))
    text = program.lower(rows_of(rows), values).compile().as_text()
    assert f"s32[{2 * rows if rows <= 32 else rows},{OUTPUTS}]" in text
    assert f"f32[{OUTPUTS},{WIDTH}]" not in text
    module._multiplies.cache_clear()


@pytest.mark.parametrize("rows", [1, 20, 200])
def test_a_product_for_an_accelerator_calls_no_native_code(weight, rows):
    values, scale = quantize(weight)
    program = jax.jit(lambda x: linear(x, values, None, scale, by_native=native.available()))
    traced = program.trace(rows_of(rows))
    assert "rag_linear" not in traced.lower(lowering_platforms=("cuda",)).as_text()
    assert ("rag_linear" in traced.lower(lowering_platforms=("cpu",)).as_text()) == native.available()
