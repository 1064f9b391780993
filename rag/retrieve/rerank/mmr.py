"""Maximal marginal relevance: passages that are about the question and not about one another.

Q queries, C candidates (the passages to order), E embedding dim
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, ScalarLike

from rag.index import fusion
from rag.retrieve.collection import Collection
from rag.runtime.options import Share, check_fields
from rag.types import Hit

Relevance = Literal["cosine", "score"]

_BATCH = 8  # queries of one call to XLA, always: the program, and so the rounding, is the same for any batch
_LEAST = 16  # candidates of the smallest program; the others are its doubles


@dataclass(frozen=True)
class MMR:
    """A reranker that takes, again and again, the passage of highest marginal relevance (Carbonell and Goldstein 1998):

        weight * relevance - (1 - weight) * the highest cosine with a passage that was taken before

    `weight`, their lambda: 1 orders by relevance alone, 0 takes what differs most. `relevance`: "cosine" is
    theirs, the embedder's cosine of question and passage, whatever retriever found it; "score" is the hits'
    own scores, the lowest of a question as 0 and the highest as 1 (equal ones as 1), which keeps the judgement
    of a lexical or reranking method.

    A hit's new score is its marginal relevance when it was taken. It never rises from one hit to the next,
    because what was taken only grows: an order by score is the order of taking. Ties go to the hit that came
    before. Raises UserError for a weight outside 0 to 1 and an unknown relevance.
    """

    weight: Share = 0.5
    relevance: Relevance = "cosine"

    uses: ClassVar[tuple[str, ...]] = ("embedder",)

    def __post_init__(self) -> None:
        check_fields(self)

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """All hits of each question in the order of taking, with their marginal relevance as scores."""
        queries = collection.embedder.encode_queries(questions)
        results: list[list[Hit]] = [[] for _ in hits]
        for size, batch in _batches([len(found) for found in hits]):
            vectors = np.zeros((_BATCH, size, queries.shape[1]), np.float32)
            scores, live = np.zeros((_BATCH, size), np.float32), np.zeros((_BATCH, size), bool)
            asked = np.zeros((_BATCH, queries.shape[1]), np.float32)
            for row, i in enumerate(batch):
                n, rows = len(hits[i]), [collection.row(hit.chunk) for hit in hits[i]]
                vectors[row, :n], scores[row, :n] = collection.index.vectors[rows], [h.score for h in hits[i]]
                asked[row], live[row, :n] = queries[i], True
            cosine = self.relevance == "cosine"
            relevance = _cosines(asked, vectors) if cosine else _rescaled(scores, live)
            orders, gains = map(np.asarray, _take_all(relevance, vectors, live, self.weight))
            for row, i in enumerate(batch):
                taken = zip(orders[row], gains[row], hits[i], strict=False)
                results[i] = [Hit(hits[i][place].chunk, float(gain)) for place, gain, _ in taken]
        return results


def _batches(lengths: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """(C, queries): up to _BATCH queries of one padded length C, which is each query's own; none without hits."""
    sizes: dict[int, list[int]] = {}
    for query, n in enumerate(lengths):
        if n:
            sizes.setdefault(max(_LEAST, 1 << (n - 1).bit_length()), []).append(query)
    for size, queries in sizes.items():
        for start in range(0, len(queries), _BATCH):
            yield size, queries[start : start + _BATCH]


@jax.jit
def _cosines(queries: Float[Array, "Q E"], vectors: Float[Array, "Q C E"]) -> Float[Array, "Q C"]:
    return jnp.einsum("qe,qce->qc", queries, vectors, precision="highest")


@jax.jit
def _rescaled(scores: Float[Array, "Q C"], live: Bool[Array, "Q C"]) -> Float[Array, "Q C"]:
    return jax.vmap(fusion.min_max)(scores, live)


@jax.jit
def _take_all(
    relevance: Float[Array, "Q C"],
    vectors: Float[Array, "Q C E"],
    live: Bool[Array, "Q C"],
    weight: ScalarLike,
) -> tuple[Int[Array, "Q C"], Float[Array, "Q C"]]:
    return jax.vmap(take, (0, 0, 0, None))(relevance, vectors, live, weight)


def take(
    relevance: Float[Array, "C"], vectors: Float[Array, "C E"], live: Bool[Array, "C"], weight: ScalarLike
) -> tuple[Int[Array, "C"], Float[Array, "C"]]:
    """The order in which candidates are taken, and each one's marginal relevance when it was.

    `vectors` have unit length. Those that are not `live` are never relevant: they come last, at -inf.
    """
    similarity = jnp.einsum("ce,de->cd", vectors, vectors, precision="highest")

    def step(
        carry: tuple[Float[Array, "C"], Bool[Array, "C"]], _: None
    ) -> tuple[tuple[Float[Array, "C"], Bool[Array, "C"]], tuple[Int[Array, ""], Float[Array, ""]]]:
        nearest, left = carry
        gains = jnp.where(left, weight * relevance - (1 - weight) * nearest, -jnp.inf)
        best = jnp.argmax(gains)
        return (jnp.maximum(nearest, similarity[best]), left.at[best].set(False)), (best, gains[best])

    # No cosine is below -1: before anything is taken all candidates are that far from it, and gains only fall.
    start = jnp.full_like(relevance, -1.0), live
    _, (order, gains) = jax.lax.scan(step, start, length=len(relevance))
    return order, gains
