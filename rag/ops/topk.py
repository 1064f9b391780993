"""Select the k highest of many scores, in the form that XLA runs fast: exact, ties to the lower id, for one query.

Letters: N scores, C candidates.

XLA selects the k highest quickly only for float32, and only while nothing slices the result inside the same program:
other types, and a slice, turn the selection into a sort of everything, about a hundred times slower. `top_k` casts
and adds a barrier for that reason. The other functions select in two steps: a group of consecutive ids that holds one
of the k highest scores is among the k groups of highest maximum, so only the members of those are candidates.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int, Num

from rag.runtime.shapes import power_of_two_near_sqrt


def top_k(scores: Num[Array, "N"], k: int) -> tuple[Float32[Array, "k"], Int[Array, "k"]]:
    """Return the k highest scores in float32, best first, and their ids; the lower id wins a tie.

    0 <= k <= N. Zeros of both signs tie. NaN is not allowed: it would sort first.
    """
    scores = scores.astype(jnp.float32)
    # lax.top_k orders by bits, so -0.0 would come after 0.0.
    best, ids = jax.lax.optimization_barrier(jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k))
    return best, ids


def two_level_top_k(scores: Float[Array, "N"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """Return the same as `top_k`, faster for many scores and few results."""
    n = len(scores)
    # As many maxima as members to select from.
    group = power_of_two_near_sqrt(n // max(k, 1))
    if 2 * k * group >= n:  # the members would be most of the scores
        return top_k(scores, k)
    maxima = scores[: n // group * group].reshape(-1, group).max(axis=1)
    _, winners = top_k(maxima, k)
    ids = members(winners, n, group)
    return best_members(scores.at[ids].get(mode="clip"), ids, n=n, k=k)


def members(winners: Int[Array, "groups"], n: int, group: int) -> Int[Array, "C"]:
    """Return the ids in the winning groups and after the last whole group, ascending; ids of n and above are padding.

    Group g has the ids from g * group to (g + 1) * group - 1.
    """
    winners = jnp.append(jnp.sort(winners), n // group)
    return (winners[:, None] * group + jnp.arange(group)).ravel()


def best_members(
    scores: Float[Array, "C"], ids: Int[Array, "C"], *, n: int, k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """Return the k highest scores of candidates, best first, and their ids; the first candidate wins a tie.

    Args:
        scores: of the candidates.
        ids: their ids; those of n and above are padding.
        n: see `ids`.
        k: the number of results.
    """
    best, positions = top_k(jnp.where(ids < n, scores, -jnp.inf), k)
    return best, ids[positions]
