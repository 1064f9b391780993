"""Bring the scores of one arm to a scale that can be compared with other arms, for fusion.

C candidates (all that any arm returned). The functions are written for one arm of one query, masked by `found`, to be
vmapped. An arm returns the best of what it scores, so a candidate that it did not find scored no more than the lowest
that it did; each function says what such a missing candidate gets.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, ScalarLike

Normalizer = Literal["min_max", "theoretical_min_max", "z_score", "dbsf"]


def normalize(
    normalizer: Normalizer, scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike
) -> Float[Array, "C"]:
    """Return one arm's scores on the scale of a normalizer.

    Args:
        normalizer: the name of the function.
        scores: of all candidates, any number where the arm did not find the candidate.
        found: which candidates the arm found.
        low: the lowest score that the arm can give; only theoretical_min_max uses it.
    """
    match normalizer:
        case "min_max":
            return min_max(scores, found)
        case "theoretical_min_max":
            return theoretical_min_max(scores, found, low)
        case "z_score":
            return z_score(scores, found)
        case "dbsf":
            return dbsf(scores, found)


def min_max(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """Return (score - lowest) / (highest - lowest) of the found scores, from 0 to 1; a missing candidate gets 0.

    Equal scores, and so a single one, give 1: each is the best of the arm, and was found where the missing were not. An
    empty arm gives zeros.
    """
    low, high = _extremes(scores, found)
    return _rescaled(scores, found, low, high, flat=1.0)


def theoretical_min_max(
    scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike
) -> Float[Array, "C"]:
    """Return (score - low) / (highest - low), where `low` is the lowest score that the arm could ever give.

    The lowest of BM25 is 0, that of the cosine -1. It is stable where min_max is not: the last of the found does not
    fall to 0 just because it is the last (Bruch, Gai and Ingber 2022, "An Analysis of Fusion Functions for Hybrid
    Retrieval"). A missing candidate counts as `low`, and gets 0. Equal scores give 1, unless they are `low`, which
    gives 0; scores below it count as `low`. An empty arm gives zeros.
    """
    _, high = _extremes(scores, found)
    return _rescaled(scores, found, low, high, flat=0.0)


def z_score(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """Return (score - mean) / standard deviation, both of the found scores (n - 1); it has no fixed range.

    A missing candidate counts as the lowest of the found: 0, which is the mean, would put it above half of them. Equal
    scores, and so a single one, give 0, and a missing candidate then -1, one deviation below. An empty arm gives zeros.
    """
    low, high = _extremes(scores, found)
    mean, deviation = _moments(scores, found)
    z = (scores - mean) / jnp.where(high > low, deviation, 1.0)
    spread = jnp.where(found, z, jnp.where(found, z, jnp.inf).min())
    flat = jnp.where(found, 0.0, -1.0)
    return jnp.where(high > low, spread, jnp.where(found.any(), flat, 0.0))


def dbsf(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """Return the scores scaled from mean - 3 to mean + 3 standard deviations (distribution-based, Mazzeschi 2023).

    Mean and deviation (n - 1) are those of the found scores; values outside are clipped to 0 or 1. A missing candidate
    gets 0. Equal scores, and so a single one, give 0.5, the value of the mean. An empty arm gives zeros. Qdrant
    computes the same but does not clip.
    """
    low, high = _extremes(scores, found)
    mean, deviation = _moments(scores, found)
    z = (scores - mean) / jnp.where(high > low, deviation, 1.0)
    return jnp.where(found, jnp.where(high > low, jnp.clip((z + 3) / 6, 0.0, 1.0), 0.5), 0.0)


def _extremes(
    scores: Float[Array, "C"], found: Bool[Array, "C"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return the lowest and highest of the found scores; zeros where there are none."""
    low = jnp.where(found, scores, jnp.inf).min()
    high = jnp.where(found, scores, -jnp.inf).max()
    return jnp.where(found.any(), low, 0.0), jnp.where(found.any(), high, 0.0)


def _moments(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Return mean and sample standard deviation of the found scores; of equal ones rounding can leave a small one."""
    n = found.sum()
    mean = jnp.where(found, scores, 0.0).sum() / jnp.maximum(n, 1)
    squares = jnp.where(found, (scores - mean) ** 2, 0.0).sum()
    return mean, jnp.sqrt(squares / jnp.maximum(n - 1, 1))


def _rescaled(
    scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike, high: Float[Array, ""], flat: float
) -> Float[Array, "C"]:
    """Return the found scores scaled from 0 to 1; `flat` where high is not above low; 0 for the missing."""
    shares = jnp.clip((scores - low) / jnp.where(high > low, high - low, 1.0), 0.0, 1.0)
    return jnp.where(found, jnp.where(high > low, shares, flat), 0.0)
