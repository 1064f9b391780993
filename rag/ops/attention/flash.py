"""Flash attention in lax: blocks of keys pass by blocks of queries, the softmax is normalised on the way.

The online softmax is Milakov & Gimelshein 2018 (arXiv:1805.02867), its use for attention in linear memory
Rabe & Staats 2021 (arXiv:2112.05682), the blocking and the backward pass that recomputes the scores from the
saved log-sum-exp Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691). Forward it may go by
rag.native instead.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim,
P pairs of a batch row and a kv head, R = G block_q query rows (the query heads of a kv head folded into one
matrix, so K and V are never repeated), C = block_k key columns, N key blocks, n turns or query blocks.
Scores are kept in units of log 2: the scale of the queries includes log2(e), and the exponential is 2^x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag import native
from rag.ops.attention.mask import MaskArguments, MaskPattern, TileSpan, key_blocks, key_range, tile_mask

# Finite, so that no difference of two of them is NaN. The running maximum starts at half of it: then the
# exponential of a masked score is 0 even in a row that has seen no key yet.
_MASKED = -1e30
_LOG2_E = math.log2(math.e)
_EXP2 = (0.0013264726, 0.009671514, 0.055507336, 0.24022242, 0.693147)  # minimax, relative error 2e-7


@dataclass(frozen=True, slots=True)
class Blocks:
    """A tile: G x q query rows against k keys, for `pairs` pairs of batch row and kv head at once."""

    q: int = 128
    k: int = 128
    pairs: int | None = None  # None: all of them


@dataclass(frozen=True, slots=True)
class Plan:
    """All that the compiled program is specialised for, beside the shapes."""

    pattern: MaskPattern
    scale: float
    blocks: Blocks
    prefix: int | None = None  # forward in unrolled blocks of so many queries; causal, query i stands at i
    native: bool = False  # forward in C++ (rag/native/__init__.py); float32


def flash_attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: MaskArguments,
    plan: Plan,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Softmax attention without the T x S matrix; both results are differentiable in q, k and v.

    Returns the output in q's dtype and the float32 log-sum-exp of each row's scaled scores (-inf where
    nothing is visible). Products accumulate in float32. The memory beside the results is of the order of
    the inputs, forward and backward.
    """
    batch, heads, tokens, dim = q.shape
    pairs = batch * k.shape[1]
    k, v = (x.reshape(pairs, -1, dim) for x in (k, v))
    plan = _fit(plan, pairs, tokens, k.shape[1])
    out, lse = _flash(plan, q.reshape(pairs, -1, tokens, dim), k, v, _by_pair(extent, pairs))
    return out.reshape(q.shape), lse.reshape(batch, heads, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _flash(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    extent: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    """Output in q's dtype and float32 log-sum-exp."""
    with jax.named_scope("flash_forward"):
        if plan.native:
            first, past = key_range(plan.pattern, extent.q_positions, extent.kv_length)
            return native.attention(q, k[:, None], v[:, None], first, past, extent[2:], plan.scale)
        (padded,), keys_values, extent = _padded(plan.blocks, (q,), (k, v), extent)
        results = _in_turns(partial(_forward, plan), plan.blocks.pairs, (padded, *keys_values, extent))
        return tuple(x[:, :, : q.shape[2]] for x in results)


def _flash_saving(plan: Plan, q: Array, k: Array, v: Array, extent: MaskArguments) -> tuple:
    out, lse = _flash(plan, q, k, v, extent)
    return (out, lse), (q, k, v, extent, out, lse)


def _flash_backward(plan: Plan, saved: tuple, cotangents: tuple) -> tuple:
    q, k, v, extent, *results = saved
    with jax.named_scope("flash_backward"):
        # Zeros for queries that fill a block have cotangents of zero, and so no part in any sum.
        by_query = (q, *results, *cotangents)
        (padded, *rest), keys_values, extent = _padded(plan.blocks, by_query, (k, v), extent)
        arguments = (padded, *keys_values, extent, *rest)
        dq, dk, dv = _in_turns(partial(_backward, plan), plan.blocks.pairs, arguments)
        return dq[:, :, : q.shape[2]], dk[:, : k.shape[1]], dv[:, : v.shape[1]], None


_flash.defvjp(_flash_saving, _flash_backward)


def _forward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    extent: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    """Each block of queries takes in the blocks of keys that it sees, one by one."""
    tokens, blocks = q.shape[2], plan.blocks

    def query_block(i: Int[Array, ""]) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
        rows = (i * blocks.q, blocks.q)
        q_i = _scaled_rows(plan, q, rows)

        def step(j: Int[Array, ""], carry: tuple, masked: bool) -> tuple:
            columns = (j * blocks.k, blocks.k)
            return _absorb(carry, _scores(plan, extent, q_i, k, rows, columns, masked), _columns(v, columns))

        return _normalise(*_sweep(plan, extent, i, step, _nothing(q_i)))

    def query_prefix(start: int) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
        rows, columns = (start, plan.prefix), (0, min(start + plan.prefix, k.shape[1]))
        q_i = _scaled_rows(plan, q, rows)
        scores = _scores(plan, extent, q_i, k, rows, columns, masked=True)
        return _normalise(*_absorb(_nothing(q_i), scores, _columns(v, columns)))

    if plan.prefix:
        parts = [query_prefix(start) for start in range(0, tokens, plan.prefix)]
        out, lse = (jnp.stack(x) for x in zip(*parts, strict=True))
    else:
        out, lse = lax.map(query_block, jnp.arange(tokens // blocks.q))
    return _unblock(out, q.shape[1]).astype(q.dtype), _unblock(lse, q.shape[1])


def _nothing(
    q_i: Float[Array, "P R D"],
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]]:
    """(accumulator, maximum, denominator) before the first key."""
    nothing = jnp.zeros(q_i.shape[:2])
    return jnp.zeros_like(q_i), nothing + _MASKED / 2, nothing


def _absorb(
    carry: tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]],
    scores: Float[Array, "P R C"],
    v: Float[Array, "P C D"],
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]]:
    """The online softmax: one more block of scores into (accumulator, maximum, denominator)."""
    acc, top, total = carry
    new_top = jnp.maximum(top, scores.max(axis=-1))
    weights = _exp2(scores - new_top[..., None])
    shrink = _exp2(top - new_top)
    acc = acc * shrink[..., None] + jnp.einsum("prc,pcd->prd", weights, v)
    return acc, new_top, total * shrink + weights.sum(axis=-1)


def _normalise(
    acc: Float[Array, "P R D"], top: Float[Array, "P R"], total: Float[Array, "P R"]
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
    """Divide once at the end; a row that saw nothing gives zeros and -inf."""
    seen = total != 0
    total = jnp.where(seen, total, 1.0)
    return acc / total[..., None], jnp.where(seen, top / _LOG2_E + jnp.log(total), -jnp.inf)


def _backward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    extent: MaskArguments,
    out: Float[Array, "P G T D"],
    lse: Float[Array, "P G T"],
    dout: Float[Array, "P G T D"],
    dlse: Float[Array, "P G T"],
) -> tuple[Float[Array, "P G T D"], Float[Array, "P S D"], Float[Array, "P S D"]]:
    """Recompute each tile's weights from the saved log-sum-exp and sum the three gradients.

    With w = exp(s - lse) and s = q.k: dv = w^T dout, ds = w * (dout v^T - delta), dq = ds k, dk = ds^T q,
    where delta = rowsum(dout * out) - dlse. The sum of dk and dv over G is inside the folded rows.
    """
    groups, tokens = q.shape[1:3]
    pairs, keys, dim = k.shape
    blocks = plan.blocks
    seen = lse > -jnp.inf
    lse = jnp.where(seen, lse * _LOG2_E, 0.0)  # 2^(_MASKED - 0) is 0: an empty row takes no part
    dlse = jnp.where(seen, dlse, 0.0)

    def query_block(sums: tuple, i: Int[Array, ""]) -> tuple:
        rows = (i * blocks.q, blocks.q)
        q_i = _scaled_rows(plan, q, rows)
        out_i, dout_i, lse_i, dlse_i = (_rows(x, rows) for x in (out, dout, lse, dlse))
        delta_i = (dout_i * out_i).sum(axis=-1) - dlse_i
        q_t, dout_t = q_i.swapaxes(1, 2), dout_i.swapaxes(1, 2)  # P D R

        def step(j: Int[Array, ""], carry: tuple, masked: bool) -> tuple:
            dq, dk, dv = carry
            columns = (j * blocks.k, blocks.k)
            weights = _exp2(_scores(plan, extent, q_i, k, rows, columns, masked) - lse_i[..., None])
            dweights = jnp.einsum("prd,pcd->prc", dout_i, _columns(v, columns))
            dscores = weights * (dweights - delta_i[..., None])
            dv = _add_block(dv, j, jnp.einsum("pdr,prc->pdc", dout_t, weights))
            dk = _add_block(dk, j, jnp.einsum("pdr,prc->pdc", q_t, dscores))
            return dq + jnp.einsum("prc,pcd->prd", dscores, _columns(k, columns)), dk, dv

        dq, dk, dv = _sweep(plan, extent, i, step, (jnp.zeros_like(q_i), *sums))
        return (dk, dv), (dq * plan.scale).astype(q.dtype)

    # Kept transposed, N P D C: on XLA:CPU "pdr,prc->pdc" is 1.6x as fast as "prc,prd->pcd".
    zeros = jnp.zeros((keys // blocks.k, pairs, dim, blocks.k))
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(tokens // blocks.q))
    dk, dv = (x.transpose(1, 0, 3, 2).reshape(pairs, keys, dim) for x in (dk / _LOG2_E, dv))
    return _unblock(dq, groups), dk.astype(k.dtype), dv.astype(v.dtype)


def _in_turns(function: Callable[..., Any], pairs: int, arguments: tuple) -> Any:
    """Apply to `pairs` pairs at a time, so that the tiles in work stay in the processor's caches."""
    total = arguments[0].shape[0]
    if pairs == total:
        return function(*arguments)

    def turn(n: Int[Array, ""]) -> Any:
        return function(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, n * pairs, pairs), arguments))

    results = lax.map(turn, jnp.arange(total // pairs))
    return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), results)


def _sweep(plan: Plan, extent: MaskArguments, i: Int[Array, ""], step: Callable[..., Any], carry: Any) -> Any:
    """Pass over the key blocks of query block i; what nobody sees costs nothing, as the bounds are traced."""
    ranges = key_blocks(plan.pattern, extent, i, plan.blocks.q, plan.blocks.k)
    if plan.pattern.window is not None:  # else every range begins with its wholly visible blocks
        carry = lax.fori_loop(ranges.start, ranges.full_start, partial(step, masked=True), carry)
    carry = lax.fori_loop(ranges.full_start, ranges.full_stop, partial(step, masked=False), carry)
    return lax.fori_loop(ranges.full_stop, ranges.stop, partial(step, masked=True), carry)


def _scores(
    plan: Plan,
    extent: MaskArguments,
    q_i: Float[Array, "P R D"],
    k: Float[Array, "P S D"],
    rows: TileSpan,
    columns: TileSpan,
    masked: bool,
) -> Float[Array, "P R C"]:
    scores = jnp.einsum("prd,pcd->prc", q_i, _columns(k, columns))
    if not masked:
        return scores
    mask = tile_mask(plan.pattern, extent, rows, columns)
    heads = scores.shape[1] // rows[1]
    return jnp.where(jnp.tile(mask, (1, heads, 1)), scores, _MASKED)


def _exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """2^x for x <= 0, exactly 0 from -127 down: on XLA:CPU twice as fast as its own.

    x = n + f with n whole and |f| <= 1/2: a polynomial gives 2^f, and n is added to the exponent's bits.
    Adding 1.5 * 2^23 leaves n in a float32's lowest bits, cheaper than a conversion to integer.
    """
    x = jnp.maximum(x, -127.0)
    whole = lax.round(x, lax.RoundingMethod.TO_NEAREST_EVEN)
    fraction, power = x - whole, jnp.zeros_like(x)
    for coefficient in _EXP2:
        power = (power + coefficient) * fraction
    exponent = lax.bitcast_convert_type(whole + 1.5 * 2**23, jnp.int32) << 23
    return lax.bitcast_convert_type(lax.bitcast_convert_type(power + 1, jnp.int32) + exponent, jnp.float32)


def _scaled_rows(plan: Plan, q: Float[Array, "P G T D"], rows: TileSpan) -> Float[Array, "P R D"]:
    return _rows(q, rows) * (plan.scale * _LOG2_E)


def _rows(x: Float[Array, "P G T *D"], rows: TileSpan) -> Float[Array, "P R *D"]:
    """A block of queries in float32, its G heads folded into rows."""
    block = lax.dynamic_slice_in_dim(x, *rows, axis=2).astype(jnp.float32)
    return block.reshape(x.shape[0], -1, *x.shape[3:])


def _columns(x: Float[Array, "P S D"], columns: TileSpan) -> Float[Array, "P C D"]:
    """A block of keys in float32, whatever the cache holds."""
    return lax.dynamic_slice_in_dim(x, *columns, axis=1).astype(jnp.float32)


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


def _fit(plan: Plan, pairs: int, tokens: int, keys: int) -> Plan:
    """Blocks no larger than the arrays; a number of pairs that does not divide all pairs takes all."""
    wanted = plan.blocks
    prefix = plan.prefix and min(plan.prefix, tokens)
    if prefix:
        tokens += -tokens % prefix
    together = wanted.pairs if wanted.pairs and pairs % wanted.pairs == 0 else pairs
    blocks = Blocks(min(wanted.q, tokens), min(wanted.k, keys), together)
    return replace(plan, blocks=blocks, prefix=prefix if prefix and blocks.q % prefix == 0 else None)


def _pad(x: Array, multiple: int, axis: int, value: int | None = 0) -> Array:
    """Up to a multiple along one axis, with the value or, if it is None, with the last entries."""
    missing = -x.shape[axis] % multiple
    if not missing:
        return x
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, "edge") if value is None else jnp.pad(x, widths, constant_values=value)


def _by_pair(extent: MaskArguments, pairs: int) -> MaskArguments:
    """The extents of each pair of batch row and kv head."""
    return MaskArguments(*(None if x is None else jnp.repeat(x, pairs // x.shape[0], axis=0) for x in extent))


def _padded(
    blocks: Blocks,
    by_query: Sequence[Float[Array, "P G T ..."]],
    by_key: Sequence[Float[Array, "P S D"]],
    extent: MaskArguments,
) -> tuple[list[Array], list[Array], MaskArguments]:
    """Everything up to whole blocks: zeros, segments of nobody, and the last query's position."""
    q_positions, kv_length, q_segments, kv_segments = extent
    q_positions = _pad(q_positions, blocks.q, axis=1, value=None)
    if q_segments is not None:
        q_segments = _pad(q_segments, blocks.q, axis=1, value=-1)
        kv_segments = _pad(kv_segments, blocks.k, axis=1, value=-1)
    queries, keys = [_pad(x, blocks.q, axis=2) for x in by_query], [_pad(x, blocks.k, axis=1) for x in by_key]
    return queries, keys, MaskArguments(q_positions, kv_length, q_segments, kv_segments)
