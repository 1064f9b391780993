"""Tiles of attention scores: their sizes, and how blocks of queries and keys are cut, padded and looped over.

Letters: T query tokens, S key tokens, G query heads of a kv head, D head dim, s the keys of a block,
P pairs of a batch row and a kv head, R = G x block_q query rows (the query heads of a kv head folded into one
matrix, so that K and V are never repeated).
Scores are in units of log 2: the scale of the queries includes log2(e), and the exponential is 2^x.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag.ops.attention.mask import MASKED_SCORE, MaskArguments, Segments, TileSpan, key_blocks, tile_mask
from rag.ops.attention.options import AttentionOptions, BlockSizes
from rag.runtime.shapes import ceil_div, previous_power_of_two, round_up

# Measured on a CPU with XLA 0.10:
_UNROLLED = 64  # queries of an unrolled block; block sizes are multiples of it
_UNROLLED_TOKENS = 512  # queries up to which unrolled blocks are faster than loops, without a cache
DECODE_TOKENS = 8  # queries up to which reading K and V takes most of the time

LOG2_E = math.log2(math.e)
_EXP2 = (0.0013264726, 0.009671514, 0.055507336, 0.24022242, 0.693147)  # minimax, relative error 2e-7


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that the compiled program depends on, besides the shapes.

    `pairs` pairs of a batch row and a kv head are processed at once. With `unrolled` the forward pass is a sequence of
    blocks of so many queries without a loop, each against all keys up to its last query; for causal attention where
    query i is at position i.
    """

    options: AttentionOptions
    blocks: BlockSizes
    pairs: int
    unrolled: int | None


def runs_unrolled(options: AttentionOptions, tokens: int) -> bool:
    """Return whether the forward pass for so many queries has no loop."""
    return options.causal and options.from_start and tokens <= _UNROLLED_TOKENS


def plan_of(options: AttentionOptions, q: Float[Array, "P G T D"], k: Float[Array, "P S D"]) -> Plan:
    """Return the plan for these arrays: block sizes are chosen if not given, and are no larger than the arrays."""
    pairs, groups, tokens, _ = q.shape
    blocks = options.blocks or _block_sizes(pairs, groups, tokens)
    unrolled = min(_UNROLLED, tokens) if runs_unrolled(options, tokens) else None
    longest = round_up(tokens, unrolled) if unrolled else tokens
    block_q = min(blocks.q, longest)
    return Plan(
        options,
        BlockSizes(block_q, min(blocks.k, k.shape[1])),
        blocks.pairs if blocks.pairs and pairs % blocks.pairs == 0 else pairs,
        unrolled if unrolled and block_q % unrolled == 0 else None,
    )


def _block_sizes(pairs: int, groups: int, tokens: int) -> BlockSizes:
    """Return block sizes measured on two CPU cores.

    XLA:CPU distributes every kernel to the cores again, which costs time in a small tile, and scores that do not fit
    the cores' caches cost more than that. With tiles of 2304 x 256, three kv heads of 768 rows each, the scores take
    2.3 MiB, and up to 4,096 tokens it took a tenth less time than 768 x 256. Longer tiles waste more of the diagonal.
    """
    if tokens <= DECODE_TOKENS:
        return BlockSizes(tokens, 128)
    largest = max(_UNROLLED, min(256, previous_power_of_two(1536 // groups)))
    # Blocks of about one size, so that the last one is not mostly padding.
    block_q = round_up(ceil_div(tokens, ceil_div(tokens, largest)), _UNROLLED)
    rows = groups * min(block_q, tokens)
    together = max(n for n in range(1, pairs + 1) if pairs % n == 0 and (n == 1 or n * rows <= 2304))
    return BlockSizes(block_q, 256, together)


def pad_to_blocks(
    blocks: BlockSizes,
    by_query: Sequence[Float[Array, "P G T ..."]],
    by_key: Sequence[Float[Array, "P S D"]],
    mask_arguments: MaskArguments,
) -> tuple[list[Array], list[Array], MaskArguments]:
    """Pad everything to whole blocks: with zeros, the segment of padding, and the last query's position.

    Args:
        blocks: the sizes of a block.
        by_query: arrays with an entry for each query.
        by_key: arrays with an entry for each key.
        mask_arguments: those of the mask.
    """
    q_positions, kv_length, segments = mask_arguments
    q_positions = _pad(q_positions, blocks.q, axis=1, value=None)
    if segments is not None:
        own, seen = (_pad(ids, blocks.q, axis=1, value=-1) for ids in (segments.queries, segments.prefixes))
        segments = Segments(own, _pad(segments.keys, blocks.k, axis=1, value=-1), seen)
    queries, keys = [_pad(x, blocks.q, axis=2) for x in by_query], [_pad(x, blocks.k, axis=1) for x in by_key]
    return queries, keys, MaskArguments(q_positions, kv_length, segments)


def _pad(x: Array, multiple: int, axis: int, value: int | None = 0) -> Array:
    """Pad one axis to a multiple, with the value or, if it is None, with the last entries."""
    missing = round_up(x.shape[axis], multiple) - x.shape[axis]
    if not missing:
        return x
    widths = [(0, missing if a == axis else 0) for a in range(x.ndim)]
    return jnp.pad(x, widths, "edge") if value is None else jnp.pad(x, widths, constant_values=value)


def map_pairs(function: Callable[..., Any], pairs: int, arguments: tuple) -> Any:
    """Apply the function to `pairs` pairs at a time, so that its tiles stay in the processor's caches."""
    total = arguments[0].shape[0]
    if pairs == total:
        return function(*arguments)

    def some_pairs(n: Int[Array, ""]) -> Any:
        return function(*jax.tree.map(lambda x: lax.dynamic_slice_in_dim(x, n * pairs, pairs), arguments))

    results = lax.map(some_pairs, jnp.arange(total // pairs))
    return jax.tree.map(lambda x: x.reshape(total, *x.shape[2:]), results)


def loop_over_keys(
    plan: Plan, mask_arguments: MaskArguments, i: Int[Array, ""], step: Callable[..., Any], carry: Any
) -> Any:
    """Run a step for each key block that one query block sees; the bounds are traced, so masked blocks cost nothing.

    Args:
        plan: block sizes and options.
        mask_arguments: those of the mask.
        i: the index of the query block.
        step: maps (index of the key block, carry, masked=whether some of its keys may be masked) to the next carry.
        carry: the first carry.
    """
    blocks = key_blocks(plan.options, mask_arguments, i, plan.blocks.q, plan.blocks.k)
    if plan.options.window is not None:  # else every range begins with its fully visible blocks
        carry = lax.fori_loop(blocks.start, blocks.full_start, partial(step, masked=True), carry)
    carry = lax.fori_loop(blocks.full_start, blocks.full_stop, partial(step, masked=False), carry)
    return lax.fori_loop(blocks.full_stop, blocks.stop, partial(step, masked=True), carry)


def tile_scores(
    plan: Plan,
    mask_arguments: MaskArguments,
    q_i: Float[Array, "P R D"],
    k: Float[Array, "P S D"],
    rows: TileSpan,
    columns: TileSpan,
    masked: bool,
) -> Float[Array, "P R s"]:
    """Return the scores of a tile, in units of log 2.

    Args:
        plan: block sizes and options.
        mask_arguments: those of the mask.
        q_i: the tile's queries, scaled.
        k: all keys.
        rows: (start, size) of the tile's queries.
        columns: (start, size) of its keys.
        masked: whether some of its keys may be masked.
    """
    scores = jnp.einsum("prd,psd->prs", q_i, columns_of(k, columns))
    if not masked:
        return scores
    mask = tile_mask(plan.options, mask_arguments, rows, columns)
    groups = scores.shape[1] // rows[1]
    return jnp.where(jnp.tile(mask, (1, groups, 1)), scores, MASKED_SCORE)


def exp2(x: Float[Array, "..."]) -> Float[Array, "..."]:
    """Return 2^x for x <= 0, exactly 0 from -127 down; on XLA:CPU twice as fast as its own.

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


def scaled_rows(plan: Plan, q: Float[Array, "P G T D"], rows: TileSpan) -> Float[Array, "P R D"]:
    """Return a block of queries in float32, times the scale of the scores and log2(e)."""
    return rows_of(q, rows) * (plan.options.scale * LOG2_E)


def rows_of(x: Float[Array, "P G T *D"], rows: TileSpan) -> Float[Array, "P R *D"]:
    """Return a block of queries in float32, its G heads folded into rows."""
    block = lax.dynamic_slice_in_dim(x, *rows, axis=2).astype(jnp.float32)
    return block.reshape(x.shape[0], -1, *x.shape[3:])


def columns_of(x: Float[Array, "P S D"], columns: TileSpan) -> Float[Array, "P s D"]:
    """Return a block of keys or values in float32, whatever the cache's dtype."""
    return lax.dynamic_slice_in_dim(x, *columns, axis=1).astype(jnp.float32)


def unfold(x: Float[Array, "blocks P R *D"], groups: int) -> Float[Array, "P G T *D"]:
    """Join stacked query blocks to G heads of T tokens."""
    n, p, r, *rest = x.shape
    x = jnp.moveaxis(x.reshape(n, p, groups, r // groups, *rest), 0, 2)
    return x.reshape(p, groups, n * (r // groups), *rest)
