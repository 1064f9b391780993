"""Attention by jax.nn.dot_product_attention, on accelerators the fastest while the scores fit into memory.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, D head dim.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from rag.ops.attention.mask import MaskArguments, tile_mask
from rag.ops.attention.options import AttentionOptions


def unsupported(q: Array, k: Array, v: Array, return_lse: bool) -> str | None:
    """Return why these arguments are not supported, or None; see rag.ops.attention.Implementation."""
    return "jax.nn.dot_product_attention returns no log-sum-exp." if return_lse else None


@partial(jax.jit, static_argnames="options")
def attend(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float[Array, "B H T D"], None]:
    """Return the output in q's dtype, and None for the log-sum-exp, which jax.nn does not compute; see Implementation.

    It always gets our mask: its own `is_causal` puts the first query at the first key, which is wrong behind a
    cache, and to a fully masked row it gives the mean of all values.
    """
    mask = tile_mask(options, mask_arguments, (0, q.shape[2]), (0, k.shape[2]))  # b T S
    q, k, v = (x.swapaxes(1, 2) for x in (q, k.astype(q.dtype), v.astype(q.dtype)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=options.scale)
    return jnp.where(mask.any(axis=-1)[:, None, :, None], out.swapaxes(1, 2), 0), None
