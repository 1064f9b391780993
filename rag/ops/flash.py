"""Flash attention in lax: blocks of keys pass by blocks of queries, the softmax is normalised on the way.

The online softmax is Milakov & Gimelshein 2018 (arXiv:1805.02867), its use for attention in linear memory
Rabe & Staats 2021 (arXiv:2112.05682), the blocking and the backward pass that recomputes the scores from the
saved log-sum-exp Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691).

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim,
P = B K pairs of a batch row and a kv head, R = G block_q query rows (a kv head's query heads folded into one
matrix, so K and V are never repeated), C = block_k key columns, N key blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag.ops.visibility import Extent, KeyBlocks, Pattern, key_blocks, visible

# Finite, so that no difference of two of them is NaN. The running maximum starts at half of it: then the
# exponential of a masked score is 0 even in a row that has seen no key yet.
_MASKED = -1e30


@dataclass(frozen=True, slots=True)
class Blocks:
    """Query tokens and key tokens of a tile. A tile holds G x q x k scores per kv head."""

    q: int = 128
    k: int = 128


def flash_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    pattern: Pattern,
    extent: Extent,
    scale: float,
    blocks: Blocks,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Softmax attention without the T x S matrix; both results are differentiable in q, k and v.

    Returns the output in q's dtype and the float32 log-sum-exp of each row's scaled scores (-inf where
    nothing is visible). Products accumulate in float32. The memory beside the results is of the order of
    the inputs, forward and backward.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads = k.shape[1]
    blocks = Blocks(min(blocks.q, tokens), min(blocks.k, k.shape[2]))
    rows = (q.astype(jnp.float32) * scale).reshape(batch * kv_heads, heads // kv_heads, tokens, dim)
    rows = _pad(rows, blocks.q, axis=2)
    k, v = (_pad(x.reshape(batch * kv_heads, -1, dim), blocks.k, axis=1) for x in (k, v))
    out, lse = _flash(pattern, blocks, rows, k, v, _pad_segments(extent, blocks))
    out = out[:, :, :tokens].reshape(batch, heads, tokens, dim)
    return out.astype(q.dtype), lse[:, :, :tokens].reshape(batch, heads, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _flash(
    pattern: Pattern,
    blocks: Blocks,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    extent: Extent,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    """Output and log-sum-exp, float32; q is scaled, T and S are multiples of the blocks."""
    groups, tokens, dim = q.shape[1:]

    def query_block(i: Int[Array, ""]) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
        q_i = _rows(q, i, blocks.q)

        def step(j: Int[Array, ""], carry: tuple, masked: bool) -> tuple:
            scores = _scores(pattern, blocks, extent, q_i, k, (i, j), masked)
            return _absorb(carry, scores, _columns(v, j, blocks.k))

        p, r, _ = q_i.shape
        carry = jnp.zeros((p, r, dim)), jnp.full((p, r), _MASKED / 2), jnp.zeros((p, r))
        return _normalise(*_sweep(key_blocks(pattern, extent, i, blocks.q, blocks.k), step, carry))

    with jax.named_scope("flash_forward"):
        out, lse = lax.map(query_block, jnp.arange(tokens // blocks.q))
    return _unblock(out, groups), _unblock(lse, groups)


def _absorb(
    carry: tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]],
    scores: Float[Array, "P R C"],
    v: Float[Array, "P C D"],
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]]:
    """The online softmax: one more block of scores into (accumulator, maximum, denominator)."""
    acc, top, total = carry
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = jnp.exp(scores - new_top[..., None])
    shrink = jnp.exp(top - new_top)
    acc = acc * shrink[..., None] + jnp.einsum("prc,pcd->prd", weights, v)
    return acc, new_top, total * shrink + weights.sum(axis=-1)


def _normalise(
    acc: Float[Array, "P R D"], top: Float[Array, "P R"], total: Float[Array, "P R"]
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
    """Divide once at the end; a row that saw nothing gives zeros and -inf."""
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    return acc / total[..., None], jnp.where(seen, top + jnp.log(total), -jnp.inf)


def _forward(pattern: Pattern, blocks: Blocks, q: Array, k: Array, v: Array, extent: Extent) -> tuple:
    out, lse = _flash(pattern, blocks, q, k, v, extent)
    return (out, lse), (q, k, v, extent, out, lse)


def _backward(pattern: Pattern, blocks: Blocks, saved: tuple, cotangents: tuple) -> tuple:
    """Recompute each tile's weights from the saved log-sum-exp and sum the three gradients.

    With w = exp(s - lse) and s = q.k: dv = w^T dout, ds = w * (dout v^T - delta), dq = ds k, dk = ds^T q,
    where delta = rowsum(dout * out) - dlse. The sum of dk and dv over G is inside the folded rows.
    """
    q, k, v, extent, out, lse = saved
    dout, dlse = cotangents
    seen = lse > -jnp.inf
    delta = jnp.where(seen, (dout * out).sum(axis=-1) - dlse, 0.0)
    lse = jnp.where(seen, lse, 0.0)  # exp(_MASKED - 0) is 0: an empty row takes no part

    def query_block(sums: tuple, i: Int[Array, ""]) -> tuple:
        q_i, dout_i, lse_i, delta_i = (_rows(x, i, blocks.q) for x in (q, dout, lse, delta))

        def step(j: Int[Array, ""], carry: tuple, masked: bool) -> tuple:
            dq, dk, dv = carry
            scores = _scores(pattern, blocks, extent, q_i, k, (i, j), masked)
            weights = jnp.exp(scores - lse_i[..., None])
            dweights = jnp.einsum("prd,pcd->prc", dout_i, _columns(v, j, blocks.k))
            dscores = weights * (dweights - delta_i[..., None])
            dv = _add_block(dv, j, jnp.einsum("prd,prc->pdc", dout_i, weights))
            dk = _add_block(dk, j, jnp.einsum("prd,prc->pdc", q_i, dscores))
            return dq + jnp.einsum("prc,pcd->prd", dscores, _columns(k, j, blocks.k)), dk, dv

        ranges = key_blocks(pattern, extent, i, blocks.q, blocks.k)
        dq, dk, dv = _sweep(ranges, step, (jnp.zeros_like(q_i), *sums))
        return (dk, dv), dq

    p, s, dim = k.shape
    # Transposed, N P D C: on XLA:CPU "prd,prc->pdc" is 1.8x as fast as "prc,prd->pcd".
    zeros = jnp.zeros((s // blocks.k, p, dim, blocks.k))
    with jax.named_scope("flash_backward"):
        (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(q.shape[2] // blocks.q))
    dk, dv = (x.transpose(1, 0, 3, 2).reshape(p, s, dim) for x in (dk, dv))
    return _unblock(dq, q.shape[1]), dk.astype(k.dtype), dv.astype(v.dtype), None


_flash.defvjp(_forward, _backward)


def _sweep(ranges: KeyBlocks, step: Callable[..., Any], carry: Any) -> Any:
    """Pass over the key blocks; the bounds are traced, so blocks that nobody sees cost nothing."""
    carry = lax.fori_loop(ranges.start, ranges.full_start, partial(step, masked=True), carry)
    carry = lax.fori_loop(ranges.full_start, ranges.full_stop, partial(step, masked=False), carry)
    return lax.fori_loop(ranges.full_stop, ranges.stop, partial(step, masked=True), carry)


def _scores(
    pattern: Pattern,
    blocks: Blocks,
    extent: Extent,
    q_i: Float[Array, "P R D"],
    k: Float[Array, "P S D"],
    tile: tuple[Int[Array, ""], Int[Array, ""]],
    masked: bool,
) -> Float[Array, "P R C"]:
    i, j = tile
    scores = jnp.einsum("prd,pcd->prc", q_i, _columns(k, j, blocks.k))
    if not masked:
        return scores
    mask = visible(pattern, extent, (i * blocks.q, blocks.q), (j * blocks.k, blocks.k))
    b, t, c = mask.shape
    by_head = scores.reshape(b, -1, t, c)  # b is 1 or B: the mask is one for all heads
    return jnp.where(mask[:, None], by_head, _MASKED).reshape(scores.shape)


def _rows(x: Float[Array, "P G T *D"], i: Int[Array, ""], size: int) -> Float[Array, "P R *D"]:
    """Query block i, its G heads folded into rows."""
    block = lax.dynamic_slice_in_dim(x, i * size, size, axis=2)
    return block.reshape(x.shape[0], x.shape[1] * size, *x.shape[3:])


def _columns(x: Float[Array, "P S D"], j: Int[Array, ""], size: int) -> Float[Array, "P C D"]:
    """Key block j, in float32 whatever the cache holds."""
    return lax.dynamic_slice_in_dim(x, j * size, size, axis=1).astype(jnp.float32)


def _add_block(
    sums: Float[Array, "N P D C"], j: Int[Array, ""], x: Float[Array, "P D C"]
) -> Float[Array, "N P D C"]:
    old = lax.dynamic_index_in_dim(sums, j, keepdims=False)
    return lax.dynamic_update_index_in_dim(sums, old + x, j, axis=0)


def _unblock(x: Float[Array, "n P R *D"], groups: int) -> Float[Array, "P G T *D"]:
    """Stacked query blocks back to G heads of T tokens."""
    n, p, r, *rest = x.shape
    x = jnp.moveaxis(x.reshape(n, p, groups, r // groups, *rest), 0, 2)
    return x.reshape(p, groups, n * (r // groups), *rest)


def _pad(x: Array, multiple: int, axis: int, value: int = 0) -> Array:
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, constant_values=value)


def _pad_segments(extent: Extent, blocks: Blocks) -> Extent:
    if extent.q_segments is None:
        return extent
    return extent._replace(
        q_segments=_pad(extent.q_segments, blocks.q, axis=1, value=-1),
        kv_segments=_pad(extent.kv_segments, blocks.k, axis=1, value=-1),
    )
