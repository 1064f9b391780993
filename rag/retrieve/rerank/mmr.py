"""Rerank by maximal marginal relevance (Carbonell and Goldstein 1998): relevant to the question, and diverse.

Q queries, C candidates (the passages of one question), E embedding dim
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rag.embed.encode import encode_queries
from rag.index.normalizers import min_max
from rag.retrieve.collection import Collection
from rag.runtime.options import Share, check_fields
from rag.runtime.shapes import next_power_of_two
from rag.types import Hit

Relevance = Literal["cosine", "score"]

_BATCH = 8  # queries of one call to XLA, always: the program, and so the rounding, is the same for any batch
_LEAST = 16  # candidates of the smallest program; the others have twice as many, and so on


@dataclass(frozen=True)
class MMR:
    """Select greedily the passage of highest marginal relevance:

        weight * relevance - (1 - weight) * the highest cosine with a passage that was taken before

    `weight` is the paper's lambda: 1 orders by relevance alone, 0 takes the most different. `relevance` "cosine" is the
    paper's: the embedder's cosine of question and passage, whatever retriever found it; "score" is the hits' own
    scores, scaled from 0 to 1 for each question (equal ones to 1), which keeps the order of a lexical or reranking
    method.

    A hit's new score is its marginal relevance when it was taken. It never rises from one hit to the next, because the
    set of taken passages only grows: an order by score is the order of taking. The earlier hit wins a tie.

    Raises:
        UserError: for a weight outside 0 to 1 and an unknown relevance.
    """

    weight: Share = 0.5
    relevance: Relevance = "cosine"

    depends_on: ClassVar[tuple[str, ...]] = ("embedder",)

    def __post_init__(self) -> None:
        check_fields(self)

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """Return the hits of each question in the order of selection, with their marginal relevance as scores."""
        queries = encode_queries(collection.embedder, questions)
        results: list[list[Hit]] = [[] for _ in hits]
        for size, batch in _batches([len(found) for found in hits]):
            vectors = np.zeros((_BATCH, size, queries.shape[1]), np.float32)
            scores, real = np.zeros((_BATCH, size), np.float32), np.zeros((_BATCH, size), bool)
            asked = np.zeros((_BATCH, queries.shape[1]), np.float32)
            for row, i in enumerate(batch):
                n, rows = len(hits[i]), [hit.row for hit in hits[i]]
                vectors[row, :n], scores[row, :n] = collection.vectors[rows], [h.score for h in hits[i]]
                asked[row], real[row, :n] = queries[i], True
            cosine = self.relevance == "cosine"
            relevance = _cosines(asked, vectors) if cosine else _rescaled(scores, real)
            orders, gains = map(np.asarray, _take_all(relevance, vectors, real, self.weight))
            for row, i in enumerate(batch):
                taken = zip(orders[row], gains[row], hits[i], strict=False)
                results[i] = [replace(hits[i][position], score=float(gain)) for position, gain, _ in taken]
        return results


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Yield (C, queries): up to _BATCH queries of one padded length C; no queries without hits."""
    sizes: dict[int, list[int]] = {}
    for query, n in enumerate(lengths):
        if n:
            sizes.setdefault(next_power_of_two(n, _LEAST), []).append(query)
    for size, queries in sizes.items():
        for start in range(0, len(queries), _BATCH):
            yield size, queries[start : start + _BATCH]


@jax.jit
def _cosines(queries: Float[Array, "Q E"], vectors: Float[Array, "Q C E"]) -> Float[Array, "Q C"]:
    return jnp.einsum("qe,qce->qc", queries, vectors, precision="highest")


@jax.jit
def _rescaled(scores: Float[Array, "Q C"], real: Bool[Array, "Q C"]) -> Float[Array, "Q C"]:
    return jax.vmap(min_max)(scores, real)


@jax.jit
def _take_all(
    relevance: Float[Array, "Q C"],
    vectors: Float[Array, "Q C E"],
    real: Bool[Array, "Q C"],
    weight: ScalarLike,
) -> tuple[Int[Array, "Q C"], Float[Array, "Q C"]]:
    return jax.vmap(take, (0, 0, 0, None))(relevance, vectors, real, weight)


def take(
    relevance: Float[Array, "C"], vectors: Float[Array, "C E"], real: Bool[Array, "C"], weight: ScalarLike
) -> tuple[Int[Array, "C"], Float[Array, "C"]]:
    """Return the order in which the candidates are taken, and the marginal relevance of each when it is taken.

    Args:
        relevance: of each candidate to the question.
        vectors: of the candidates, of unit length.
        real: which candidates are no padding; padding comes last, with -inf.
        weight: of relevance against novelty, 0 to 1.
    """
    similarity = jnp.einsum("ce,de->cd", vectors, vectors, precision="highest")

    def step(
        carry: tuple[Float[Array, "C"], Bool[Array, "C"]], _: None
    ) -> tuple[tuple[Float[Array, "C"], Bool[Array, "C"]], tuple[Int[Array, ""], Float[Array, ""]]]:
        nearest, left = carry
        gains = jnp.where(left, weight * relevance - (1 - weight) * nearest, -jnp.inf)
        best = jnp.argmax(gains)
        return (jnp.maximum(nearest, similarity[best]), left.at[best].set(False)), (best, gains[best])

    # No cosine is below -1: with this start the gains can only fall.
    start = jnp.full_like(relevance, -1.0), real
    _, (order, gains) = jax.lax.scan(step, start, length=len(relevance))
    return order, gains
