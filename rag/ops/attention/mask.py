"""The attention mask: causality, window, key lengths and packed segments, as a mask or as ranges of key blocks.

Letters: B batch, T query tokens, S key tokens; b is 1 or B, t some of the T tokens, s some of the S tokens.
Query i of row b is at key position q_positions[b, i]; keys are at 0, 1, 2 ...
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int

from rag.ops.attention.options import AttentionOptions
from rag.runtime.shapes import ceil_div

# The score of a masked key: finite, so that no difference of two scores is NaN.
MASKED_SCORE = -1e30


class Segments(NamedTuple):
    """The ids of packed sequences; a negative id is padding, which sees nothing and is not seen.

    A query sees the keys of its own id, and those of its prefix: the beginning that several sequences share.
    """

    queries: Int[Array, "B T"]
    keys: Int[Array, "B S"]
    prefixes: Int[Array, "B T"]  # of the queries; the own id where there is none


class MaskArguments(NamedTuple):
    """The traced arguments of the mask."""

    q_positions: Int[Array, "b T"]  # any, in any order
    kv_length: Int[Array, "b"]  # keys at or past it do not exist
    segments: Segments | None


TileSpan = tuple[int | Int[Array, ""], int]  # (start, size): only the size has to be static


class KeyBlockRange(NamedTuple):
    """The key blocks [start, stop) of one query block; [full_start, full_stop) are fully visible and need no mask."""

    start: Int[Array, ""]
    full_start: Int[Array, ""]
    full_stop: Int[Array, ""]
    stop: Int[Array, ""]


def key_range(
    options: AttentionOptions, q_positions: Int[Array, "b1 t"], kv_length: Int[Array, "b2"]
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """Return the range [first, past) of keys that each query sees, segments aside; empty where past <= first."""
    first, past = jnp.broadcast_arrays(jnp.zeros_like(q_positions), kv_length[:, None])
    if options.causal:
        past = jnp.minimum(past, q_positions + 1)
    if options.window is not None:
        first = jnp.maximum(first, q_positions - options.window + 1)
        past = jnp.minimum(past, q_positions + options.window)
    return first, past


def tile_mask(
    options: AttentionOptions, mask_arguments: MaskArguments, rows: TileSpan, columns: TileSpan
) -> Bool[Array, "b t s"]:
    """Return the mask of a tile; True where a key is visible.

    Args:
        options: causality and window.
        mask_arguments: positions, key lengths and segments.
        rows: (start, size) of the queries.
        columns: (start, size) of the keys.
    """
    i = lax.dynamic_slice_in_dim(mask_arguments.q_positions, *rows, axis=1)[:, :, None]  # b t 1
    j = columns[0] + jnp.arange(columns[1])  # s
    mask = j < mask_arguments.kv_length[:, None, None]
    if options.causal:
        mask &= j <= i
    if options.window is not None:
        mask &= jnp.abs(i - j) < options.window
    if mask_arguments.segments is not None:
        segments = mask_arguments.segments
        own, prefix = (
            lax.dynamic_slice_in_dim(ids, *rows, axis=1)[:, :, None]
            for ids in (segments.queries, segments.prefixes)
        )
        keys = lax.dynamic_slice_in_dim(segments.keys, *columns, axis=1)[:, None, :]
        mask &= ((keys == own) | (keys == prefix)) & (own >= 0) & (keys >= 0)
    return jnp.broadcast_to(mask, (mask.shape[0], rows[1], columns[1]))


def key_blocks(
    options: AttentionOptions,
    mask_arguments: MaskArguments,
    i: int | Int[Array, ""],
    block_q: int,
    block_k: int,
) -> KeyBlockRange:
    """Return the range of key blocks that one query block has to process, over all rows of the batch.

    Args:
        options: causality and window.
        mask_arguments: positions, key lengths and segments.
        i: the index of the query block.
        block_q: the queries of a block.
        block_k: the keys of a block.
    """
    positions = lax.dynamic_slice_in_dim(mask_arguments.q_positions, i * block_q, block_q, axis=1)
    first, past = key_range(options, positions, mask_arguments.kv_length)
    start = first.min() // block_k
    stop = jnp.maximum(ceil_div(past.max(), block_k), start)
    full_start = ceil_div(first.max(), block_k)
    full_stop = past.min() // block_k
    if mask_arguments.segments is not None:
        low, high = _segment_blocks(mask_arguments.segments, i, block_q, block_k)
        start = jnp.maximum(start, low)
        stop = jnp.maximum(jnp.minimum(stop, high), start)
        full_start = full_stop = start
    full_start = jnp.clip(full_start, start, stop)
    return KeyBlockRange(start, full_start, jnp.clip(full_stop, full_start, stop), stop)


def _segment_blocks(
    segments: Segments, i: int | Int[Array, ""], block_q: int, block_k: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """Return the range of key blocks whose segment ids overlap those that query block `i` sees, in any row."""
    seen = jnp.concatenate(
        [
            lax.dynamic_slice_in_dim(ids, i * block_q, block_q, axis=1)
            for ids in (segments.queries, segments.prefixes)
        ],
        axis=1,
    )
    keys = segments.keys.reshape(segments.keys.shape[0], -1, block_k)
    (q_low, q_high), (kv_low, kv_high) = _id_range(seen), _id_range(keys)
    overlaps = ((kv_low <= q_high[:, None]) & (kv_high >= q_low[:, None])).any(axis=0)  # key blocks
    first, past = jnp.argmax(overlaps), overlaps.size - jnp.argmax(overlaps[::-1])
    return jnp.where(overlaps.any(), first, 0), jnp.where(overlaps.any(), past, 0)


def _id_range(ids: Int[Array, "... s"]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Return the lowest and highest id that is not padding; an empty range where all is padding."""
    none = jnp.iinfo(ids.dtype).max
    return jnp.where(ids < 0, none, ids).min(axis=-1), jnp.where(ids < 0, -1, ids).max(axis=-1)
