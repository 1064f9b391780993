"""Flash attention in lax: attention block by block with an online softmax, in memory linear in T and S.

The online softmax is Milakov & Gimelshein 2018 (arXiv:1805.02867), its use for attention in linear memory
Rabe & Staats 2021 (arXiv:2112.05682), the tiling and the backward pass that recomputes the scores from the
saved log-sum-exp Dao et al. 2022 (arXiv:2205.14135) and Dao 2023 (arXiv:2307.08691).

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim, s the keys of a block,
P pairs of a batch row and a kv head, R = G x block_q query rows. Scores are in units of log 2 (tiles.py).
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag.ops.attention.mask import MASKED_SCORE, MaskArguments
from rag.ops.attention.options import AttentionOptions
from rag.ops.attention.tiles import (
    LOG2_E,
    Plan,
    columns_of,
    exp2,
    loop_over_keys,
    map_pairs,
    pad_to_blocks,
    plan_of,
    rows_of,
    scaled_rows,
    tile_scores,
    unfold,
)

# (accumulator, running maximum, denominator) of the online softmax, all float32.
Carry = tuple[Float[Array, "P R D"], Float[Array, "P R"], Float[Array, "P R"]]
Forward = Callable[[Plan, Array, Array, Array, MaskArguments], tuple[Array, Array]]
Backward = Callable[..., tuple[Array, Array, Array]]


@partial(jax.jit, static_argnames="options")
def attend(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Return the output in q's dtype and the log-sum-exp of the scores; see rag.ops.attention.Implementation."""
    return blockwise(_forward, _backward, q, k, v, mask_arguments, options)


def blockwise(
    forward: Forward,
    backward: Backward,
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Return the result of `forward`, differentiable in q, k and v by `backward`.

    Products accumulate in float32. Forward and backward, the memory beside the results is of the order of the inputs.

    Args:
        forward: computes output and log-sum-exp from (plan, q [P,G,T,D], k [P,S,D], v [P,S,D], mask arguments
            with a row for each pair).
        backward: computes dq, dk and dv from the same, the results of `forward` and their cotangents.
        q, k, v: queries, keys and values.
        mask_arguments: the traced arguments of the mask.
        options: the static options.
    """
    batch, heads, tokens, dim = q.shape
    pairs = batch * k.shape[1]
    k, v = (x.reshape(pairs, -1, dim) for x in (k, v))
    mask_arguments = jax.tree.map(lambda x: jnp.repeat(x, pairs // x.shape[0], axis=0), mask_arguments)
    q = q.reshape(pairs, -1, tokens, dim)
    out, lse = _blockwise(forward, backward, plan_of(options, q, k), q, k, v, mask_arguments)
    return out.reshape(batch, heads, tokens, dim), lse.reshape(batch, heads, tokens)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _blockwise(
    forward: Forward,
    backward: Backward,
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    with jax.named_scope("flash_forward"):
        return forward(plan, q, k, v, mask_arguments)


def _blockwise_forward(
    forward: Forward,
    backward: Backward,
    plan: Plan,
    q: Array,
    k: Array,
    v: Array,
    mask_arguments: MaskArguments,
) -> tuple:
    results = _blockwise(forward, backward, plan, q, k, v, mask_arguments)
    return results, (q, k, v, mask_arguments, results)


def _blockwise_backward(
    forward: Forward, backward: Backward, plan: Plan, saved: tuple, cotangents: tuple
) -> tuple:
    with jax.named_scope("flash_backward"):
        return *backward(plan, *saved, cotangents), None


_blockwise.defvjp(_blockwise_forward, _blockwise_backward)


def _forward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    (padded,), keys_values, mask_arguments = pad_to_blocks(plan.blocks, (q,), (k, v), mask_arguments)
    results = map_pairs(partial(_forward_tiles, plan), plan.pairs, (padded, *keys_values, mask_arguments))
    out, lse = (x[:, :, : q.shape[2]] for x in results)
    return out, lse


def _forward_tiles(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
) -> tuple[Float[Array, "P G T D"], Float[Array, "P G T"]]:
    """Compute each block of queries from the blocks of keys that it sees, one after the other."""
    tokens, blocks = q.shape[2], plan.blocks

    def query_block(i: Int[Array, ""]) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
        rows = (i * blocks.q, blocks.q)
        q_i = scaled_rows(plan, q, rows)

        def step(j: Int[Array, ""], carry: Carry, masked: bool) -> Carry:
            columns = (j * blocks.k, blocks.k)
            scores = tile_scores(plan, mask_arguments, q_i, k, rows, columns, masked)
            return _online_softmax(carry, scores, columns_of(v, columns))

        return _normalise(*loop_over_keys(plan, mask_arguments, i, step, _initial_carry(q_i)))

    def unrolled_block(start: int, size: int) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
        rows, columns = (start, size), (0, min(start + size, k.shape[1]))
        q_i = scaled_rows(plan, q, rows)
        scores = tile_scores(plan, mask_arguments, q_i, k, rows, columns, masked=True)
        return _normalise(*_online_softmax(_initial_carry(q_i), scores, columns_of(v, columns)))

    if plan.unrolled:
        parts = [unrolled_block(start, plan.unrolled) for start in range(0, tokens, plan.unrolled)]
        out, lse = (jnp.stack(x) for x in zip(*parts, strict=True))
    else:
        out, lse = lax.map(query_block, jnp.arange(tokens // blocks.q))
    return unfold(out, q.shape[1]).astype(q.dtype), unfold(lse, q.shape[1])


def _initial_carry(q_i: Float[Array, "P R D"]) -> Carry:
    """Return the carry before the first key.

    The running maximum starts at half of MASKED_SCORE: the exponential of a masked score is then 0 even in a row
    that has seen no key yet.
    """
    zeros = jnp.zeros(q_i.shape[:2])
    return jnp.zeros_like(q_i), zeros + MASKED_SCORE / 2, zeros


def _online_softmax(carry: Carry, scores: Float[Array, "P R s"], v: Float[Array, "P s D"]) -> Carry:
    """Add one more block of keys to the online softmax."""
    accumulator, running_max, denominator = carry
    new_max = jnp.maximum(running_max, scores.max(axis=-1))
    weights = exp2(scores - new_max[..., None])
    rescale = exp2(running_max - new_max)
    accumulator = accumulator * rescale[..., None] + jnp.einsum("prs,psd->prd", weights, v)
    return accumulator, new_max, denominator * rescale + weights.sum(axis=-1)


def _normalise(
    accumulator: Float[Array, "P R D"], running_max: Float[Array, "P R"], denominator: Float[Array, "P R"]
) -> tuple[Float[Array, "P R D"], Float[Array, "P R"]]:
    """Return output and log-sum-exp: one division at the end; a fully masked row gives zeros and -inf."""
    visible = denominator != 0
    denominator = jnp.where(visible, denominator, 1.0)
    lse = jnp.where(visible, running_max / LOG2_E + jnp.log(denominator), -jnp.inf)
    return accumulator / denominator[..., None], lse


def _backward(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
    results: tuple[Float[Array, "P G T D"], Float[Array, "P G T"]],
    cotangents: tuple[Float[Array, "P G T D"], Float[Array, "P G T"]],
) -> tuple[Float[Array, "P G T D"], Float[Array, "P S D"], Float[Array, "P S D"]]:
    # Padding queries have cotangents of zero and so add nothing to any sum.
    padded = pad_to_blocks(plan.blocks, (q, *results, *cotangents), (k, v), mask_arguments)
    (padded_q, *rest), keys_values, mask_arguments = padded
    arguments = (padded_q, *keys_values, mask_arguments, *rest)
    dq, dk, dv = map_pairs(partial(_backward_tiles, plan), plan.pairs, arguments)
    return dq[:, :, : q.shape[2]], dk[:, : k.shape[1]], dv[:, : v.shape[1]]


def _backward_tiles(
    plan: Plan,
    q: Float[Array, "P G T D"],
    k: Float[Array, "P S D"],
    v: Float[Array, "P S D"],
    mask_arguments: MaskArguments,
    out: Float[Array, "P G T D"],
    lse: Float[Array, "P G T"],
    dout: Float[Array, "P G T D"],
    dlse: Float[Array, "P G T"],
) -> tuple[Float[Array, "P G T D"], Float[Array, "P S D"], Float[Array, "P S D"]]:
    """Recompute the weights of each tile from the saved log-sum-exp and sum the three gradients.

    With w = exp(s - lse) and s = q.k: dv = w^T dout, ds = w * (dout v^T - delta), dq = ds k, dk = ds^T q,
    where delta = rowsum(dout * out) - dlse. The sum of dk and dv over G is inside the folded rows.
    """
    groups, tokens = q.shape[1:3]
    pairs, keys, dim = k.shape
    blocks = plan.blocks
    visible = lse > -jnp.inf
    lse = jnp.where(visible, lse * LOG2_E, 0.0)  # 2^(MASKED_SCORE - 0) is 0: a fully masked row adds nothing
    dlse = jnp.where(visible, dlse, 0.0)

    def query_block(sums: tuple[Array, Array], i: Int[Array, ""]) -> tuple[tuple[Array, Array], Array]:
        rows = (i * blocks.q, blocks.q)
        q_i = scaled_rows(plan, q, rows)
        out_i, dout_i, lse_i, dlse_i = (rows_of(x, rows) for x in (out, dout, lse, dlse))
        delta_i = (dout_i * out_i).sum(axis=-1) - dlse_i
        q_t, dout_t = q_i.swapaxes(1, 2), dout_i.swapaxes(1, 2)  # P D R

        def step(j: Int[Array, ""], carry: tuple, masked: bool) -> tuple:
            dq, dk, dv = carry
            columns = (j * blocks.k, blocks.k)
            scores = tile_scores(plan, mask_arguments, q_i, k, rows, columns, masked)
            weights = exp2(scores - lse_i[..., None])
            dweights = jnp.einsum("prd,psd->prs", dout_i, columns_of(v, columns))
            dscores = weights * (dweights - delta_i[..., None])
            dv = _add_at(dv, j, jnp.einsum("pdr,prs->pds", dout_t, weights))
            dk = _add_at(dk, j, jnp.einsum("pdr,prs->pds", q_t, dscores))
            return dq + jnp.einsum("prs,psd->prd", dscores, columns_of(k, columns)), dk, dv

        dq, dk, dv = loop_over_keys(plan, mask_arguments, i, step, (jnp.zeros_like(q_i), *sums))
        return (dk, dv), (dq * plan.options.scale).astype(q.dtype)

    # The sums are transposed, [key blocks, P, D, s]: on XLA:CPU "pdr,prs->pds" is 1.6x as fast as "prs,prd->psd".
    zeros = jnp.zeros((keys // blocks.k, pairs, dim, blocks.k))
    (dk, dv), dq = lax.scan(query_block, (zeros, zeros), jnp.arange(tokens // blocks.q))
    dk, dv = (x.transpose(1, 0, 3, 2).reshape(pairs, keys, dim) for x in (dk / LOG2_E, dv))
    return unfold(dq, groups), dk.astype(k.dtype), dv.astype(v.dtype)


def _add_at(
    sums: Float[Array, "blocks P D s"], j: Int[Array, ""], x: Float[Array, "P D s"]
) -> Float[Array, "blocks P D s"]:
    old = lax.dynamic_index_in_dim(sums, j, keepdims=False)
    return lax.dynamic_update_index_in_dim(sums, old + x, j, axis=0)
