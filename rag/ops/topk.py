"""The k best of many scores, as XLA runs it fast: exact, ties to the lower id, written for one query.

    N vectors (scored ids)

XLA finds the k best quickly only for float32, and only while nothing slices what it finds inside the same
program: other types, and a slice, turn it into a sort of everything, about a hundred times slower. `top_k`
casts and fences for that reason. `two_level_top_k` reads the scores once, as the maxima of groups: a group
holding one of the k best is among the k groups of highest maximum, so only those are looked into.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

# A group's maximum costs one read of each score; more in a group makes the second level longer.
GROUP = 32


def top_k(scores: Float[Array, "N"], k: int) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """The k highest scores in float32, best first, and their positions; the lower position wins a tie.

    0 <= k <= N. Zeros of both signs tie. NaN is not allowed: it would sort first.
    """
    scores = scores.astype(jnp.float32)
    # top_k orders by bits, so -0.0 would stand below 0.0.
    return jax.lax.optimization_barrier(jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k))


def two_level_top_k(
    scores: Float[Array, "N"], live: Int[Array, ""], k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """top_k of scores[:live], with `live` traced: a growing index needs no new program.

    Scores at and past `live` are never read as such and may be anything. 0 <= k <= N; where live < k the last
    k - live results have score -inf and a meaningless id.
    """
    n = scores.shape[0]
    groups = n // GROUP
    if 2 * k * GROUP >= n:  # the winning groups would be most of the scores
        return top_k(jnp.where(jnp.arange(n) < live, scores, -jnp.inf), k)
    full = live // GROUP  # groups that are live as a whole; the one after them always gets looked into
    maxima = scores[: groups * GROUP].reshape(groups, GROUP).max(axis=1)
    _, winners = top_k(jnp.where(jnp.arange(groups) < full, maxima, -jnp.inf), k)
    winners = jnp.append(jnp.sort(winners), full)  # in the order of ids, so that ties stay with the lower one
    ids = (winners[:, None] * GROUP + jnp.arange(GROUP)).ravel()
    usable = jnp.repeat(jnp.append(winners[:-1] < full, True), GROUP) & (ids < live)
    candidates = jnp.where(usable, scores.at[ids].get(mode="clip"), -jnp.inf)
    best, positions = top_k(candidates, k)
    return best, ids[positions]
