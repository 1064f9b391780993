"""Measure the recall of an approximate vector index against exact search.

N vectors, Q queries, E embedding dim, k results, r rows that a query was made of
"""

import math
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Float32, Int

from rag.index.dense import VectorIndex
from rag.index.dense.exact import DenseIndex
from rag.index.dense.refine import stacked

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


def audit(
    index: VectorIndex,
    exact: DenseIndex,
    queries: Float[np.ndarray, "Q E"],
    k: int,
    sources: Int[np.ndarray, "Q r"] | None = None,
) -> Audit:
    """Compare the results of an index with exact search. A row that scores as high as the exact k-th counts as found.

    The index is asked one query at a time, because larger batches may be searched exactly.

    Args:
        index: the index to measure.
        exact: exact search of the same vectors.
        queries: one or more.
        k: how many results of a query are compared; where the index has fewer rows, all of them.
        sources: the rows that each query was made of, which do not count as its results: any index finds them.

    Raises:
        ValueError: there are no queries, or no rows beside a query's sources.
    """
    if sources is None:
        sources = np.zeros((len(queries), 0), np.int64)
    if not len(queries) or len(exact) <= sources.shape[1]:
        raise ValueError("an audit needs queries, and more rows than a query is made of")
    asked = k + sources.shape[1]
    best = _other_scores(exact.search(queries, asked), sources, k)
    found = _other_scores(stacked([index.search(query[None], asked) for query in queries]), sources, k)
    recall = float(np.mean(found >= best[:, -1:]))
    return Audit(recall, wilson(recall, len(queries)), len(queries), best.shape[1])


def _other_scores(
    results: tuple[np.ndarray, ...], sources: Int[np.ndarray, "Q r"], k: int
) -> Float32[np.ndarray, "Q _"]:
    """Return the k best scores of each query among the rows that it was not made of."""
    scores, rows = results
    is_source = (rows[:, :, None] == sources[:, None, :]).any(axis=2)
    others_first = np.argsort(is_source, axis=1, kind="stable")
    return np.take_along_axis(scores, others_first[:, : min(k, rows.shape[1] - sources.shape[1])], axis=1)


def wilson(share: float, trials: int) -> float:
    """Return the lower end of Wilson's one-sided 95% interval for a probability (Wilson 1927)."""
    centre = share + _Z**2 / (2 * trials)
    spread = _Z * math.sqrt(share * (1 - share) / trials + _Z**2 / (4 * trials**2))
    return (centre - spread) / (1 + _Z**2 / trials)


def sample_pairs(rows: int, count: int, seed: int) -> Int[np.ndarray, "Q 2"]:
    """Return at most `count` pairs of the row numbers below `rows`, each row at most once at each end."""
    chosen = np.random.default_rng(seed).permutation(rows)[:count]
    return np.stack([chosen, np.roll(chosen, 1)], axis=1)


def mixed_queries(exact: DenseIndex, pairs: Int[np.ndarray, "Q 2"]) -> Float32[np.ndarray, "Q E"]:
    """Return a query for each pair of rows: twice the first, which is the query's best result, plus the second.

    Rows alone would be too easy: questions are less like them than they are like each other.
    """
    first, second = np.asarray(exact.rows[jnp.asarray(pairs.T)])
    return 2 * first + second
