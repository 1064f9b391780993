"""What every search of vectors ends with: exact scores of the candidates, and whether these were enough.

    N vectors (rows, of which the first `live` count), Q queries, E embedding dim, k results
    G groups of consecutive rows, C candidates

A cheap first pass says of every group of rows how high a score in it can be at most. The groups of highest
bound are scored exactly. If the k-th best exact score is above every bound that was left out, no other row
can be among the k best: the result is proven, whatever the first pass was.

XLA's products round differently from program to program. So the scores that are returned, and the order they
give, always come from one kind of product, `products`, which rounds a query and a row the same wherever they stand:
a result does not change with the batch, and equal vectors tie.
"""

from collections.abc import Callable, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Shaped

from rag.index.dense.growing import LEAST
from rag.ops.topk import best_members, members, two_level_top_k
from rag.runtime.measurement import Work
from rag.types import UserError

FEW = 8  # queries for which all scores are kept at once
_LEAST_ROWS = 16  # below that XLA rounds a row by how many there are
_LENGTHS_AT_ONCE = 1 << 12  # rows
_SHORTEST = 1e-18  # whose square float32 still holds


def scores(vectors: Float[Array, "N E"], query: Float[Array, "E"]) -> Float32[Array, "N"]:
    """The inner products in full float32."""
    with jax.named_scope("scores"):
        return jnp.einsum("ne,e->n", vectors, query, precision="highest", preferred_element_type=jnp.float32)


def products(rows: Float[Array, "N E"], queries: Float[Array, "Q E"]) -> Float32[Array, "N Q"]:
    """All inner products in full float32, each of them the same number for the same row and query, always.

    XLA rounds a product by the shapes of its factors: by how many queries there are, and by how many rows if they are
    few. So queries are multiplied in blocks of one size, filled up by repeating them, and so are few rows. The barrier
    keeps XLA from making one program of the product and of what is done with it.
    """
    (n, dim), count = rows.shape, len(queries)
    if n == 0:
        return jnp.zeros((0, count), jnp.float32)
    rows = jnp.resize(rows, (_LEAST_ROWS, dim)) if n < _LEAST_ROWS else rows
    factors = jnp.resize(queries, (-(-count // FEW) * FEW, dim)) if count % FEW else queries
    of_block = jax.vmap(partial(scores, rows), out_axes=1)
    blocks = [
        jax.lax.optimization_barrier(of_block(factors[at : at + FEW])) for at in range(0, len(factors), FEW)
    ]
    return jnp.concatenate(blocks, axis=1)[:n, :count]


def refine(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    ids: Int[Array, "Q C"],
    usable: Bool[Array, "Q C"],
    k: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k best of each query's usable candidates by exact scores; the first to stand wins a tie.

    XLA is slow to multiply each query by rows of its own. So all rows are multiplied by all queries, and each query
    keeps its own.
    """
    with jax.named_scope("rescore"):
        count, width = ids.shape
        rows = vectors.at[ids.ravel()].get(mode="clip")
        own = products(rows, queries).reshape(count, width, count)[jnp.arange(count), :, jnp.arange(count)]
        return jax.vmap(partial(best_members, k=k))(own, ids, usable)


def best_of_groups(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    bounds: Float[Array, "Q G"],
    slack: Float[Array, "Q"],
    live: Int[Array, ""],
    *,
    k: int,
    group: int,
    groups: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Bool[Array, "Q"]]:
    """The k best of the `groups` groups of highest bound, and of each query whether no other row can be.

    bounds[q, g] + slack[q] is no less than the score of any row of group g, whose rows stand from g * group
    on. Only the first `live` rows count, and of the bounds only those of groups wholly below.
    """
    whole = live // group

    def candidates(bounds: Float[Array, "G"]):
        best, winners = two_level_top_k(bounds, whole, min(groups + 1, len(bounds)))
        unseen = best[groups] if len(best) > groups else -jnp.inf
        best, winners = best[:groups], winners[:groups]
        return *members(jnp.where(best > -jnp.inf, winners, whole), live, group), unseen

    def block(queries, bounds, slack):
        ids, usable, unseen = jax.vmap(candidates)(bounds)
        best, ids = refine(vectors, queries, ids, usable, k)
        return best, ids, (unseen == -jnp.inf) | (best[:, -1] > unseen + slack)

    return in_blocks(block, LEAST, queries, bounds, slack)  # few at once: their rows fit the cache


def best_of_estimates(
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    estimates: Float[Array, "Q N"],
    live: Int[Array, ""],
    *,
    k: int,
    candidates: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"], Float[Array, "Q"]]:
    """The k best, by exact scores, of each query's `candidates` rows of highest estimate, the last of them given too.

    No row that is left out has a higher estimate than that; it is -inf where none is.
    """

    def chosen(estimates: Float[Array, "N"]):
        best, ids = two_level_top_k(estimates, live, candidates)
        order = jnp.argsort(ids)
        last = best[-1] if candidates < len(estimates) else -jnp.inf
        return ids[order], (best > -jnp.inf)[order], jnp.asarray(last, jnp.float32)

    def block(queries, estimates):
        ids, usable, last = jax.vmap(chosen)(estimates)
        return *refine(vectors, queries, ids, usable, k), last

    return in_blocks(block, LEAST, queries, estimates)


def all_scored(
    vectors: Float[Array, "N E"], queries: Float[Array, "Q E"], live: Int[Array, ""], *, k: int
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """The k best of all rows by exact scores, whatever it takes; the lower row wins a tie."""

    def block(queries):
        every = products(vectors, queries)
        return jax.vmap(partial(two_level_top_k, k=k), in_axes=(1, None))(every, live)

    return in_blocks(block, FEW, queries)


def where_exact(
    proven: Bool[Array, "Q"],
    found: tuple[Float[Array, "Q k"], Int[Array, "Q k"]],
    vectors: Float[Array, "N E"],
    queries: Float[Array, "Q E"],
    live: Int[Array, ""],
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    """What was found; for queries where that is not proven, and the few beside them, `all_scored`."""

    def block(doubtful, best, ids, queries):
        def again():
            return all_scored(vectors, queries, live, k=best.shape[1])

        return jax.lax.cond(doubtful.any(), again, lambda: (best, ids))

    return in_blocks(block, FEW, ~proven, *found, queries)


def in_blocks(
    search: Callable[..., tuple[Array, ...]], size: int, *arrays: Shaped[Array, "Q ..."]
) -> tuple[Array, ...]:
    """`search` of the arrays, at most `size` rows at a time."""
    count = len(arrays[0])
    if count <= size:
        return search(*arrays)
    padded = [jnp.pad(array, ((0, -count % size), *((0, 0),) * (array.ndim - 1))) for array in arrays]
    blocks = [array.reshape(len(array) // size, size, *array.shape[1:]) for array in padded]
    found = jax.lax.map(lambda block: search(*block), blocks)
    return tuple(jax.lax.collapse(array, 0, 2)[:count] for array in found)


def work(dim: int, candidates: int, queries: int) -> Work:
    """What scoring so many candidates of each query exactly comes to."""
    read = 4 * dim * candidates
    return Work(read * queries, read, float32=2 * dim * candidates * queries)


def rounding(dim: int) -> float:
    """What two float32 products of the same vectors may differ by, relative to the vectors' lengths.

    A sum of `dim` products in any order is off by half an epsilon for each of them at most. That is doubled, for the
    handful of roundings beside the sums: all proofs allow for rounding by this one term.
    """
    return 2 * (dim + 8) * float(np.finfo(np.float32).eps)


def longest(vectors: Float32[np.ndarray, "N E"]) -> float:
    """The length of the longest, and not so little that a product with it could be lost to underflow."""
    blocks = (vectors[start : start + _LENGTHS_AT_ONCE] for start in range(0, len(vectors), _LENGTHS_AT_ONCE))
    squares = (float(np.einsum("ne,ne->n", block, block).max()) for block in blocks)
    return max(max(squares, default=0.0) ** 0.5, _SHORTEST)


def lengths(vectors: Float[np.ndarray, "Q E"]) -> Float64[np.ndarray, "Q"]:
    """Euclidean, in float64."""
    return np.linalg.norm(vectors.astype(np.float64), axis=1)


def check_queries(queries: Float[np.ndarray, "Q E"], dim: int, k: int) -> None:
    """UserError for queries of another width, for NaN or infinity in them, and for k < 1."""
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


def padded(queries: Float[np.ndarray, "Q E"], count: int) -> Float32[np.ndarray, "P E"]:
    """The queries with rows of zeros below, `count` in all."""
    return np.pad(queries.astype(np.float32), ((0, count - len(queries)), (0, 0)))


def stacked(found: Sequence[tuple[np.ndarray, ...]]) -> tuple[np.ndarray, ...]:
    """The results of batches as those of one."""
    return tuple(np.concatenate(part) for part in zip(*found, strict=True))
