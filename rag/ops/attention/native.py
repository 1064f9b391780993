"""Flash attention in C++ (rag.native), forward and backward, for float32 on a CPU.

Letters: T query tokens, S key tokens, D head dim, G query heads of a kv head, P pairs of a batch row and a kv head.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32

from rag import native
from rag.ops.attention.flash import blockwise
from rag.ops.attention.mask import MaskArguments, Segments, key_range
from rag.ops.attention.options import AttentionOptions
from rag.ops.attention.tiles import Plan


def unsupported(q: Array, k: Array, v: Array, return_lse: bool) -> str | None:
    """Return why these arguments are not supported, or None; see rag.ops.attention.Implementation."""
    float32 = all(x.dtype == jnp.float32 for x in (q, k, v))
    if float32 and q.shape[3] <= native.MOST_DIM and native.available():
        return None
    return f"Native attention takes float32 up to {native.MOST_DIM} wide, where native.available()."


@partial(jax.jit, static_argnames="options")
def attend(
    q: Float32[Array, "B H T D"],
    k: Float32[Array, "B K S D"],
    v: Float32[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
    """Return the output and the log-sum-exp of the scores; see rag.ops.attention.Implementation.

    Lowering fails for any platform but the CPU.
    """
    return blockwise(_forward, _backward, q, k, v, mask_arguments, options)


def _forward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    return native.attention(q, k[:, None], v[:, None], *_mask(plan, mask_arguments), plan.options.scale)


def _backward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
    results: tuple[Float[Array, "P G T D"], Float[Array, "P G T"]],
    cotangents: tuple[Float[Array, "P G T D"], Float[Array, "P G T"]],
) -> tuple[Float[Array, "P G T D"], Float[Array, "P S D"], Float[Array, "P S D"]]:
    k, v, mask = k[:, None], v[:, None], _mask(plan, mask_arguments)
    dq, dk, dv = native.attention_backward(q, k, v, *mask, plan.options.scale, results, cotangents)
    return dq, dk[:, 0], dv[:, 0]


def _mask(plan: Plan, mask_arguments: MaskArguments) -> tuple[Array, Array, Segments | None]:
    first, past = key_range(plan.options, mask_arguments.q_positions, mask_arguments.kv_length)
    return first, past, mask_arguments.segments
