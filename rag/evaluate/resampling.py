"""Resampling in compiled programs: bootstrap intervals of column means, and sums under random signs.

    Q queries, J columns: a metric or a system each

All resamples of all columns are one compiled call. Queries and columns are padded to powers of two, so that a
sweep compiles few programs. A number drawn depends on the seed, the resample and the query's position alone, so
a column's result depends neither on the other columns nor on the padding (up to rounding).
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import ndtr, ndtri
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, Key, UInt32

from rag.runtime.shapes import next_power_of_two

_WORD = 32  # signs drawn at once
_COLUMNS = 4  # the narrowest program
_ELEMENTS = 1 << 22  # numbers in a block of resamples: 16 MiB
_ROUNDING = 1e-6  # relative: what float32 sums of the same numbers may differ by


def pack_columns(
    values: Float[np.ndarray, "Q J"], counts: Bool[np.ndarray, "Q J"]
) -> Float32[np.ndarray, "Q_padded J_padded"]:
    """Move each column's values that count to the front, followed by zeros, in an array of few possible shapes."""
    q, m = values.shape
    columns = np.zeros((next_power_of_two(max(q, _WORD)), next_power_of_two(max(m, _COLUMNS))), np.float32)
    for i in range(m):
        counted = values[counts[:, i], i]
        columns[: len(counted), i] = counted
    return columns


def pad_columns(values: np.ndarray, length: int) -> np.ndarray:
    """Pad one value a column with 2: a padding column then counts two equal values, and nothing divides by zero."""
    return np.concatenate([values, np.full(length - len(values), 2, values.dtype)])


@partial(jax.jit, static_argnames="resamples")
def bootstrap(
    deviations: Float32[Array, "Q J"],
    counts: Int32[Array, "J"],
    normal: Float32[Array, "J"],
    key: Key[Array, ""],
    resamples: int,
) -> Float32[Array, "J 2"]:
    """Return BCa intervals around the mean of each column.

    Args:
        deviations: Values minus their mean; of column j the first counts[j] count.
        counts: Values of each column.
        normal: The standard normal quantile of each column's interval.
        key: Random key.
        resamples: How many.
    """

    def resampled_mean(
        uniform: Float32[Array, "Q"], column: Float32[Array, "Q"], n: Int32[Array, ""]
    ) -> Float32[Array, ""]:
        drawn = jnp.minimum((uniform * n).astype(jnp.int32), n - 1)
        counted = jnp.where(jnp.arange(len(column)) < n, column[drawn], 0.0)
        return counted.sum() / jnp.maximum(n, 1)

    def resample(b: Int[Array, ""]) -> Float32[Array, "J"]:
        uniform = jax.random.uniform(jax.random.fold_in(key, b), deviations.shape[:1])
        return jax.vmap(resampled_mean, (None, 1, 0))(uniform, deviations, counts)

    means = jax.lax.map(resample, jnp.arange(resamples), batch_size=_block(deviations.size, resamples))
    return jax.vmap(_bca, (1, 1, 0))(means, deviations, normal)


def _bca(
    means: Float32[Array, "resamples"], deviations: Float32[Array, "Q"], normal: Float32[Array, ""]
) -> Float32[Array, "2"]:
    """Return quantiles of the resampled means, shifted for their bias and for the values' skew (Efron 1987)."""
    rounding = _ROUNDING * jnp.abs(means).max()
    below = ((means < -rounding).mean() + (means <= rounding).mean()) / 2  # of the observed mean, here 0
    bias = ndtri(jnp.clip(below, 1 / (len(means) + 1), len(means) / (len(means) + 1)))
    squares = (deviations**2).sum()
    skew = jnp.where(squares > 0, (deviations**3).sum() / (6 * jnp.maximum(squares, 1e-30) ** 1.5), 0.0)
    shifted = bias + jnp.array([-1.0, 1.0]) * normal
    return jnp.quantile(means, ndtr(bias + shifted / (1 - skew * shifted)))


@partial(jax.jit, static_argnames="resamples")
def sign_flips(
    differences: Float32[Array, "Q J"],
    counts: Int32[Array, "J"],
    exact: Bool[Array, "J"],
    key: Key[Array, ""],
    resamples: int,
) -> Int32[Array, "J"]:
    """Count how many of `resamples` random sign patterns (for exact columns: of all patterns) give a sum as far from 0.

    Args:
        differences: Of column j the first counts[j] count.
        counts: Values of each column.
        exact: Columns of which each pattern is evaluated once; they have no more patterns than that.
        key: Random key.
        resamples: How many.
    """
    sums = partial(jnp.einsum, "q,qj->j", precision=jax.lax.Precision.HIGHEST)
    rounding = _ROUNDING * jnp.abs(differences).sum(axis=0)
    reach = jnp.abs(differences.sum(axis=0)) - rounding
    patterns = 1 << jnp.minimum(counts, 30)

    def resample(b: Int32[Array, ""]) -> Bool[Array, "J"]:
        words = jax.random.bits(jax.random.fold_in(key, b), (len(differences) // _WORD,))
        drawn = sums(_signs(words), differences)
        counted = sums(_signs(b.astype(jnp.uint32)[None]), differences[:_WORD])  # pattern b of all patterns
        far = jnp.abs(jnp.where(exact, counted, drawn)) >= reach
        return far & (~exact | (b < patterns))

    return jax.lax.map(
        resample, jnp.arange(resamples), batch_size=_block(len(differences) + counts.size, resamples)
    ).sum(axis=0)


def _signs(words: UInt32[Array, "words"]) -> Float32[Array, "Q"]:
    """Return the bits of the words, lowest first, as +1 and -1; Q is 32 for each."""
    bits = words[:, None] >> jnp.arange(_WORD, dtype=jnp.uint32) & 1
    return 1.0 - 2.0 * bits.ravel().astype(jnp.float32)


def _block(elements: int, resamples: int) -> int:
    """Return how many resamples, of so many elements each, are computed at once: a divisor of them if possible.

    A divisor leaves no smaller last block to compile a second program for.
    """
    most = max(1, min(resamples, _ELEMENTS // elements))
    return max((n for n in range(most // 2 + 1, most + 1) if resamples % n == 0), default=most)
