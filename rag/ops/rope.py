"""Rotary position embedding (Su et al. 2021, arXiv:2104.09864), in the half-split layout of Hugging Face.

Letters: B batch, T tokens, H heads, D head dim (half: D/2).
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int


def llama3_factors(head_dim: int, theta: float, scaling: Mapping[str, Any]) -> tuple[float, ...]:
    """Return the D/2 factors by which Llama 3.1 divides the frequencies.

    Wavelengths shorter than the original context / high_freq_factor keep their frequency, those longer than the
    original context / low_freq_factor are divided by `factor`, and the ones between are interpolated.

    Args:
        head_dim: D.
        theta: the base of the frequencies.
        scaling: `rope_scaling` of config.json.
    """
    factor, low, high = scaling["factor"], scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * _base_frequencies(head_dim, theta) / (2 * math.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return tuple((1.0 / ((1.0 - smooth) / factor + smooth)).tolist())


def _base_frequencies(head_dim: int, theta: float) -> np.ndarray:
    return theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)


def rotations(
    positions: Int[Array, "B T"], head_dim: int, theta: float, factors: tuple[float, ...] | None = None
) -> Float[Array, "2 B T half"]:
    """Return cosine and sine of every position and frequency, in float32.

    Args:
        positions: from 0.
        head_dim: D.
        theta: the base of the frequencies.
        factors: divide the D/2 frequencies; None is 1 for each.
    """
    frequencies = _base_frequencies(head_dim, theta) / np.asarray(factors or 1.0)
    angles = positions[:, :, None].astype(jnp.float32) * jnp.asarray(frequencies, jnp.float32)
    return jnp.stack([jnp.cos(angles), jnp.sin(angles)])


def rotate(x: Float[Array, "B H T D"], rotations: Float[Array, "2 b T half"]) -> Float[Array, "B H T D"]:
    """Return x with its pairs (i, i + D/2) rotated, computed in float32, in x's dtype; b is 1 or B."""
    cos, sin = rotations[:, :, None]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)
