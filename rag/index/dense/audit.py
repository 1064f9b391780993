"""Measure the recall of an approximate vector index against exact search.

N vectors, Q queries, E embedding dim, k results
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32

from rag.index.dense import VectorIndex
from rag.index.dense.exact import DenseIndex

_Z = 1.6448536269514722  # of a one-sided 95% interval


@dataclass(frozen=True, slots=True)
class Audit:
    """The recall of an index: the share of the exact k best that it found, the mean over the queries.

    `at_least` is Wilson's one-sided 95% lower bound, with each query as one trial: a query's share varies less than a
    coin of that probability, so the bound errs on the low side, and is below 1 even if all was found.
    """

    recall: float
    at_least: float
    queries: int
    k: int


def audit(index: VectorIndex, exact: DenseIndex, queries: Float[np.ndarray, "Q E"], k: int) -> Audit:
    """Compare the results of an index with exact search. A row that scores as high as the exact k-th counts as found.

    The index is asked one query at a time, because larger batches may be searched exactly. Raises ValueError where
    there are no queries.
    """
    if not len(queries):
        raise ValueError("an audit needs queries")
    best, _ = exact.search(queries, k)
    found = np.concatenate([index.search(query[None], k)[0] for query in queries])
    recall = float(np.mean(found >= best[:, -1:]))
    return Audit(recall, wilson(recall, len(queries)), len(queries), best.shape[1])


def wilson(share: float, trials: int) -> float:
    """Return the lower end of Wilson's one-sided 95% interval for a probability (Wilson 1927)."""
    centre = share + _Z**2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return (centre - spread) / (1 + _Z**2 / trials)


def mixed_queries(exact: DenseIndex, count: int, seed: int) -> Float32[np.ndarray, "Q E"]:
    """Return at most `count` queries: each twice a row of the index, which is its best result, plus another row.

    Rows alone would be too easy: questions are less like them than they are like each other.
    """
    chosen = np.random.default_rng(seed).permutation(len(exact))[:count]
    rows = np.asarray(exact.rows[jnp.asarray(chosen)])
    return 2 * rows + np.roll(rows, 1, axis=0)
