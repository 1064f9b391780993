"""A dataset through the retrieval stages: its passages, and what each question finds among them."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from rag.embed import Embedder
from rag.embed.vector_cache import cached
from rag.evaluate.datasets import Dataset
from rag.evaluate.tuning.cross_validation import best_documents
from rag.generate import Generator
from rag.index.memory import MemoryIndex
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.split import chunks_of
from rag.pipeline import Progress
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.runtime.cache_key import content_key
from rag.runtime.import_closure import code_version
from rag.runtime.memo import Memo, model_version
from rag.types import Chunk, Hit, UserError, chunk_at


def build_collection(
    dataset: Dataset,
    chunks: Sequence[Chunk],
    embedder: Embedder,
    generator: Callable[[], Generator] | None = None,
    memo: Memo | None = None,
    progress: Progress = lambda *_: None,
) -> Collection:
    """The dataset's corpus in these chunks, ready to be searched. UserError when there are none."""
    if not chunks:
        raise UserError(f"no document of {dataset.name} has text; check the dataset's corpus")
    keeping = embedder if memo is None else cached(embedder)
    fitted = keeping.fit([chunk.text for chunk in chunks])

    def embed(texts: Sequence[str]) -> np.ndarray:
        return fitted.encode(texts, progress=lambda done: progress("embed", done, len(texts)))

    return Collection(MemoryIndex(dataset.corpus, chunks, embed), fitted, generator, memo)


def chunk_all(
    dataset: Dataset, chunker: Chunker, embedder: Embedder, memo: Memo | None = None
) -> list[Chunk] | None:
    """The chunks of all documents, in order; None where a dry memo has not all of them."""
    if memo is None:
        return [c for document in dataset.corpus for c in chunks_of(document, chunker, embedder)]
    texts = {document.id: document for document in dataset.corpus}
    splitting = cached(embedder)

    def compute(items: Sequence) -> list[list[tuple[int, int]]]:
        found = (chunks_of(texts[name], chunker, splitting) for name, _ in items)
        return [[(piece.start, piece.end) for piece in pieces] for pieces in found]

    items = [[document.id, content_key(document.text)] for document in dataset.corpus]
    meaning = content_key(chunker, model_version(embedder), code_version(chunker))
    spans = memo.map("chunk", meaning, items, compute, batch=256)
    if None in spans:
        return None
    return [
        chunk_at(document, start, end)
        for document, found in zip(dataset.corpus, spans, strict=True)
        for start, end in found
    ]


def search(collection: Collection, method: Retriever, dataset: Dataset, depth: int) -> dict[str, list[Hit]]:
    """Query id -> hits, best first, deep enough for `depth` documents where so many can be found."""
    found: dict[str, list[Hit]] = {}
    short, k = list(dataset.queries), depth + 1  # one more, for the question's own document
    while short:
        hits = collection.search(method, [dataset.queries[query] for query in short], k)
        found |= zip(short, hits, strict=True)
        short = [
            query
            for query in short
            if len(found[query]) == k and len({hit.chunk.document_id for hit in found[query]}) < depth
        ]
        k *= 4
    return found


def documents(
    found: Mapping[str, Sequence[Hit]], dataset: Dataset, depth: int
) -> dict[str, dict[str, float]]:
    """Query id -> document id -> score of the `depth` best documents, as metrics.evaluate takes it.

    A document scores as its best chunk (MaxP; Dai and Callan 2019). Where queries are documents of the corpus,
    none finds itself.
    """
    rankings = {
        query: [(hit.chunk.document_id, hit.score) for hit in without_own_document(hits, query, dataset)]
        for query, hits in found.items()
    }
    return {query: best_documents(ranking, str, depth) for query, ranking in rankings.items()}


def without_own_document(hits: Sequence[Hit], query: str, dataset: Dataset) -> list[Hit]:
    """The hits without the query's own document, where queries are documents of the corpus."""
    return [hit for hit in hits if not (dataset.drop_self_hits and hit.chunk.document_id == query)]
