"""Exact nearest neighbours by cosine: the inner products of unit vectors, of every vector.

    N vectors (rows), Q queries, E embedding dim, k results; groups: of consecutive rows; rows: those of a block

For a few queries, reading the vectors is nearly all of the work: all scores of a query are computed, and its best rows
are taken from them. For many queries the products are most of the work, and writing N x Q scores would cost as much
again: the rows are taken in blocks whose scores stay in the processor's cache, only the maxima of small groups of rows
are written, and the rows of the best groups are scored once more. From a few dozen queries on, a processor with
bfloat16 products finds the maxima several times faster in those, from blocks that are converted as they are read.

Each way rounds differently, and near duplicates are closer than that. The effect of rounding is bounded, and queries
whose result that leaves in doubt are searched again: from bfloat16 in float32, and from there by scoring all rows as
the results are scored. Either way the vectors are read in place (a memory map is not copied), the temporary memory is a
small part of theirs, and the results are the same: the k best in float32, ties to the lower row.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from rag.index.dense import refine
from rag.runtime.machine.hardware import cpu_flags
from rag.runtime.machine.measurement import Work
from rag.runtime.shapes import ceil_div, previous_power_of_two

_BATCH = 1024  # queries of one call to XLA, unless their maxima would take more than
_MAXIMA_BYTES = 256 << 20
_MANY = 32  # queries from which bfloat16 pays for converting the vectors, and for proving
_ROWS = 4096  # rows of a block: with 256 queries their scores are 4 MiB
_BLOCKS = 64  # blocks that one program takes: it grows with them
_GROUP = 8  # rows of a group: fewer leave more maxima to choose from, more leave more rows to score again
_BY_ROWS = (((1,), (1,)), ((), ()))


@partial(jax.jit, static_argnames="k")
def search(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    k: int,
    longest: Float[Array, ""] | None = None,
) -> refine.Found:
    """Return for each query the min(k, N) rows of highest inner product; the lower row wins a tie.

    Args:
        vectors: of any length.
        queries: any number of them.
        k: the number of results.
        longest: the length of the longest vector, or more; None finds it.

    Returns:
        The scores, exact in float32, best first, and the row numbers (int32).
    """
    n = len(vectors)
    k = min(k, n)
    slack = _rounding(vectors, queries, longest)
    if _by_groups(n, len(queries), k):
        return _search_groups(vectors, queries, _maxima(vectors, queries), slack, k)
    if len(queries) > 1 or k + _spare(k) >= n:
        return refine.best_of_all(vectors, queries, k=k)
    estimates = refine.scores(vectors, queries[0])[None]
    best, ids, last = refine.best_of_estimates(vectors, queries, estimates, k=k, candidates=k + _spare(k))
    proven = (best[:, -1] > last + slack) | ~queries.any(axis=1)
    return refine.search_unproven(proven, (best, ids), vectors, queries)


def _by_groups(n: int, queries: int, k: int) -> bool:
    """Return whether group maxima pay: not for few queries, nor if the best groups are a good part of all rows."""
    return queries > refine.FEW and n >= max(256 * k, _ROWS)


def _spare(k: int) -> int:
    """Return the number of candidates beyond k, for those that another rounding would have let in."""
    return 4 + k // 8


def _rounding(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    longest: Float[Array, ""] | None,
) -> Float32[Array, "Q"]:
    """Return how much two float32 products of each query and any row can differ."""
    if longest is None:
        longest = jnp.sqrt(jnp.square(vectors.astype(jnp.float32)).sum(axis=1).max(initial=0.0))
    largest = jnp.abs(queries).astype(jnp.float32).max(axis=1, keepdims=True)
    parts = queries / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)  # whose squares do not underflow
    return refine.rounding(vectors.shape[1]) * longest * largest[:, 0] * jnp.linalg.norm(parts, axis=1)


def _search_groups(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Float[Array, "Q groups"],
    slack: Float32[Array, "Q"],
    k: int,
) -> refine.Found:
    """Search by the highest scores in the groups of rows."""
    groups = k + _spare(k)
    best, ids, proven = refine.best_of_groups(
        vectors, queries, maxima, slack, k=k, group=_GROUP, groups=groups
    )
    every_tie = ~queries.any(axis=1)  # of a query of zeros: the lowest groups were taken, which is right
    return refine.search_unproven(proven | every_tie, (best, ids), vectors, queries)


def _maxima(vectors: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q groups"]:
    """Return the highest score in each whole group of consecutive rows; N >= _ROWS."""
    groups, step = len(vectors) // _GROUP, _ROWS // _GROUP

    def block(i: Int[Array, ""], maxima: Float32[Array, "Q groups"]) -> Float32[Array, "Q groups"]:
        first = jnp.minimum(i * step, groups - step)  # the last block overlaps the one before
        rows = jax.lax.dynamic_slice_in_dim(vectors, first * _GROUP, _ROWS)
        return jax.lax.dynamic_update_slice_in_dim(maxima, _block_maxima(rows, queries), first, axis=1)

    return jax.lax.fori_loop(0, ceil_div(groups, step), block, jnp.zeros((len(queries), groups), jnp.float32))


def _block_maxima(rows: Float[Array, "rows E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q groups"]:
    return jax.vmap(lambda query: refine.scores(rows, query).reshape(-1, _GROUP).max(axis=1))(queries)


def _half_maxima(rows: Float[Array, "rows E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q groups"]:
    """Return `_block_maxima` of rows and queries rounded to bfloat16."""
    half = (queries.astype(jnp.bfloat16), rows.astype(jnp.bfloat16))
    products = jax.lax.dot_general(*half, _BY_ROWS, preferred_element_type=jnp.float32)
    return products.reshape(len(queries), -1, _GROUP).max(axis=2)


@partial(jax.jit, static_argnames="half")
def _maxima_of_blocks(
    blocks: Sequence[Float[Array, "_ E"]], queries: Float[Array, "Q E"], half: bool
) -> Float32[Array, "Q groups"]:
    """Return the maxima of consecutive blocks: as arrays of their own they need not be copied out of one."""
    of_block = _half_maxima if half else _block_maxima
    return jnp.concatenate([of_block(rows, queries) for rows in blocks], axis=1)


@partial(jax.jit, static_argnames="k")
def _search_pieces(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Sequence[Float[Array, "Q _"]],
    k: int,
    longest: Float[Array, ""],
) -> refine.Found:
    slack = _rounding(vectors, queries, longest)
    return _search_groups(vectors, queries, jnp.concatenate(maxima, axis=1), slack, k)


@partial(jax.jit, static_argnames="k")
def _prove_pieces(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Sequence[Float[Array, "Q _"]],
    slack: Float[Array, "Q"],
    k: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Bool[Array, "Q"]]:
    bounds, groups = jnp.concatenate(maxima, axis=1), _groups_to_prove(k)
    return refine.best_of_groups(vectors, queries, bounds, slack, k=k, group=_GROUP, groups=groups)


def _groups_to_prove(k: int) -> int:
    """Return how many groups bfloat16 rounding may put in the wrong order."""
    return k + k // 2 + 8


class Bfloat16Bounds(NamedTuple):
    """Bounds on vectors rounded to bfloat16: their largest length, and the largest length of a rounding error."""

    length: float
    error: float


@jax.jit
def _largest_lengths(blocks: Sequence[Float[Array, "_ E"]]) -> Float32[Array, "2"]:
    """Return the fields of Bfloat16Bounds."""

    def block(rows: Float[Array, "_ E"]) -> Float32[Array, "2"]:
        half = rows.astype(jnp.bfloat16).astype(jnp.float32)
        both = jnp.stack([jnp.square(half).sum(axis=1), jnp.square(rows - half).sum(axis=1)])
        return both.max(axis=1)

    return jnp.sqrt(jnp.stack([block(rows) for rows in blocks]).max(axis=0))


class DenseIndex:
    """An exact vector index on the device, searched in batches of few sizes, so that few programs are compiled.

    A float32 matrix is not copied on CPU, not even a read-only memory map; it must not change meanwhile.

    Attributes:
        rows: the vectors.
        work: the work of the latest search, without padding.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"]):
        self.rows: Float32[Array, "N E"] = jax.device_put(vectors, may_alias=True)
        self.work = Work()
        self._longest = refine.longest(vectors)

    def __len__(self) -> int:
        return len(self.rows)

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """Return the bytes of the vectors."""
        return self.rows.nbytes

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return the min(k, len) best rows of each query: cosines, best first, and rows; the lower row wins a tie.

        Raises UserError for queries of another width, for NaN or infinity in them, and for k < 1.
        """
        refine.check_queries(queries, self.dim, k)
        self.work, k = Work(), min(k, len(self))
        if not len(queries):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        size = self._batch
        batches = [queries[start : start + size] for start in range(0, len(queries), size)]
        scores, ids = refine.stacked([self._search(batch, k) for batch in batches])
        return scores, ids

    def path(self, queries: int, k: int) -> Literal["exact"]:
        """Return how a batch of so many queries is searched: always exactly."""
        return "exact"

    def product_dtype(self, queries: int, k: int) -> Literal["float32", "bfloat16"]:
        """Return the dtype in which so many queries of one batch (1,024 at most) are multiplied by all vectors.

        The scores that are returned are float32 products either way.
        """
        many = queries >= _MANY and bool(self._blocks) and _by_groups(len(self), queries, k)
        return "bfloat16" if many and any("bf16" in flag for flag in cpu_flags()) else "float32"

    @property
    def _batch(self) -> int:
        """Return the power of two of queries whose maxima take no more than _MAXIMA_BYTES, but at least _MANY."""
        fitting = _MAXIMA_BYTES // (4 * (len(self) // _GROUP + 1))
        return min(_BATCH, previous_power_of_two(max(_MANY, fitting)))

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Search by bfloat16 products where that pays, and again in float32 what they do not prove."""
        if self.product_dtype(len(queries), k) == "float32":
            return self._search_in_full(queries, k)
        scores, ids, proven = self._prove(queries, k)
        if not proven.all():
            scores[~proven], ids[~proven] = self._search_in_full(queries[~proven], k)
        return scores, ids

    def _search_in_full(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        padded, longest = refine.padded(queries), np.float32(self._longest)
        grouped = _by_groups(len(self), len(padded), k)
        if self._blocks and grouped:
            found = _search_pieces(self.rows, padded, self._maxima(padded, half=False), k, longest)
        else:
            found = search(self.rows, padded, k, longest)
        scan = 2 * self.nbytes // 4 * len(queries)
        passes = 1 if grouped else ceil_div(len(queries), refine.FEW)
        self.work += Work(passes * self.nbytes, self.nbytes, float32=scan)
        again = _GROUP * (k + _spare(k)) if grouped else (k + _spare(k)) * (len(padded) == 1)
        self.work += refine.work(self.dim, again, len(queries))
        scores, ids = (np.array(part[: len(queries)]) for part in jax.device_get(found))
        return scores, ids

    def _prove(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return the results by bfloat16 maxima, and whether each is proven to be exact.

        |q.x - q'.x'| <= |q - q'| |x'| + |q| |x - x'|, for vectors q, x that round to q', x'.
        """
        padded = refine.padded(queries, refine.LEAST)
        length = refine.lengths(padded)
        error = refine.lengths(padded - padded.astype(jnp.bfloat16).astype(np.float32))
        worst = self._bfloat16_bounds
        slack = error * worst.length + length * (worst.error + refine.rounding(self.dim) * worst.length)
        maxima = self._maxima(padded, half=True)
        found = _prove_pieces(self.rows, padded, maxima, slack.astype(np.float32), k)
        self.work += Work(self.nbytes, self.nbytes, bfloat16=2 * self.nbytes // 4 * len(queries))
        self.work += refine.work(self.dim, _GROUP * _groups_to_prove(k), len(queries))
        scores, ids, proven = (np.array(part[: len(queries)]) for part in jax.device_get(found))
        return scores, ids, proven

    def _maxima(self, queries: np.ndarray, half: bool) -> list[Float32[Array, "Q _"]]:
        return [_maxima_of_blocks(piece, queries, half) for piece in self._pieces]

    @cached_property
    def _bfloat16_bounds(self) -> Bfloat16Bounds:
        """Return the bounds, computed when first needed because all vectors are read for them."""
        worst = np.max([np.asarray(_largest_lengths(piece)) for piece in self._pieces], axis=0)
        return Bfloat16Bounds(*worst.tolist())

    @property
    def _pieces(self) -> list[list[Array]]:
        return [self._blocks[i : i + _BLOCKS] for i in range(0, len(self._blocks), _BLOCKS)]

    @cached_property
    def _blocks(self) -> list[Array]:
        """Return the whole groups of rows, in blocks that share their memory; none where they would be copies."""
        if next(iter(self.rows.devices())).platform != "cpu":
            return []
        rows = np.asarray(self.rows)[: len(self) // _GROUP * _GROUP]
        return [
            jax.device_put(rows[start : start + _ROWS], may_alias=True)
            for start in range(0, len(rows), _ROWS)
        ]


@dataclass(frozen=True)
class Exact:
    """Options of exact search; there are none."""

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> DenseIndex:
        return DenseIndex(vectors)
