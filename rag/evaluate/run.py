"""A dataset through the retrieval stages: what each query finds, as a run that metrics can judge."""

from collections import Counter
from collections.abc import Callable

import numpy as np

from rag.embed import Embedder
from rag.evaluate.datasets import Dataset
from rag.index.dense import DenseIndex
from rag.ingest.chunk import Chunker, chunks_of


def retrieve(
    dataset: Dataset,
    chunker: Chunker,
    embedder: Embedder,
    depth: int = 100,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, dict[str, float]]:
    """Query id -> document id -> score, the `depth` best documents of each query, exactly.

    A document scores as its best chunk (MaxP; Dai and Callan 2019).
    """
    chunks = [c for document in dataset.corpus for c in chunks_of(document, chunker, embedder.token_spans)]
    texts = [chunk.text for chunk in chunks]
    embedder = embedder.fit(texts)
    vectors = embedder.encode(texts, progress=lambda done: progress("embed", done, len(texts)))
    owners = [chunk.document_id for chunk in chunks]
    # no document has more chunks than `most`, so this many chunks hold at least `depth` documents
    most = max(Counter(owners).values())
    scores, ids = DenseIndex(vectors).search(
        embedder.encode_queries(list(dataset.queries.values())), depth * most
    )
    return {
        query: _best_chunks(owners, row, best, depth)
        for query, row, best in zip(dataset.queries, ids, scores, strict=True)
    }


def _best_chunks(owners: list[str], ids: np.ndarray, scores: np.ndarray, depth: int) -> dict[str, float]:
    """Document id -> its best chunk's score, of the first `depth` documents of a ranked list of chunks."""
    found: dict[str, float] = {}
    for chunk, score in zip(ids.tolist(), scores.tolist(), strict=True):
        found.setdefault(owners[chunk], score)
        if len(found) == depth:
            break
    return found
