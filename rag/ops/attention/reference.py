"""Attention as the formula reads: the whole matrix of scores in float32.

In XLA it is also the fastest implementation for short sequences.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim, b is 1 or B.
P is B x K and R is G x T as one dimension each: with all dimensions spelt out, XLA:CPU first copies the whole of K
and V into another layout, which takes longer than the attention of a decode step.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32

from rag.ops.attention.mask import MASKED_SCORE, MaskArguments, tile_mask
from rag.ops.attention.options import AttentionOptions


@partial(jax.jit, static_argnames="options")
def attend(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float[Array, "B H T D"], Float32[Array, "B H T"]]:
    """Return the output in q's dtype and the log-sum-exp of the scores; see rag.ops.attention.Implementation."""
    batch, heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    pairs, rows = batch * kv_heads, heads // kv_heads * tokens
    q32 = (q.astype(jnp.float32) * options.scale).reshape(pairs, rows, dim)
    k, v = (x.astype(jnp.float32).reshape(pairs, keys, dim) for x in (k, v))
    mask = tile_mask(options, mask_arguments, (0, tokens), (0, keys))  # b T S
    scores = jnp.einsum("prd,psd->prs", q32, k).reshape(batch, heads, tokens, keys)
    scores = jnp.where(mask[:, None], scores, MASKED_SCORE)
    # At least half of MASKED_SCORE, so that the exponentials of a fully masked row are 0 and not 1.
    row_max = lax.stop_gradient(jnp.maximum(scores.max(axis=-1), MASKED_SCORE / 2))
    weights = jnp.exp(scores - row_max[..., None])
    denominator = weights.sum(axis=-1)
    visible = denominator != 0
    denominator = jnp.where(visible, denominator, 1.0)
    out = jnp.einsum("prs,psd->prd", weights.reshape(pairs, rows, keys), v).reshape(q.shape)
    out = out / denominator[..., None]
    return out.astype(q.dtype), jnp.where(visible, row_max + jnp.log(denominator), -jnp.inf)
