"""Matmul against a weight kept as checkpoints store it, one row an output.

Letters: M input width, N outputs.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


def linear(
    x: Float[Array, "*batch M"], weight: Float[Array, "N M"], bias: Float[Array, "N"] | None = None
) -> Float[Array, "*batch N"]:
    """`x @ weight.T + bias`, accumulated in float32, in x's dtype.

    The [N, M] layout is read row by row, which is also what XLA:CPU's one-row kernels are fast at.
    """
    y = jnp.einsum("...m,nm->...n", x, weight, preferred_element_type=jnp.float32)
    return (y if bias is None else y + bias).astype(x.dtype)
