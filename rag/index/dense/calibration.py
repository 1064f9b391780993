"""What an index finds out by trying it on queries made of its own vectors, and for how long that holds.

S sampled queries, E embedding dim
"""

from collections.abc import Callable
from typing import Generic, TypeVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from rag.index.dense.exact import DenseIndex

T = TypeVar("T")


def mixed_queries(exact: DenseIndex, count: int, seed: int) -> Float32[np.ndarray, "S E"]:
    """At most `count` queries: two parts of a row of the index, which is the best result for it, and one of another.

    Rows would be too easy: questions are less like them than they are like each other.
    """
    chosen = np.random.default_rng(seed).permutation(len(exact))[:count]
    rows = np.asarray(exact.rows[jnp.asarray(chosen)])
    return 2 * rows + np.roll(rows, 1, axis=0)


class Calibrated(Generic[T]):
    """What was found for each number of results; it is found again when the index has doubled since."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[int, T]] = {}  # k -> the length then, and what was found

    def of(self, k: int, size: int, find: Callable[[int], T]) -> T:
        """`find(k)`, or what it said of an index that was more than half of `size`."""
        if k not in self._found or size >= 2 * self._found[k][0]:
            self._found[k] = size, find(k)
        return self._found[k][1]
