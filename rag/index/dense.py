"""Exact nearest neighbours by cosine: the inner product of unit vectors, every vector looked at.

    N vectors (rows, of which the first `live` count), Q queries, E embedding dim, k results

The matrix product is nearly all of the work. It reads the vectors in place (a memory-mapped file is not
copied), and is done for a block of queries at a time, so that scores never outgrow the vectors. On CPU a
query's scores have the same bits whatever batch it comes in, and equal vectors score equally: XLA multiplies
two or more queries by one kernel, and a lone query is padded to take it too.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rag.ops.topk import two_level_top_k
from rag.types import UserError

_BATCH = 256  # queries of one call to XLA
_LEAST = 4  # queries of the smallest program: below, XLA's kernels differ, and int8 or bfloat16 fall off theirs
_BLOCK = 64  # queries scored at once: enough to keep the multipliers busy
_SCORES = 1 << 26  # float32 scores held at once, unless _LEAST queries already need more
_CHECKED_ROWS = 1 << 14


def search_one(
    vectors: Float[Array, "N E"], query: Float[Array, "E"], live: Int[Array, ""], k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """The k best of vectors[:live] for one query: scores, best first, and row numbers; see two_level_top_k."""
    with jax.named_scope("scores"):
        scores = jnp.einsum(
            "ne,e->n", vectors, query, precision="highest", preferred_element_type=jnp.float32
        )
    with jax.named_scope("top_k"):
        return two_level_top_k(scores, live, k)


@partial(jax.jit, static_argnames="k")
def search(
    vectors: Float[Array, "N E"], queries: Float[Array, "Q E"], k: int, live: Int[Array, ""] | None = None
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """For each query the min(k, N) rows of highest inner product: scores, best first, and row numbers (int32).

    Exact in float32; the lower row wins a tie. Only the first `live` rows count (None: all), whatever stands
    in the others; where live < k the last k - live results have score -inf and a meaningless row number.
    """
    n = vectors.shape[0]
    live = jnp.asarray(n if live is None else live)
    one = partial(search_one, vectors, live=live, k=min(k, n))
    block = _queries_at_once(n)
    if len(queries) <= block:
        return jax.vmap(one)(queries)
    return jax.lax.map(one, queries, batch_size=block)


def _queries_at_once(n: int) -> int:
    """The largest power of two, from _LEAST to _BLOCK, whose scores against n vectors stay within _SCORES."""
    fitting = max(_SCORES // max(n, 1), 1)
    return max(_LEAST, min(_BLOCK, 1 << (fitting.bit_length() - 1)))


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
        """The min(k, len) best rows of each query: cosines, best first, and row numbers, lower ones first on ties.

        UserError for queries of another width, for NaN or infinity in them, and for k < 1.
        """
        self._check(queries, k)
        k = min(k, self._live)
        found = [
            self._search(queries[start : start + _BATCH], k) for start in range(0, len(queries), _BATCH)
        ]
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
        """Append rows. Room doubles when it is full; otherwise this neither copies nor compiles anything anew."""
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
