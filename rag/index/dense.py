"""Exact nearest neighbours by cosine: the inner product of unit vectors, every vector looked at.

    N vectors (rows, of which the first `live` count), Q queries, E embedding dim, k results
    G groups of consecutive rows, C candidates

Reading the vectors is nearly all of the work for a few queries: all scores of a query are kept, and its best
rows taken from them. For many queries multiplying is, and writing N x Q scores would cost as much again: the
rows are taken in blocks that stay in the processor's cache, only the maxima of small groups of rows are kept,
and the rows of the best groups are scored once more. Either way the vectors are read in place (a memory map
is not copied), and the temporary memory is a small part of theirs.

Which program serves a query depends on the batch it comes in, and XLA's product rounds differently from
program to program. So the scores that are returned, and the order they give, always come from one small
product, a query by its candidates: a result does not change with the batch, and equal vectors tie.
"""

from functools import partial, reduce

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int

from rag.ops.topk import best_members, members, two_level_top_k
from rag.types import UserError

_BATCH = 256  # queries of one call to XLA
_LEAST = 4  # queries of the smallest program: below it int8 and bfloat16 products fall off their fast path
_FEW = 16  # queries for which all scores are kept at once
_ROWS = 2048  # rows of a block: with _BATCH queries their scores are 2 MiB
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
    if len(queries) <= _FEW:
        return jax.vmap(partial(_search_one, vectors, live=live, k=k))(queries)
    if n < max(1024 * k, _ROWS):  # scoring the best groups once more would cost too much
        return jax.lax.map(partial(_search_one, vectors, live=live, k=k), queries, batch_size=_FEW)
    one = partial(_search_groups, vectors, live=live, k=k)
    # One query after the other: the rows of a query's best groups fit the processor's cache, a batch's do not.
    return jax.lax.map(lambda query: one(*query), (queries, _group_maxima(vectors, queries).T))


def _search_one(
    vectors: Float[Array, "N E"], query: Float[Array, "E"], live: Int[Array, ""], k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """One query by way of all its scores."""
    best, ids = two_level_top_k(_scores(vectors, query), live, min(k + _SPARE, len(vectors)))
    order = jnp.argsort(ids)  # of ids, so that a tie goes to the lower one
    return _rescored(vectors, query, ids[order], (best > -jnp.inf)[order], k)


def _search_groups(
    vectors: Float[Array, "N E"],
    query: Float[Array, "E"],
    maxima: Float[Array, "G"],
    live: Int[Array, ""],
    k: int,
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """One query by way of the maximum of its scores in each group of rows."""
    whole = live // _GROUP
    best, winners = two_level_top_k(maxima, whole, k + _SPARE)
    ids, usable = members(jnp.where(best > -jnp.inf, winners, whole), live, _GROUP)
    return _rescored(vectors, query, ids, usable, k)


def _scores(vectors: Float[Array, "N E"], query: Float[Array, "E"]) -> Float32[Array, "N"]:
    with jax.named_scope("scores"):
        return jnp.einsum("ne,e->n", vectors, query, precision="highest", preferred_element_type=jnp.float32)


def _rescored(
    vectors: Float[Array, "N E"],
    query: Float[Array, "E"],
    ids: Int[Array, "C"],
    usable: Bool[Array, "C"],
    k: int,
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """The k best of the candidates `ids`, which ascend, by scores that only the query and the row decide."""
    with jax.named_scope("rescore"):
        rows = vectors.at[ids].get(mode="clip")
        # Twice the query: XLA's product with a single column rounds a row by where it stands.
        scores = jax.vmap(_scores, in_axes=(None, 0))(rows, jnp.stack([query, query]))[0]
        return best_members(scores, ids, usable, k)


def _group_maxima(vectors: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "G Q"]:
    """The highest score in each whole group of _GROUP consecutive rows; N >= _ROWS."""
    groups, step = len(vectors) // _GROUP, _ROWS // _GROUP

    def one(rows, query):
        scores = _scores(rows, query)  # the first of every group, then the second of every group, ...
        return reduce(jnp.maximum, [scores[i * step : (i + 1) * step] for i in range(_GROUP)])

    def block(i, maxima):
        first = jnp.minimum(i * step, groups - step)  # the last block overlaps the one before
        rows = jax.lax.dynamic_slice_in_dim(vectors, first * _GROUP, _ROWS)
        rows = rows.reshape(step, _GROUP, -1).swapaxes(0, 1).reshape(_ROWS, -1)
        found = jax.vmap(partial(one, rows), out_axes=1)(queries)
        return jax.lax.dynamic_update_slice_in_dim(maxima, found, first, axis=0)

    maxima = jnp.zeros((groups, len(queries)), jnp.float32)
    return jax.lax.fori_loop(0, -(-groups // step), block, maxima)


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
        scores, ids = search(self._rows, padded, k, np.int32(self._live))
        return np.asarray(scores)[: len(queries)], np.asarray(ids)[: len(queries)]

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
