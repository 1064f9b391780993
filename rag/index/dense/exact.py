"""Exact nearest neighbours by cosine: the inner product of unit vectors, every vector looked at.

    N vectors (rows, of which the first `live` count), Q queries, E embedding dim, k results
    G groups of consecutive rows, R rows of a block

Reading the vectors is nearly all of the work for a few queries: all scores of a query are kept, and its best
rows taken from them. For many queries multiplying is, and writing N x Q scores would cost as much again: the
rows are taken in blocks whose scores stay in the processor's cache, only the maxima of small groups of rows
are kept, and the rows of the best groups are scored once more. From a few dozen queries on, a processor with
bfloat16 products finds the maxima several times faster in those, from blocks converted as they are read.

Each way rounds differently, and near duplicates are closer than that. What rounding can have changed is bounded, and
queries whose result that leaves in doubt are searched again: from bfloat16 in float32, and from there by scoring all
rows as the results are scored. Either way the vectors are read in place (a memory map is not copied), the temporary
memory is a small part of theirs, and the results are the same: the k best in float32, ties to the lower row.
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
from rag.index.dense.growing import Growing, _round_up
from rag.runtime.machine import cpu_flags
from rag.runtime.measurement import Work
from rag.types import UserError

_BATCH = 1024  # queries of one call to XLA, unless their maxima would take more than
_MAXIMA_BYTES = 256 << 20
_MANY = 32  # queries from which bfloat16 pays for converting the vectors, and for proving
_ROWS = 4096  # rows of a block: with 256 queries their scores are 4 MiB
_BLOCKS = 64  # blocks that one program takes: it grows with them
_GROUP = 8  # rows of a group: fewer leave more maxima to choose from, more leave more rows to score again
_CHECKED_ROWS = 1 << 14
_BY_ROWS = (((1,), (1,)), ((), ()))


@partial(jax.jit, static_argnames="k")
def search(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    k: int,
    live: Int[Array, ""] | None = None,
    longest: Float[Array, ""] | None = None,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """For each query the min(k, N) rows of highest inner product: scores, best first, and int32 row numbers.

    Exact in float32; the lower row wins a tie. Only the first `live` rows count (None: all), whatever stands
    in the others; where live < k the last k - live results have score -inf and a meaningless row number.
    `longest` is the length of the longest live row, or more; None finds it.
    """
    n = len(vectors)
    k = min(k, n)
    live = jnp.asarray(n if live is None else live)
    slack = _rounding(vectors, queries, live, longest)
    if _by_groups(n, len(queries), k):
        return _search_groups(vectors, queries, _maxima(vectors, queries), slack, k, live)
    if len(queries) > 1 or k + _spare(k) >= n:
        return refine.all_scored(vectors, queries, live, k=k)
    estimates = refine.scores(vectors, queries[0])[None]
    options = {"k": k, "candidates": k + _spare(k)}
    *found, last = refine.best_of_estimates(vectors, queries, estimates, live, **options)
    proven = (found[0][:, -1] > last + slack) | ~queries.any(axis=1)
    return refine.where_exact(proven, tuple(found), vectors, queries, live)


def _by_groups(n: int, queries: int, k: int) -> bool:
    """Whether group maxima pay: not for few queries, nor if the best groups are a good part of all rows."""
    return queries > refine.FEW and n >= max(256 * k, _ROWS)


def _spare(k: int) -> int:
    """Candidates beyond k, for those that another rounding would have let in: more are rarely in doubt."""
    return 4 + k // 8


def _rounding(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    live: Int[Array, ""],
    longest: Float[Array, ""] | None,
) -> Float32[Array, "Q"]:
    """What two float32 products of each query and any live row can differ by."""
    if longest is None:
        squares = jnp.square(vectors.astype(jnp.float32)).sum(axis=1)
        longest = jnp.sqrt(jnp.where(jnp.arange(len(vectors)) < live, squares, 0.0).max(initial=0.0))
    largest = jnp.abs(queries).astype(jnp.float32).max(axis=1, keepdims=True)
    parts = queries / jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)  # whose squares do not underflow
    return refine.rounding(vectors.shape[1]) * longest * largest[:, 0] * jnp.linalg.norm(parts, axis=1)


def _search_groups(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Float[Array, "Q G"],
    slack: Float32[Array, "Q"],
    k: int,
    live: Int[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Each query by way of the highest scores in the groups of rows."""
    options = {"k": k, "group": _GROUP, "groups": k + _spare(k)}
    *found, proven = refine.best_of_groups(vectors, queries, maxima, slack, live, **options)
    every_tie = ~queries.any(axis=1)  # then the lowest groups were taken, and rightly
    return refine.where_exact(proven | every_tie, tuple(found), vectors, queries, live)


def _maxima(vectors: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q G"]:
    """The highest score in each whole group of consecutive rows; N >= _ROWS."""
    groups, step = len(vectors) // _GROUP, _ROWS // _GROUP

    def block(i, maxima):
        first = jnp.minimum(i * step, groups - step)  # the last block overlaps the one before
        rows = jax.lax.dynamic_slice_in_dim(vectors, first * _GROUP, _ROWS)
        return jax.lax.dynamic_update_slice_in_dim(maxima, _block_maxima(rows, queries), first, axis=1)

    return jax.lax.fori_loop(0, -(-groups // step), block, jnp.zeros((len(queries), groups), jnp.float32))


def _block_maxima(rows: Float[Array, "R E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q G"]:
    return jax.vmap(lambda query: refine.scores(rows, query).reshape(-1, _GROUP).max(axis=1))(queries)


def _half_maxima(rows: Float[Array, "R E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q G"]:
    """_block_maxima of both rounded to bfloat16."""
    half = (queries.astype(jnp.bfloat16), rows.astype(jnp.bfloat16))
    products = jax.lax.dot_general(*half, _BY_ROWS, preferred_element_type=jnp.float32)
    return products.reshape(len(queries), -1, _GROUP).max(axis=2)


@partial(jax.jit, static_argnames="half")
def _maxima_of_blocks(
    blocks: Sequence[Float[Array, "_ E"]], queries: Float[Array, "Q E"], half: bool
) -> Float32[Array, "Q G"]:
    """_maxima of the blocks one below the other: as arrays of their own they need not be copied out of one."""
    of_block = _half_maxima if half else _block_maxima
    return jnp.concatenate([of_block(rows, queries) for rows in blocks], axis=1)


@partial(jax.jit, static_argnames="k")
def _search_pieces(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Sequence[Float[Array, "Q _"]],
    k: int,
    live: Int[Array, ""],
    longest: Float[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    slack = _rounding(vectors, queries, live, longest)
    return _search_groups(vectors, queries, jnp.concatenate(maxima, axis=1), slack, k, live)


@partial(jax.jit, static_argnames="k")
def _prove_pieces(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Sequence[Float[Array, "Q _"]],
    slack: Float[Array, "Q"],
    k: int,
    live: Int[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Bool[Array, "Q"]]:
    bounds = jnp.concatenate(maxima, axis=1)
    options = {"k": k, "group": _GROUP, "groups": _groups_to_prove(k)}
    return refine.best_of_groups(vectors, queries, bounds, slack, live, **options)


def _groups_to_prove(k: int) -> int:
    """As far as rounding lets rows change places."""
    return k + k // 2 + 8


class RoundedVectors(NamedTuple):
    """What bfloat16 makes of vectors: the largest length of one of them, and of the difference to one."""

    length: float
    error: float


@jax.jit
def _rounded(blocks: Sequence[Float[Array, "_ E"]]) -> Float32[Array, "2"]:
    def block(rows):
        half = rows.astype(jnp.bfloat16).astype(jnp.float32)
        both = jnp.stack([jnp.square(half).sum(axis=1), jnp.square(rows - half).sum(axis=1)])
        return both.max(axis=1)

    return jnp.sqrt(jnp.stack([block(rows) for rows in blocks]).max(axis=0))


class DenseIndex:
    """Vectors on the device, searched in batches of few shapes, so that few programs are ever compiled.

    A float32 matrix is not copied on CPU, even a read-only memory map; it must not change meanwhile. `work` is what the
    latest search did, padding left out.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"]):
        self._rows = Growing(jax.device_put(vectors, may_alias=True))
        self.work = Work()
        self._longest = refine.longest(vectors)

    def __len__(self) -> int:
        return self._rows.live

    @property
    def dim(self) -> int:
        return self.rows.shape[1]

    @property
    def nbytes(self) -> int:
        """Of the vectors."""
        return len(self) * self.dim * self.rows.dtype.itemsize

    @property
    def rows(self) -> Float32[Array, "C E"]:
        """The vectors, and room behind the live ones."""
        return self._rows.values

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """The min(k, len) best rows of each query: cosines, best first, and row numbers; lower ones win ties.

        UserError for queries of another width, for NaN or infinity in them, and for k < 1.
        """
        refine.check_queries(queries, self.dim, k)
        self.work, k = Work(), min(k, len(self))
        if not len(queries):
            return np.zeros((0, k), np.float32), np.zeros((0, k), np.int32)
        size = self._batch
        batches = [queries[start : start + size] for start in range(0, len(queries), size)]
        return refine.stacked([self._search(batch, k) for batch in batches])

    def path(self, queries: int, k: int) -> Literal["exact"]:
        """How a batch of so many queries is searched: always exactly."""
        return "exact"

    def product_dtype(self, queries: int, k: int) -> Literal["float32", "bfloat16"]:
        """The dtype in which so many queries of one batch (1,024 at most) are multiplied by all vectors.

        The scores that are returned are float32 products either way.
        """
        many = queries >= _MANY and bool(self._blocks) and _by_groups(len(self), queries, k)
        return "bfloat16" if many and any("bf16" in flag for flag in cpu_flags()) else "float32"

    @property
    def _batch(self) -> int:
        """The power of two of queries whose maxima take no more than _MAXIMA_BYTES."""
        room = _MAXIMA_BYTES // (4 * (len(self) // _GROUP + 1))
        return max(_MANY, min(_BATCH, 1 << room.bit_length() - 1 if room else 0))

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        """Exact, by bfloat16 where that pays and then again in float32 what it could not prove."""
        if self.product_dtype(len(queries), k) == "float32":
            return self._search_in_full(queries, k)
        scores, ids, proven = self._prove(queries, k)
        if not proven.all():
            scores[~proven], ids[~proven] = self._search_in_full(queries[~proven], k)
        return scores, ids

    def _search_in_full(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        padded, live = refine.padded(queries, _round_up(len(queries), 1)), np.int32(len(self))
        longest, grouped = np.float32(self._longest), _by_groups(len(self), len(padded), k)
        if self._blocks and grouped:
            found = _search_pieces(self.rows, padded, self._maxima(padded, half=False), k, live, longest)
        else:
            found = search(self.rows, padded, k, live, longest)
        scan = 2 * self.nbytes // 4 * len(queries)
        passes = 1 if grouped else -(-len(queries) // refine.FEW)
        self.work += Work(passes * self.nbytes, self.nbytes, float32=scan)
        again = _GROUP * (k + _spare(k)) if grouped else (k + _spare(k)) * (len(padded) == 1)
        self.work += refine.work(self.dim, again, len(queries))
        return tuple(np.array(part[: len(queries)]) for part in jax.device_get(found))

    def _prove(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The results of bfloat16 maxima, and whether each is proven to be the exact one.

        |q.x - q'.x'| <= |q - q'| |x'| + |q| |x - x'|, for vectors q, x that round to q', x'.
        """
        padded, live = refine.padded(queries, _round_up(len(queries))), np.int32(len(self))
        length = refine.lengths(padded)
        error = refine.lengths(padded - padded.astype(jnp.bfloat16).astype(np.float32))
        worst = self._rounded
        slack = error * worst.length + length * (worst.error + refine.rounding(self.dim) * worst.length)
        maxima = self._maxima(padded, half=True)
        found = _prove_pieces(self.rows, padded, maxima, slack.astype(np.float32), k, live)
        self.work += Work(self.nbytes, self.nbytes, bfloat16=2 * self.nbytes // 4 * len(queries))
        self.work += refine.work(self.dim, _GROUP * _groups_to_prove(k), len(queries))
        return tuple(np.array(part[: len(queries)]) for part in jax.device_get(found))

    def _maxima(self, queries: np.ndarray, half: bool) -> list[Float32[Array, "Q _"]]:
        return [_maxima_of_blocks(piece, queries, half) for piece in self._pieces]

    @cached_property
    def _rounded(self) -> RoundedVectors:
        """Found when first needed, because all vectors are read for it."""
        worst = np.max([np.asarray(_rounded(piece)) for piece in self._pieces], axis=0)
        return RoundedVectors(*worst.tolist())

    @property
    def _pieces(self) -> list[list[Array]]:
        return [self._blocks[i : i + _BLOCKS] for i in range(0, len(self._blocks), _BLOCKS)]

    @cached_property
    def _blocks(self) -> list[Array]:
        """The whole groups of rows, in blocks that share their memory; none where they would be copies."""
        if next(iter(self.rows.devices())).platform != "cpu":
            return []
        rows = np.asarray(self.rows)[: len(self) // _GROUP * _GROUP]
        return [
            jax.device_put(rows[start : start + _ROWS], may_alias=True)
            for start in range(0, len(rows), _ROWS)
        ]

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows. Full room doubles; otherwise this neither copies nor compiles anything anew."""
        self._blocks = []  # they cannot share memory that is about to be written to
        self._rows.append(vectors)
        self._longest = max(self._longest, refine.longest(vectors))


@dataclass(frozen=True)
class Exact:
    """Options of a DenseIndex: it has none."""

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> DenseIndex:
        return DenseIndex(vectors)


def check_vectors(vectors: Float[np.ndarray, "N E"]) -> None:
    """UserError unless every row is a finite unit vector: NaN would rank first, zero has no cosine."""
    for start in range(0, len(vectors), _CHECKED_ROWS):  # a memory-mapped matrix stays on disk
        norms = np.linalg.norm(np.asarray(vectors[start : start + _CHECKED_ROWS]), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))
        if len(wrong):
            row, norm = start + wrong[0], norms[wrong[0]]
            what = "holds NaN or infinity" if not np.isfinite(norm) else f"has length {norm:.3g} instead of 1"
            raise UserError(
                f"Vector {row} of {len(vectors)} {what}, so it has no cosine: "
                "leave its text out, or check the embedder that made it."
            )
