"""Tune a retrieval method on a dataset: which methods can be tuned, and for which parameters."""

from rag.evaluate.datasets import Dataset
from rag.evaluate.retrieval import without_own_document
from rag.evaluate.tuning.bm25 import tune_bm25
from rag.evaluate.tuning.cross_validation import Tuned
from rag.evaluate.tuning.fusion import tune_fusion
from rag.evaluate.tuning.grids import BM25Grid, Tuning
from rag.index.fusion import Id
from rag.index.lexical.weighting import BM25Weights
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Hybrid, Lexical
from rag.types import UserError


def check_tunable(tuning: Tuning, method: Retriever, dataset: Dataset) -> None:
    """Raise UserError for a grid that has no parameters of the method."""
    if isinstance(tuning.grid, BM25Grid):
        bm25 = isinstance(method, Lexical) and isinstance(method.weights, BM25Weights)
        if not bm25 or dataset.drop_self_hits:
            raise UserError("tuning=bm25 takes retriever=bm25, and queries that are no documents themselves.")
    elif not isinstance(method, Hybrid):
        raise UserError(
            f"tuning={tuning.grid.family} takes retriever=hybrid, without transform and reranker."
        )


def tune(tuning: Tuning, method: Retriever, collection: Collection, dataset: Dataset, depth: int) -> Tuned:
    """Tune a method that check_tunable accepts.

    Args:
        tuning: The grid, the metric and the folds.
        method: A BM25 search, or a hybrid.
        collection: The passages.
        dataset: Queries and judgements.
        depth: How many of the best documents of a query count.

    Returns:
        The method's run with parameters that were never chosen on the queries they are reported for.
    """
    chunks = collection.chunks()

    def document(row: Id) -> str:
        return chunks[int(row)].document_id

    if isinstance(method, Lexical) and isinstance(method.weights, BM25Weights):
        index = collection.lexical(method.analyzer)
        return tune_bm25(index, dataset.queries, dataset.qrels, tuning, document, depth, method.weights)
    assert isinstance(method, Hybrid)
    questions = list(dataset.queries.values())
    arms = [
        dict(zip(dataset.queries, cached_search(collection, arm, questions, k), strict=True))
        for arm, k in method.inner(depth + 1)  # the depth of an untuned search
    ]
    rankings = {
        query: [
            [(hit.row, hit.score) for hit in without_own_document(arm[query], query, dataset)] for arm in arms
        ]
        for query in dataset.queries
    }
    return tune_fusion(rankings, dataset.qrels, tuning, method.lower_bounds, document, depth)
