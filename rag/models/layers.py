"""Define what the model families share: the linear layer, heads, int8 weights, and the repetition of a layer's shapes.

Letters: B batch, T tokens, H heads, D head dim, HD = H x D, M width of the input, O outputs.
"""

from typing import TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Float32, Int8

from rag import native
from rag.ops.linear import linear, quantize

M = TypeVar("M", bound=nnx.Module)


class WeightLayer(nnx.Module):
    """A layer with a weight that can become int8, and then has a scale for each of its rows."""

    weight: nnx.Param
    scale: nnx.Param | None

    @property
    def int8(self) -> tuple[Int8[Array, "O M"], Float32[Array, "O"]]:
        """Return the int8 weight and its scale."""
        assert self.scale is not None, "the weight is not int8"
        return self.weight[...], self.scale[...]


class Linear(WeightLayer):
    """weight [O, M], bias [O] or None, and a scale [O] once the weight is int8.

    The input is rounded to the dtype of a float weight, such as bfloat16; the output has the input's dtype.
    """

    def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs, *, bias: bool = True):
        self.weight = nnx.Param(size_in**-0.5 * jax.random.normal(rngs(), (size_out, size_in)))
        self.bias = nnx.Param(jnp.zeros(size_out)) if bias else None
        self.scale = nnx.data(None)
        self.native = False  # whether rag.native multiplies by an int8 weight

    def __call__(self, x: Float[Array, "*batch M"]) -> Float[Array, "*batch O"]:
        weight, bias = self.weight[...], None if self.bias is None else self.bias[...]
        if self.scale is not None:
            return linear(x, weight, bias, self.scale[...], by_native=self.native)
        return linear(x.astype(weight.dtype), weight, bias).astype(x.dtype)


def split_heads(x: Float[Array, "B T HD"], heads: int) -> Float[Array, "B H T D"]:
    """Return the output of a projection with its heads in front of the tokens, as attention takes them."""
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(0, 2, 1, 3)


def join_heads(x: Float[Array, "B H T D"]) -> Float[Array, "B T HD"]:
    """Return the output of attention with the heads of each token side by side: the inverse of `split_heads`."""
    b, _, t, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, t, -1)


def quantize_weights(module: M) -> M:
    """Make the weight of every WeightLayer int8 (rag.ops.linear.quantize), and return the module."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, WeightLayer):
            values, scale = quantize(jnp.asarray(layer.weight[...]))
            layer.weight, layer.scale = nnx.Param(values), nnx.Param(scale)
    return module


def multiply_natively(module: nnx.Module) -> None:
    """Let rag.native multiply by the module's int8 weights where it is the faster way."""
    for _, layer in nnx.iter_modules(module):
        if isinstance(layer, Linear) and layer.scale is not None:
            layer.native = native.has_tiles(layer.weight.shape[1])


def repeat_layer(layer: M, count: int) -> nnx.List:
    """Return `count` abstract copies of a layer: copying shapes is much faster than tracing every layer."""
    return nnx.List([jax.tree.map(lambda shape: shape, layer) for _ in range(count)])
