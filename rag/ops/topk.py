"""The k best of many scores, as XLA runs it fast: exact, ties to the lower id, written for one query.

    N vectors (scored ids), G groups of consecutive ids, C candidates

XLA finds the k best quickly only for float32, and only while nothing slices what it finds inside the same
program: other types, and a slice, turn it into a sort of everything, about a hundred times slower. `top_k`
casts and fences for that reason. The other functions choose in two steps: a group that holds one of the k
best is among the k groups of highest maximum, so only `members` of those need a look.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Float32, Int, Num


def top_k(scores: Num[Array, "N"], k: int) -> tuple[Float32[Array, "k"], Int[Array, "k"]]:
    """The k highest scores in float32, best first, and their positions; the lower position wins a tie.

    0 <= k <= N. Zeros of both signs tie. NaN is not allowed: it would sort first.
    """
    scores = scores.astype(jnp.float32)
    # top_k orders by bits, so -0.0 would stand below 0.0.
    best, ids = jax.lax.optimization_barrier(jax.lax.top_k(jnp.where(scores == 0, 0.0, scores), k))
    return best, ids


def two_level_top_k(
    scores: Float[Array, "N"], live: Int[Array, ""], k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """top_k of scores[:live], where `live` is traced: a growing index needs no new program.

    What stands at and past `live` does not matter. 0 <= k <= N; where live < k the last k - live results
    have score -inf and a meaningless id.
    """
    n = len(scores)
    group = _group(n, k)
    if 2 * k * group >= n:  # the members would be most of the scores
        return top_k(jnp.where(jnp.arange(n) < live, scores, -jnp.inf), k)
    maxima = scores[: n // group * group].reshape(-1, group).max(axis=1)
    whole = live // group
    _, winners = top_k(jnp.where(jnp.arange(len(maxima)) < whole, maxima, -jnp.inf), k)
    ids, usable = members(winners, live, group)
    return best_members(scores.at[ids].get(mode="clip"), ids, usable, k)


def _group(n: int, k: int) -> int:
    """About the square root of n / k, so that there are as many maxima as members to choose from."""
    return 1 << ((n // max(k, 1)).bit_length() // 2)


def members(
    winners: Int[Array, "G"], live: Int[Array, ""], group: int
) -> tuple[Int[Array, "C"], Bool[Array, "C"]]:
    """The ids in the winning groups, ascending, and which of them count; group g has ids from g * group on.

    A winner that is not wholly below `live` does not count; the group that `live` cuts always stands last.
    """
    whole = live // group
    winners = jnp.append(jnp.sort(winners), whole)
    ids = (winners[:, None] * group + jnp.arange(group)).ravel()
    counts = (winners < whole).at[-1].set(True)
    return ids, jnp.repeat(counts, group) & (ids < live)


def best_members(
    scores: Float[Array, "C"], ids: Int[Array, "C"], usable: Bool[Array, "C"], k: int
) -> tuple[Float[Array, "k"], Int[Array, "k"]]:
    """The k best of the usable candidates: scores, best first, and ids; the first to stand wins a tie."""
    best, positions = top_k(jnp.where(usable, scores, -jnp.inf), k)
    return best, ids[positions]
