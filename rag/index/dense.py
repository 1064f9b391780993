"""Exact nearest neighbours by cosine: the inner product of unit vectors, every vector looked at.

    N vectors (rows, of which the first `live` count), Q queries, E embedding dim, k results
    G groups of consecutive rows, R rows of a block, C candidates

Reading the vectors is nearly all of the work for a few queries: all scores of a query are kept, and its best
rows taken from them. For many queries multiplying is, and writing N x Q scores would cost as much again: the
rows are taken in blocks whose scores stay in the processor's cache, only the maxima of small groups of rows
are kept, and the rows of the best groups are scored once more. Either way the vectors are read in place (a
memory map is not copied), and the temporary memory is a small part of theirs.

Which program serves a query depends on the batch it comes in, and XLA's product rounds differently from
program to program. So the scores that are returned, and the order they give, always come from one small
product, a query by its candidates: a result does not change with the batch, and equal vectors tie.
"""

from collections.abc import Callable, Sequence
from functools import cached_property, partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from rag.ops.topk import best_members, members, two_level_top_k
from rag.types import UserError

_BATCH = 256  # queries of one call to XLA
_LEAST = 4  # queries of the smallest program: below it int8 and bfloat16 products fall off their fast path
_FEW = 8  # queries for which all scores are kept at once
_ROWS = 4096  # rows of a block: with _BATCH queries their scores are 4 MiB
_BLOCKS = 64  # blocks that one program takes: it grows with them
_GROUP = 8  # rows of a group: fewer leave more maxima to choose from, more leave more rows to score again
_SPARE = 2  # candidates beyond k, for those that another rounding would have let in
_CHECKED_ROWS = 1 << 14


@partial(jax.jit, static_argnames="k")
def search(
    vectors: Float[Array, "N E"], queries: Float[Array, "Q E"], k: int, live: Int[Array, ""] | None = None
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """For each query the min(k, N) rows of highest inner product: scores, best first, and int32 row numbers.

    Exact in float32; the lower row wins a tie. Only the first `live` rows count (None: all), whatever stands
    in the others; where live < k the last k - live results have score -inf and a meaningless row number.
    """
    n = len(vectors)
    k = min(k, n)
    live = jnp.asarray(n if live is None else live)
    if _by_groups(n, len(queries), k):
        return _search_groups(vectors, queries, _maxima(vectors, queries), k, live)
    one = partial(_best_scores, vectors, k=min(k + _SPARE, n), live=live)
    return _in_blocks(lambda block: _rescored(vectors, block, *jax.vmap(one)(block), k), _FEW, queries)


def _by_groups(n: int, queries: int, k: int) -> bool:
    """Whether group maxima pay: not for few queries, nor if the best groups are a good part of all rows."""
    return queries > _FEW and n >= max(256 * k, _ROWS)


def _best_scores(
    vectors: Float[Array, "N E"], query: Float[Array, "E"], k: int, live: Int[Array, ""]
) -> tuple[Int[Array, "k"], Bool[Array, "k"]]:
    """The rows of one query's k highest scores, ascending, and which of them count."""
    best, ids = two_level_top_k(_scores(vectors, query), live, k)
    order = jnp.argsort(ids)
    return ids[order], (best > -jnp.inf)[order]


def _best_groups(
    maxima: Float[Array, "G"], k: int, live: Int[Array, ""]
) -> tuple[Int[Array, "C"], Bool[Array, "C"]]:
    """The rows of the k groups of highest maximum for one query, ascending, and which of them count."""
    whole = live // _GROUP
    best, winners = two_level_top_k(maxima, whole, k)
    return members(jnp.where(best > -jnp.inf, winners, whole), live, _GROUP)


def _search_groups(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Float[Array, "Q G"],
    k: int,
    live: Int[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """Each query by way of the highest scores in the groups of rows."""
    one = partial(_best_groups, k=k + _SPARE, live=live)

    def block(queries, maxima):
        return _rescored(vectors, queries, *jax.vmap(one)(maxima), k)

    return _in_blocks(block, _LEAST, queries, maxima)  # few at once: their rows fit the processor's cache


def _in_blocks(
    search: Callable[..., tuple[Array, Array]], size: int, *arrays: Float[Array, "Q _"]
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """`search` of the arrays, at most `size` rows at a time."""
    count = len(arrays[0])
    if count <= size:
        return search(*arrays)
    padded = [jnp.pad(array, ((0, -count % size), (0, 0))) for array in arrays]
    blocks = [array.reshape(-1, size, array.shape[1]) for array in padded]
    scores, ids = jax.lax.map(lambda block: search(*block), blocks)
    return jax.lax.collapse(scores, 0, 2)[:count], jax.lax.collapse(ids, 0, 2)[:count]


def _scores(vectors: Float[Array, "N E"], query: Float[Array, "E"]) -> Float32[Array, "N"]:
    with jax.named_scope("scores"):
        return jnp.einsum("ne,e->n", vectors, query, precision="highest", preferred_element_type=jnp.float32)


def _rescored(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    ids: Int[Array, "Q C"],
    usable: Bool[Array, "Q C"],
    k: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k best of each query's candidates, by scores that only the query and the row decide.

    XLA is slow to multiply each query by rows of its own, and rounds a row by where it stands if there is only
    one query. So all rows are multiplied by all queries, of which there are at least two, and each query
    keeps its own.
    """
    with jax.named_scope("rescore"):
        count, width = ids.shape
        rows = vectors.at[ids.ravel()].get(mode="clip")
        scores = jax.vmap(partial(_scores, rows), out_axes=1)(queries).reshape(count, width, count)
        own = scores[jnp.arange(count), :, jnp.arange(count)]
        return jax.vmap(partial(best_members, k=k))(own, ids, usable)


def _maxima(vectors: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q G"]:
    """The highest score in each whole group of consecutive rows; N >= _ROWS."""
    groups, step = len(vectors) // _GROUP, _ROWS // _GROUP

    def block(i, maxima):
        first = jnp.minimum(i * step, groups - step)  # the last block overlaps the one before
        rows = jax.lax.dynamic_slice_in_dim(vectors, first * _GROUP, _ROWS)
        return jax.lax.dynamic_update_slice_in_dim(maxima, _block_maxima(rows, queries), first, axis=1)

    return jax.lax.fori_loop(0, -(-groups // step), block, jnp.zeros((len(queries), groups), jnp.float32))


def _block_maxima(rows: Float[Array, "R E"], queries: Float[Array, "Q E"]) -> Float32[Array, "Q G"]:
    return jax.vmap(lambda query: _scores(rows, query).reshape(-1, _GROUP).max(axis=1))(queries)


@jax.jit
def _maxima_of_blocks(
    blocks: Sequence[Float[Array, "_ E"]], queries: Float[Array, "Q E"]
) -> Float32[Array, "Q G"]:
    """_maxima of the blocks one below the other: as arrays of their own they need not be copied out of one."""
    return jnp.concatenate([_block_maxima(rows, queries) for rows in blocks], axis=1)


@partial(jax.jit, static_argnames="k")
def _search_pieces(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    maxima: Sequence[Float[Array, "Q _"]],
    k: int,
    live: Int[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    return _search_groups(vectors, queries, jnp.concatenate(maxima, axis=1), k, live)


class DenseIndex:
    """Vectors on the device, searched in batches of few shapes, so that few programs are ever compiled.

    A float32 matrix is not copied on CPU, even a read-only memory map; it must not change meanwhile.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"]):
        self._rows = jax.device_put(vectors, may_alias=True)
        self._live = len(vectors)

    def __len__(self) -> int:
        return self._live

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """The min(k, len) best rows of each query: cosines, best first, and row numbers; lower ones win ties.

        UserError for queries of another width, for NaN or infinity in them, and for k < 1.
        """
        self._check(queries, k)
        k = min(k, self._live)
        found = [self._search(queries[start : start + _BATCH], k) for start in range(0, len(queries), _BATCH)]
        scores, ids = zip(*found, strict=True) if found else ([np.zeros((0, k))], [np.zeros((0, k))])
        return np.concatenate(scores).astype(np.float32), np.concatenate(ids).astype(np.int32)

    def _search(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
        padded = np.zeros((_bucket(len(queries)), queries.shape[1]), np.float32)
        padded[: len(queries)] = queries
        live = np.int32(self._live)
        if self._blocks and _by_groups(self._live, len(padded), k):
            pieces = [self._blocks[i : i + _BLOCKS] for i in range(0, len(self._blocks), _BLOCKS)]
            maxima = [_maxima_of_blocks(piece, padded) for piece in pieces]
            scores, ids = _search_pieces(self._rows, padded, maxima, k, live)
        else:
            scores, ids = search(self._rows, padded, k, live)
        return np.asarray(scores)[: len(queries)], np.asarray(ids)[: len(queries)]

    @cached_property
    def _blocks(self) -> list[Array]:
        """The whole groups of rows, in blocks that share their memory; none where they would be copies."""
        if next(iter(self._rows.devices())).platform != "cpu":
            return []
        rows = np.asarray(self._rows)[: self._live // _GROUP * _GROUP]
        return [
            jax.device_put(rows[start : start + _ROWS], may_alias=True)
            for start in range(0, len(rows), _ROWS)
        ]

    def _check(self, queries: np.ndarray, k: int) -> None:
        width = self._rows.shape[1]
        if queries.shape[1] != width:
            raise UserError(
                f"The query vectors have {queries.shape[1]} dimensions and the index has {width}: "
                "embed them with the embedder that built the index."
            )
        if not np.isfinite(queries).all():
            raise UserError("A query vector holds NaN or infinity: check the embedder and its input.")
        if k < 1:
            raise UserError(f"Cannot return {k} results: ask for k of 1 or more.")

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows. Full room doubles; otherwise this neither copies nor compiles anything anew."""
        rows = np.zeros((_bucket(len(vectors)), vectors.shape[1]), np.float32)
        rows[: len(vectors)] = vectors
        needed = self._live + len(rows)  # the padding is written too: a later addition overwrites it
        self._blocks = []  # they cannot share memory that is about to be written to
        if needed > len(self._rows):  # so always before the first addition: the caller's memory is not ours
            self._rows = _grown(self._rows, max(needed, 2 * self._live))
        self._rows = _append(self._rows, rows, np.int32(self._live))
        self._live += len(vectors)


def _bucket(count: int) -> int:
    """The power of two, at least _LEAST, that holds `count`."""
    return max(_LEAST, 1 << (count - 1).bit_length())


@partial(jax.jit, static_argnames="capacity")
def _grown(rows: Float[Array, "N E"], capacity: int) -> Float[Array, "C E"]:
    return jnp.zeros((capacity, rows.shape[1]), rows.dtype).at[: len(rows)].set(rows)


@partial(jax.jit, donate_argnames="buffer")
def _append(
    buffer: Float[Array, "C E"], rows: Float[Array, "n E"], live: Int[Array, ""]
) -> Float[Array, "C E"]:
    """Write rows in place (the buffer is donated: undonated, all of it would be copied)."""
    return jax.lax.dynamic_update_slice(buffer, rows, (live, jnp.zeros_like(live)))


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
