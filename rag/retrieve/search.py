"""A question to its nearest chunks: embed, search, look the texts up."""

from collections.abc import Sequence

from rag.embed import Embedder
from rag.index.dense import DenseIndex
from rag.index.store import Index
from rag.types import Hit, UserError


class DenseRetriever:
    """Exact cosine search over a stored index."""

    def __init__(self, index: Index, embedder: Embedder, k: int = 5):
        """Raises UserError for k below 1 and for an embedder other than the one that made the index."""
        if k < 1:
            raise UserError(f"retriever.k is {k}; give 1 or more")
        self.index, self.k = index, k
        self._embedder = index.restore(embedder)
        self._dense = DenseIndex(index.vectors)

    @property
    def relevant_from(self) -> float | None:
        """The score from which a hit is likely to be about the question; None where that is not known."""
        return self._embedder.relevant_from

    def search(self, questions: Sequence[str]) -> list[list[Hit]]:
        """The k best hits of each question, best first, ties to the chunk that was ingested first."""
        scores, ids = self._dense.search(self._embedder.encode_queries(questions), self.k)
        return [
            [Hit(chunk, float(score)) for chunk, score in zip(self.index.chunks(row), best, strict=True)]
            for row, best in zip(ids, scores, strict=True)
        ]
