"""Retrieval metrics inside a compiled program, so that a whole grid is measured in one call.

Q queries, C candidates of a query (passages, or documents), k documents that a ranking is cut to
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int32

from rag.evaluate.metrics import METRICS, find
from rag.evaluate.metrics.gains import Gain
from rag.ops.topk import top_k
from rag.runtime.shapes import next_power_of_two
from rag.types import UserError

_LEAST = 32  # candidates of the smallest program; the others are its doubles
_NAME = re.compile(r"([a-z]+)@([1-9][0-9]{0,8})", re.IGNORECASE)


@dataclass(frozen=True)
class RankingMetric:
    """A retrieval metric with a cut-off, as a static argument of a compiled program.

    Attributes:
        gain: The metric's gain of a ranking.
        cutoff: Documents that count.
        depth: Documents that a ranking is cut to before; None cuts nothing off.
    """

    gain: Gain
    cutoff: int
    depth: int | None = None

    @staticmethod
    def named(name: str, depth: int | None = None) -> "RankingMetric":
        """Return the metric of a name such as nDCG@10, in any case. Raise UserError for one that has no gain."""
        match = _NAME.fullmatch(name)
        metric = find(match[1], "qrels") if match else None
        if not match or not metric or not metric.gain:
            *most, last = (metric.name for metric in METRICS if metric.gain)
            raise UserError(f'tuning.measure is "{name}": choose {", ".join(most)} or {last}, as in nDCG@10.')
        return RankingMetric(metric.gain, int(match[2]), depth)

    def ideal(self, judged: Mapping[str, int]) -> float:
        """Return what a query's gain is divided by, from its judgements; 0 for a query that can gain nothing."""
        grades = sorted((grade for grade in judged.values() if grade > 0), reverse=True)
        return self.gain.ideal(grades, self.cutoff)


class JudgedCandidates(NamedTuple):
    """What a program needs to measure rankings of the candidates, padded to one width.

    Attributes:
        owners: Index of each candidate's document among its query's documents.
        grades: Of these documents, in the order of their ids.
        ideal: RankingMetric.ideal of each query.
    """

    owners: Int32[np.ndarray, "Q C"] | Int32[Array, "..."]
    grades: Float32[np.ndarray, "Q C"] | Float32[Array, "..."]
    ideal: Float32[np.ndarray, "Q"] | Float32[Array, "..."]

    @staticmethod
    def of(
        documents: Sequence[Sequence[str]], judged: Sequence[Mapping[str, int]], metric: RankingMetric
    ) -> "JudgedCandidates":
        """Build them from the document of each of a query's candidates, and the query's judgements."""
        width = next_power_of_two(max(map(len, documents), default=1), _LEAST)
        owners = np.zeros((len(documents), width), np.int32)
        grades = np.zeros((len(documents), width), np.float32)
        for row, (names, known) in enumerate(zip(documents, judged, strict=True)):
            order = sorted(set(names))  # the lower id wins a tie
            number = {name: i for i, name in enumerate(order)}
            owners[row, : len(names)] = [number[name] for name in names]
            grades[row, : len(order)] = [max(known.get(name, 0), 0) for name in order]
        return JudgedCandidates(
            owners, grades, np.array([metric.ideal(known) for known in judged], np.float32)
        )


def value(
    metric: RankingMetric, scores: Float[Array, "C"], listed: Bool[Array, "C"], judged: JudgedCandidates
) -> Float[Array, ""]:
    """Compute the metric of one query's ranking of documents.

    Args:
        metric: The metric.
        scores: Of the candidates; a document has that of its best one, and the lower id wins a tie.
        listed: Which candidates are in the ranking.
        judged: The candidates' documents and grades, of this query.
    """
    documents = jnp.full(len(scores), -jnp.inf).at[judged.owners].max(jnp.where(listed, scores, -jnp.inf))
    found, ids = top_k(documents, min(metric.cutoff, metric.depth or metric.cutoff, len(scores)))
    gain = metric.gain.of_ranking(jnp.where(found > -jnp.inf, judged.grades[ids], 0.0))
    return jnp.where(judged.ideal > 0, gain / jnp.where(judged.ideal > 0, judged.ideal, 1.0), 0.0)
