"""Retrieval metrics as gains of a ranking, for compiled programs that compute them at every point of a grid.

    k documents that a ranking is cut to, at most the metric's cut-off

The value of a query is of_ranking(grades of the documents found, best first) / ideal(grades of all judged documents).
Definitions are those of rag.evaluate.metrics.retrieval.evaluate.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import jax.numpy as jnp
from jaxtyping import Array, Float


@dataclass(frozen=True)
class Gain:
    """A metric as a quotient.

    Attributes:
        of_ranking: Takes the grades of the documents found, best first, 0 for what is not relevant.
        ideal: Takes the grades above 0 of all judged documents, highest first, and the cut-off; returns the gain
            that the quotient is taken of, 0 where nothing can be gained.
    """

    of_ranking: Callable[[Float[Array, "k"]], Float[Array, ""]]
    ideal: Callable[[Sequence[int], int], float]


def _ranks(grades: Float[Array, "k"]) -> Float[Array, "k"]:
    return jnp.arange(1.0, len(grades) + 1)


def _relevant(grades: Float[Array, "k"]) -> Float[Array, ""]:
    return (grades > 0).sum().astype(grades.dtype)


def _discounted(grades: Sequence[int], cutoff: int) -> float:
    return math.fsum(grade / math.log2(i + 2) for i, grade in enumerate(grades[:cutoff]))


NDCG = Gain(lambda grades: (grades / jnp.log2(_ranks(grades) + 1)).sum(), _discounted)
RECIPROCAL_RANK = Gain(lambda grades: ((grades > 0) / _ranks(grades)).max(initial=0), lambda *_: 1.0)
RECALL = Gain(_relevant, lambda grades, _: float(len(grades)))
PRECISION = Gain(_relevant, lambda _, cutoff: float(cutoff))
SUCCESS = Gain(lambda grades: (grades > 0).any().astype(grades.dtype), lambda *_: 1.0)
