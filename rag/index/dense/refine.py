"""Exact scores of candidates: the last step of every vector search, and the proof that the candidates were enough.

    N vectors (rows), Q queries, E embedding dim, k results, C candidates; groups: of consecutive rows

A cheap first pass gives an upper bound on the scores of every group of rows. The groups of highest bound are scored
exactly. If the k-th best exact score is above every bound that was left out, no other row can be among the k best:
the result is proven, whatever the first pass was.

XLA rounds products differently from program to program. So the scores that are returned, and their order, always come
from one kind of product, `products`, which rounds a query and a row the same way in every batch: a result does not
depend on the batch, and equal vectors tie.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Shaped

from rag.ops.topk import best_members, members, two_level_top_k
from rag.runtime.machine.measurement import Work
from rag.runtime.shapes import next_power_of_two, round_up
from rag.types import UserError

LEAST = 4  # rows of the smallest batch: below that int8 and bfloat16 products are slow
FEW = 8  # queries of a block whose scores are all in memory at once
_LEAST_ROWS = 16  # below that XLA rounds a row by how many there are
_LENGTHS_AT_ONCE = 1 << 12  # rows
_SHORTEST = 1e-18  # whose square float32 still holds

Found = tuple[Float[Array, "Q k"], Int[Array, "Q k"]]  # scores, best first, and row numbers


def scores(vectors: Float[Array, "N E"], query: Float[Array, "E"]) -> Float32[Array, "N"]:
    """Return the inner products in full float32."""
    with jax.named_scope("scores"):
        return jnp.einsum("ne,e->n", vectors, query, precision="highest", preferred_element_type=jnp.float32)


def products(rows: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "N Q"]:
    """Return all inner products in full float32, each always the same number for the same row and query.

    XLA rounds a product by the shapes of its factors: by the number of queries, and by the number of rows where they
    are few. So queries are multiplied in blocks of one size, padded by repeating them, and so are few rows. The barrier
    keeps XLA from making one program of the product and of what is done with it.
    """
    (n, dim), count = rows.shape, len(queries)
    if n == 0:
        return jnp.zeros((0, count), jnp.float32)
    rows = jnp.resize(rows, (_LEAST_ROWS, dim)) if n < _LEAST_ROWS else rows
    factors = jnp.resize(queries, (round_up(count, FEW), dim)) if count % FEW else queries
    of_block = jax.vmap(partial(scores, rows), out_axes=1)
    blocks = [
        jax.lax.optimization_barrier(of_block(factors[at : at + FEW])) for at in range(0, len(factors), FEW)
    ]
    return jnp.concatenate(blocks, axis=1)[:n, :count]


def refine(
    vectors: Float[Array, "N E"], queries: Float[Array, "Q E"], ids: Int[Array, "Q C"], k: int
) -> Found:
    """Return the k best of each query's candidates by exact scores; the first candidate wins a tie.

    XLA is slow to multiply each query by rows of its own, so all rows are multiplied by all queries, and each query
    takes its own.

    Args:
        vectors: all rows.
        queries: any number of them.
        ids: the candidates, as row numbers; those of N and above are padding.
        k: the number of results.
    """
    with jax.named_scope("refine"):
        count, width = ids.shape
        rows = vectors.at[ids.ravel()].get(mode="clip")
        own = products(rows, queries).reshape(count, width, count)[jnp.arange(count), :, jnp.arange(count)]
        return jax.vmap(partial(best_members, n=len(vectors), k=k))(own, ids)


def best_of_groups(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    bounds: Float[Array, "Q groups"],
    slack: Float[Array, "Q"],
    *,
    k: int,
    group: int,
    groups: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Bool[Array, "Q"]]:
    """Return the k best rows in the `groups` groups of highest bound, and whether they are proven the best of all.

    Args:
        vectors: all rows.
        queries: any number of them.
        bounds: bounds[q, g] + slack[q] is no less than the score of any row of group g, whose rows are
            g * group to (g + 1) * group - 1. The rows after the last whole group are always candidates.
        slack: see `bounds`.
        k: the number of results.
        group: the number of rows in a group.
        groups: the number of groups that are scored exactly.
    """

    def candidates(bounds: Float[Array, "groups"]) -> tuple[Int[Array, "C"], Float[Array, ""] | float]:
        best, winners = two_level_top_k(bounds, min(groups + 1, len(bounds)))
        highest_left_out = best[groups] if len(best) > groups else -jnp.inf
        return members(winners[:groups], len(vectors), group), highest_left_out

    def block(queries: Array, bounds: Array, slack: Array) -> tuple[Array, Array, Array]:
        ids, left_out = jax.vmap(candidates)(bounds)
        best, ids = refine(vectors, queries, ids, k)
        return best, ids, (left_out == -jnp.inf) | (best[:, -1] > left_out + slack)

    # Few queries at once, so that their rows fit the processor's cache.
    best, ids, proven = in_blocks(block, LEAST, queries, bounds, slack)
    return best, ids, proven


def best_of_estimates(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    estimates: Float[Array, "Q N"],
    *,
    k: int,
    candidates: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Float[Array, "Q"]]:
    """Return the k best, by exact scores, of each query's rows of highest estimate.

    Args:
        vectors: all rows.
        queries: any number of them.
        estimates: of the score of every row.
        k: the number of results.
        candidates: how many rows of highest estimate are scored exactly.

    Returns:
        Scores, row numbers, and the last of the candidates' estimates, which no row that is left out exceeds; -inf
        where none is left out.
    """

    def chosen(estimates: Float[Array, "N"]) -> tuple[Int[Array, "C"], Float32[Array, ""]]:
        best, ids = two_level_top_k(estimates, candidates)
        last = best[-1] if candidates < len(estimates) else -jnp.inf
        return jnp.sort(ids), jnp.asarray(last, jnp.float32)

    def block(queries: Array, estimates: Array) -> tuple[Array, Array, Array]:
        ids, last = jax.vmap(chosen)(estimates)
        return *refine(vectors, queries, ids, k), last

    best, ids, last = in_blocks(block, LEAST, queries, estimates)
    return best, ids, last


def best_of_all(vectors: Float[Array, "N E"], queries: Float[Array, "Q E"], *, k: int) -> Found:
    """Return the k best of all rows by exact scores of every row; the lower row wins a tie."""

    def block(queries: Array) -> tuple[Array, Array]:
        every = products(vectors, queries)
        return jax.vmap(partial(two_level_top_k, k=k), in_axes=1)(every)

    best, ids = in_blocks(block, FEW, queries)
    return best, ids


def search_unproven(
    proven: Bool[Array, "Q"], found: Found, vectors: Float[Array, "N E"], queries: Float[Array, "Q E"]
) -> Found:
    """Return `found`, with the results of `best_of_all` in every block of queries of which one is not proven.

    Args:
        proven: for which queries the results are proven.
        found: the results so far.
        vectors: all rows.
        queries: the queries of `found`.
    """

    def block(unproven: Array, best: Array, ids: Array, queries: Array) -> tuple[Array, Array]:
        def again() -> Found:
            return best_of_all(vectors, queries, k=best.shape[1])

        return jax.lax.cond(unproven.any(), again, lambda: (best, ids))

    best, ids = in_blocks(block, FEW, ~proven, *found, queries)
    return best, ids


def in_blocks(
    search: Callable[..., tuple[Array, ...]], size: int, *arrays: Shaped[Array, "Q ..."]
) -> tuple[Array, ...]:
    """Return `search` of the arrays, at most `size` rows at a time."""
    count = len(arrays[0])
    if count <= size:
        return search(*arrays)
    padded = [jnp.pad(array, ((0, -count % size), *((0, 0),) * (array.ndim - 1))) for array in arrays]
    blocks = [array.reshape(len(array) // size, size, *array.shape[1:]) for array in padded]
    found = jax.lax.map(lambda block: search(*block), blocks)
    return tuple(jax.lax.collapse(array, 0, 2)[:count] for array in found)


def work(dim: int, candidates: int, queries: int) -> Work:
    """Return the work of scoring so many candidates of each query exactly."""
    read = 4 * dim * candidates
    return Work(read * queries, read, float32=2 * dim * candidates * queries)


def rounding(dim: int) -> float:
    """Return how much two float32 products of the same vectors may differ, relative to the vectors' lengths.

    A sum of `dim` products in any order is off by half an epsilon for each of them at most. That is doubled, and a
    handful of roundings beside the sums is added: all proofs allow for rounding by this one term.
    """
    return 2 * (dim + 8) * float(np.finfo(np.float32).eps)


def longest(vectors: Float32[np.ndarray, "N E"]) -> float:
    """Return the length of the longest vector, but no less than what keeps products with it from underflow."""
    blocks = (vectors[start : start + _LENGTHS_AT_ONCE] for start in range(0, len(vectors), _LENGTHS_AT_ONCE))
    squares = (float(np.einsum("ne,ne->n", block, block).max()) for block in blocks)
    return max(max(squares, default=0.0) ** 0.5, _SHORTEST)


def lengths(vectors: Float[np.ndarray, "Q E"]) -> Float64[np.ndarray, "Q"]:
    """Return the Euclidean lengths in float64."""
    return np.linalg.norm(vectors.astype(np.float64), axis=1)


def check_queries(queries: Float[np.ndarray, "Q E"], dim: int, k: int) -> None:
    """Raise UserError for queries of another width, for NaN or infinity in them, and for k < 1."""
    if queries.shape[1] != dim:
        raise UserError(
            f"The query vectors have {queries.shape[1]} dimensions and the index has {dim}: "
            "embed them with the embedder that built the index."
        )
    with np.errstate(over="ignore"):
        finite = np.isfinite(queries.astype(np.float32)).all()
    if not finite:
        raise UserError("A query vector holds NaN or infinity: check the embedder and its input.")
    if k < 1:
        raise UserError(f"Cannot return {k} results: ask for k of 1 or more.")


def padded(vectors: Float[np.ndarray, "Q E"], least: int = 1) -> Float32[np.ndarray, "padded E"]:
    """Return the vectors with rows of zeros below, up to a power of two of rows, at least `least`.

    Batches of many sizes so share few programs.
    """
    count = next_power_of_two(len(vectors), least)
    return np.pad(vectors.astype(np.float32), ((0, count - len(vectors)), (0, 0)))


def stacked(found: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """Return the results of batches as those of one."""
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))
