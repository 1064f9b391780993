"""How much of the exact results an approximate index finds, on a sample of queries: k results of Q queries."""

import math
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from rag.index.dense import VectorIndex
from rag.index.dense.exact import DenseIndex

_Z = 1.6448536269514722  # one-sided 95%


@dataclass(frozen=True, slots=True)
class Audit:
    """The share of the exact k best that was found: its mean over the queries, and a bound from below.

    `at_least` is Wilson's one-sided 95% bound, counting each query as one trial: a query's share varies less
    than a coin of that probability, so the bound errs on the low side, and is below 1 even if all was found.
    """

    recall: float
    at_least: float
    queries: int
    k: int


def audit(index: VectorIndex, exact: DenseIndex, queries: Float[np.ndarray, "Q E"], k: int) -> Audit:
    """Compare the index's results with exact search. A row scored as high as the exact k-th counts as found.

    The index is asked one query at a time: larger batches it may search exactly.
    """
    if not len(queries):
        raise ValueError("an audit needs queries")
    best, _ = exact.search(queries, k)
    found = np.concatenate([index.search(query[None], k)[0] for query in queries])
    recall = float(np.mean(found >= best[:, -1:]))
    return Audit(recall, wilson(recall, len(queries)), len(queries), best.shape[1])


def wilson(share: float, trials: int) -> float:
    """The lower end of Wilson's one-sided 95% interval for a probability (Wilson 1927)."""
    centre = share + _Z**2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return (centre - spread) / (1 + _Z**2 / trials)
