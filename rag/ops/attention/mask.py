"""Which key a query may see: causality, window, lengths and packed segments, as a mask or as block ranges.

Letters: B batch, b is 1 or B, T query tokens, S key tokens.
Query i of row b stands at key position q_positions[b, i]; keys stand at 0, 1, 2 ...
"""

from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Bool, Int


@dataclass(frozen=True, slots=True)
class MaskPattern:
    """The static part: what the compiled program is specialised for."""

    causal: bool = False
    window: int | None = None  # key j is visible iff |i - j| < window


class MaskArguments(NamedTuple):
    """The traced part. Segments come both or not at all; a negative id is padding."""

    q_positions: Int[Array, "b T"]  # any, in any order
    kv_length: Int[Array, "b"]  # keys at or past it do not exist
    q_segments: Int[Array, "B T"] | None = None
    kv_segments: Int[Array, "B S"] | None = None


TileSpan = tuple[int | Int[Array, ""], int]  # (start, size): only the size has to be static


class KeyBlocks(NamedTuple):
    """Key blocks of one query block: [full_start, full_stop) is wholly visible, the rest needs the mask."""

    start: Int[Array, ""]
    full_start: Int[Array, ""]
    full_stop: Int[Array, ""]
    stop: Int[Array, ""]


def key_range(
    pattern: MaskPattern, q_positions: Int[Array, "b1 t"], kv_length: Int[Array, "b2"]
) -> tuple[Int[Array, "b t"], Int[Array, "b t"]]:
    """First key and past the last one that each query sees, segments aside; empty where past <= first."""
    first, past = jnp.broadcast_arrays(jnp.zeros_like(q_positions), kv_length[:, None])
    if pattern.causal:
        past = jnp.minimum(past, q_positions + 1)
    if pattern.window is not None:
        first = jnp.maximum(first, q_positions - pattern.window + 1)
        past = jnp.minimum(past, q_positions + pattern.window)
    return first, past


def tile_mask(
    pattern: MaskPattern, extent: MaskArguments, rows: TileSpan, columns: TileSpan
) -> Bool[Array, "b t s"]:
    """The mask of a tile of queries and keys."""
    i = lax.dynamic_slice_in_dim(extent.q_positions, *rows, axis=1)[:, :, None]  # b t 1
    j = columns[0] + jnp.arange(columns[1])  # s
    mask = j < extent.kv_length[:, None, None]
    if pattern.causal:
        mask &= j <= i
    if pattern.window is not None:
        mask &= jnp.abs(i - j) < pattern.window
    if extent.q_segments is not None:
        q_ids = lax.dynamic_slice_in_dim(extent.q_segments, *rows, axis=1)[:, :, None]
        kv_ids = lax.dynamic_slice_in_dim(extent.kv_segments, *columns, axis=1)[:, None, :]
        mask &= (q_ids == kv_ids) & (q_ids >= 0)
    return jnp.broadcast_to(mask, (mask.shape[0], rows[1], columns[1]))


def key_blocks(
    pattern: MaskPattern, extent: MaskArguments, i: int | Int[Array, ""], block_q: int, block_k: int
) -> KeyBlocks:
    """The range of key blocks that query block `i` has to look at, over all rows of the batch."""
    positions = lax.dynamic_slice_in_dim(extent.q_positions, i * block_q, block_q, axis=1)
    first, past = key_range(pattern, positions, extent.kv_length)
    start = first.min() // block_k
    stop = jnp.maximum(-(-past.max() // block_k), start)
    full_start = -(-first.max() // block_k)
    full_stop = past.min() // block_k
    if extent.q_segments is not None:
        low, high = _segment_blocks(extent, i, block_q, block_k)
        start = jnp.maximum(start, low)
        stop = jnp.maximum(jnp.minimum(stop, high), start)
        full_start = full_stop = start
    full_start = jnp.clip(full_start, start, stop)
    return KeyBlocks(start, full_start, jnp.clip(full_stop, full_start, stop), stop)


def _segment_blocks(
    extent: MaskArguments, i: int | Int[Array, ""], block_q: int, block_k: int
) -> tuple[Int[Array, ""], Int[Array, ""]]:
    """First and past-the-last key block whose range of segment ids meets the query block's, in any row."""
    q_ids = lax.dynamic_slice_in_dim(extent.q_segments, i * block_q, block_q, axis=1)
    kv_ids = extent.kv_segments.reshape(extent.kv_segments.shape[0], -1, block_k)
    (q_low, q_high), (kv_low, kv_high) = _id_range(q_ids), _id_range(kv_ids)
    meets = ((kv_low <= q_high[:, None]) & (kv_high >= q_low[:, None])).any(axis=0)  # key blocks
    first, past = jnp.argmax(meets), meets.size - jnp.argmax(meets[::-1])
    return jnp.where(meets.any(), first, 0), jnp.where(meets.any(), past, 0)


def _id_range(ids: Int[Array, "... s"]) -> tuple[Int[Array, "..."], Int[Array, "..."]]:
    """Lowest and highest id that is not padding; an empty range where all is padding."""
    none = jnp.iinfo(ids.dtype).max
    return jnp.where(ids < 0, none, ids).min(axis=-1), jnp.where(ids < 0, -1, ids).max(axis=-1)
