"""Weight tables are strict, and modules come back from files, devices and huge pages with the same parameters."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag.models import checkpoint, conversion_cache, layers, placement
from rag.models.checkpoint import Rule
from rag.types import UserError


class Block(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((3, 2)))


class Toy(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Block(), Block()])
        self.norm = nnx.Param(jnp.zeros(5))


TABLE = (Rule("blk.{i}.w", "layers.{i}.weight", np.negative), Rule("n", "norm"), Rule("buffer.{i}", None))


@pytest.fixture
def tensors():
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    return {"blk.0.w": values[0], "blk.1.w": values[1], "n": np.ones(5, np.float32), "buffer.7": np.zeros(1)}


@pytest.fixture
def toy():
    return nnx.eval_shape(Toy)


def test_fill_maps_names_and_transforms(toy, tensors):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    np.testing.assert_array_equal(filled.layers[1].weight[...], -tensors["blk.1.w"])
    np.testing.assert_array_equal(filled.norm[...], tensors["n"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("n"), "1 missing .norm."),
        (lambda t: t.update(extra=np.zeros(1)), "1 unknown .extra."),
        (lambda t: t.update({"blk.2.w": np.zeros((3, 2))}), "unknown .layers.2.weight."),
        (lambda t: t.update(n=np.zeros(4, np.float32)), r"shape \(4,\)"),
        (lambda t: t.update(n_=np.zeros(5)), "unknown .n_."),
    ],
)
def test_fill_is_strict(toy, tensors, change, message):
    change(tensors)
    with pytest.raises(UserError, match=message):
        checkpoint.fill(toy, tensors, TABLE, "toy")


def test_copied_layers_are_what_tracing_each_gives(toy, tensors):
    copied = nnx.eval_shape(Toy)
    copied.layers = layers.repeat_layer(copied.layers[0], 2)
    assert nnx.split(copied)[0] == nnx.split(toy)[0]
    filled = checkpoint.fill(copied, tensors, TABLE, "toy")  # every layer has its own parameters
    np.testing.assert_array_equal(filled.layers[0].weight[...], -tensors["blk.0.w"])
    np.testing.assert_array_equal(filled.layers[1].weight[...], -tensors["blk.1.w"])


def test_saved_parameters_come_back_memory_mapped(toy, tensors, tmp_path):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    conversion_cache.save_module(filled, tmp_path)
    loaded = conversion_cache.load_module(toy, tmp_path)
    assert isinstance(loaded.norm.get_value(), np.memmap)
    on_device = placement.to_device(loaded, jnp.dtype("bfloat16"))
    assert on_device.norm[...].dtype == jnp.bfloat16
    for a, b in zip(
        jax.tree.leaves(filled),
        jax.tree.leaves(placement.to_device(loaded, jnp.dtype("float32"))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_huge_pages_hold_the_same(toy, tensors):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    copied = placement.in_huge_pages(filled)
    for new, old in zip(jax.tree.leaves(copied), jax.tree.leaves(filled), strict=True):
        np.testing.assert_array_equal(new, old)
        assert new is not old and new.ctypes.data % 64 == 0
    assert jax.tree.structure(copied) == jax.tree.structure(filled)
