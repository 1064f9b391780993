"""Make the linear layers of a model trainable: whole, or by low-rank adapters (LoRA, Hu et al. 2021, arXiv:2106.09685).

Letters: M width of the input, O outputs, r rank of an adapter.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float

from rag.models.adapters import Factors
from rag.models.checkpoint import dotted
from rag.models.layers import Linear
from rag.ops.linear import low_rank_linear, rounded_linear


class AdapterParam(nnx.Param):
    """A parameter of an adapter, to tell it from those of the base model."""


class Adapter(nnx.Module):
    """The low-rank change of a weight: x -> scale * b^T a x.

    `a` [r, M] and `b` [r, O] are what PEFT names lora_A and the transpose of lora_B; `scale` is alpha / r.
    """

    def __init__(self, width: int, outputs: int, rank: int, alpha: float, key: Array):
        bound = width**-0.5  # as PEFT initialises: uniform, of variance 1 / (3 M)
        self.a = AdapterParam(jax.random.uniform(key, (rank, width), minval=-bound, maxval=bound))
        self.b = AdapterParam(jnp.zeros((rank, outputs)))
        self.scale = alpha / rank


class TrainableLinear(nnx.Module):
    """A Linear whose products, forward and backward, run in `dtype`, plus an adapter's in float32 where it has one.

    Beside an adapter the weight is not trained, and is stored in `dtype`.
    """

    def __init__(self, linear: Linear, adapter: Adapter | None, dtype: str):
        weight = linear.weight[...]
        self.weight = nnx.Param(weight if adapter is None else weight.astype(dtype))
        self.bias, self.adapter, self.dtype = linear.bias, nnx.data(adapter), dtype

    def __call__(self, x: Float[Array, "*batch M"]) -> Float[Array, "*batch O"]:
        rows, low = x.reshape(-1, x.shape[-1]), self.adapter
        y = rounded_linear(rows, self.weight[...], self.dtype)
        if low is not None:
            y = y + low_rank_linear(rows, low.a[...], low.scale * low.b[...])
        if self.bias is not None:
            y = y + self.bias[...]
        return y.reshape(*x.shape[:-1], -1)


def make_trainable(layers: nnx.Module, rank: int, alpha: float, dtype: str, seed: int) -> None:
    """Replace every Linear in the layers of a model by a TrainableLinear, in place; rank 0 is no adapter."""
    key = jax.random.key(seed)
    linears = [
        (parent, name, child)
        for _, parent in nnx.iter_modules(layers)
        for name, child in vars(parent).items()
        if type(child) is Linear
    ]
    for n, (parent, name, linear) in enumerate(linears):
        outputs, width = linear.weight[...].shape
        adapter = Adapter(width, outputs, rank, alpha, jax.random.fold_in(key, n)) if rank else None
        setattr(parent, name, TrainableLinear(linear, adapter, dtype))


def adapter_factors(parameters: nnx.State) -> dict[str, Factors]:
    """Return the factors of each layer's adapter by the path of the layer, as LoraAdapter has them."""
    values = {path: np.asarray(leaf[...]) for path, leaf in nnx.to_flat_state(parameters)}
    return {
        dotted(path[:-2]): (a, values[(*path[:-1], "b")]) for path, a in values.items() if path[-1] == "a"
    }
