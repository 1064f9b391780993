"""Tuning of BM25's k1 and b, over the term counts of candidate passages.

    Q queries, X points of the grid, T terms of a question, C candidates of a query

The compiled program only chooses (rag.evaluate.tuning.cross_validation); what is reported is found by whole searches.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial
from itertools import product

import jax
import numpy as np
from jaxtyping import Array, Bool, Float32, Int32

from rag.evaluate.metrics.retrieval import Qrels
from rag.evaluate.retrieval import best_documents, search_deeper
from rag.evaluate.tuning.cross_validation import Tuned, nested_cross_validation
from rag.evaluate.tuning.fusion import ELEMENTS, padded
from rag.evaluate.tuning.grids import BM25Grid, Point, Tuning
from rag.evaluate.tuning.ranking_metric import JudgedCandidates, RankingMetric, value
from rag.index.fusion import Ranking
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights, Variant, bm25_scores
from rag.runtime.shapes import next_power_of_two
from rag.types import UserError


def tune_bm25(
    index: LexicalIndex,
    questions: Mapping[str, str],
    qrels: Qrels,
    options: Tuning,
    document: Callable[[int], str],
    depth: int = 100,
    weights: BM25Weights = BM25Weights(),
) -> Tuned:
    """Tune k1 and b.

    The candidates of a question are the passages that the extreme points of the grid find on the way to their
    `depth` best documents. The searches of the reported figures are as deep.

    Args:
        index: The postings of the passages.
        questions: Query id -> text. A judged query without a question counts as 0.
        qrels: The judgements.
        options: What is tried; its grid is a BM25Grid.
        document: Returns the document of a row of the index.
        depth: How many of the best documents of a query count.
        weights: All else of BM25.

    Raises:
        UserError: for a grid of fusions, and for fewer judged queries than folds.
    """
    grid = options.grid
    if not isinstance(grid, BM25Grid):
        raise UserError(f"tuning.grid is one of {grid.family}, which fuses arms: choose a BM25Grid.")

    def search(texts: Sequence[str], k1: float, b: float) -> Sequence[Ranking]:
        def some(asked: Sequence[int], k: int) -> list[list[tuple[int, float]]]:
            found = index.search([texts[i] for i in asked], k, replace(weights, k1=k1, b=b))
            return [list(zip(rows.tolist(), scores.tolist(), strict=True)) for scores, rows in found]

        return search_deeper(some, len(texts), depth, lambda pair: document(pair[0]), depth)

    def runs(point: Point, queries: Sequence[str]) -> dict[str, dict[str, float]]:
        asked = [query for query in queries if query in questions]
        found = search([questions[query] for query in asked], **point)
        return {q: best_documents(ranking, document, depth) for q, ranking in zip(asked, found, strict=True)}

    texts = [questions.get(query, "") for query in sorted(qrels)]
    corners = product({min(grid.k1), max(grid.k1)}, {min(grid.b), max(grid.b)})
    found = [search(texts, float(k1), float(b)) for k1, b in corners]
    pools = [
        sorted({int(row) for ranking in each for row, _ in ranking}) for each in zip(*found, strict=True)
    ]
    metric = RankingMetric.named(options.measure, depth)
    owners = [[document(row) for row in rows] for rows in pools]
    judged = JudgedCandidates.of(owners, [qrels[query] for query in sorted(qrels)], metric)
    values = _bm25_values(index, texts, pools, grid, weights, judged, metric)
    return nested_cross_validation(options, qrels, grid.points(), values, runs)


def _bm25_values(
    index: LexicalIndex,
    texts: Sequence[str],
    pools: Sequence[Sequence[int]],
    grid: BM25Grid,
    weights: BM25Weights,
    judged: JudgedCandidates,
    metric: RankingMetric,
) -> Float32[np.ndarray, "Q X"]:
    """Compute the metric of every query at every point."""
    features = [index.features(t, np.array(rows, np.int32)) for t, rows in zip(texts, pools, strict=True)]
    terms = next_power_of_two(max(len(df) for _, df, _ in features))
    width = judged.owners.shape[1]
    tf = np.stack([padded(tf, terms, width) for tf, _, _ in features])
    df = np.stack([padded(df, terms) for _, df, _ in features])
    lengths = np.stack([padded(lengths, width) for _, _, lengths in features])
    listed = np.arange(width) < np.array([len(rows) for rows in pools])[:, None]
    points = np.array([[point["k1"], point["b"]] for point in grid.points()], np.float32)
    size = np.array([len(index), index.average_length], np.float32)
    block = max(1, ELEMENTS // (len(points) * width * terms))
    inputs = (tf, df, lengths, listed, judged, points, size)
    return np.asarray(_weighted_values(*inputs, weights.variant, weights.delta, metric, block))


@partial(jax.jit, static_argnames=("variant", "delta", "metric", "block"))
def _weighted_values(
    tf: Int32[Array, "Q T C"],
    df: Int32[Array, "Q T"],
    lengths: Int32[Array, "Q C"],
    listed: Bool[Array, "Q C"],
    judged: JudgedCandidates,
    points: Float32[Array, "X 2"],
    size: Float32[Array, "2"],
    variant: Variant,
    delta: float,
    metric: RankingMetric,
    block: int,
) -> Float32[Array, "Q X"]:
    """`points` are k1 and b; `size` the number of passages and their average length."""

    def one(
        tf: Int32[Array, "T C"],
        df: Int32[Array, "T"],
        lengths: Int32[Array, "C"],
        listed: Bool[Array, "C"],
        known: JudgedCandidates,
    ) -> Float32[Array, "X"]:
        def measured(point: Float32[Array, "2"]) -> Float32[Array, ""]:
            scores = bm25_scores(tf, df, lengths, *size, *point, variant=variant, delta=delta)
            return value(metric, scores, listed, known)

        return jax.vmap(measured)(points)

    return jax.lax.map(lambda query: one(*query), (tf, df, lengths, listed, judged), batch_size=block)
