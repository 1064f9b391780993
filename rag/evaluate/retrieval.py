"""Run a dataset through the retrieval stages: chunk and embed its corpus, search for its queries, rank documents."""

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, TypeVar

import numpy as np

from rag.embed import Embedder
from rag.embed.encode import encode_passages
from rag.embed.vector_cache import cached
from rag.evaluate.datasets import Dataset
from rag.generate import Generator
from rag.index.fusion import Ranking
from rag.index.memory import MemoryIndex
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.split import chunks_of
from rag.pipeline import Progress
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.runtime.cache.keys import content_key
from rag.runtime.cache.memo import Memo, model_version
from rag.runtime.code.import_closure import code_version
from rag.runtime.stages import check_frozen
from rag.types import Chunk, Hit, UserError, chunk_at

T = TypeVar("T")  # a passage


def build_collection(
    dataset: Dataset,
    chunks: Sequence[Chunk],
    embedder: Embedder,
    generator: Callable[[], Generator] | None = None,
    memo: Memo | None = None,
    progress: Progress = lambda *_: None,
) -> Collection:
    """Return the dataset's corpus as a collection of these chunks, which are embedded when a search first needs it.

    Args:
        dataset: The documents.
        chunks: What chunk_all returned.
        embedder: Fitted to the chunks here. With a memo its vectors are cached on disk.
        generator: Returns the language model, for retrievers that use one.
        memo: Caches results of the stages; None computes everything.
        progress: Called with "embed", how many chunks are done, and of how many.

    Raises:
        UserError: when there are no chunks.
    """
    if not chunks:
        raise UserError(f"no document of {dataset.name} has text; check the dataset's corpus")
    fitted = (embedder if memo is None else cached(embedder)).fit([chunk.text for chunk in chunks])

    def embed(texts: Sequence[str]) -> np.ndarray:
        return encode_passages(fitted, texts, lambda done: progress("embed", done, len(texts)))

    return Collection(
        MemoryIndex(dataset.corpus, chunks, embed),
        fitted,
        generator,
        memo,
        dataset.queries | dataset.unanswerable_queries,
    )


def chunk_all(
    dataset: Dataset, chunker: Chunker, embedder: Embedder, memo: Memo | None = None
) -> list[Chunk] | None:
    """Return the chunks of all documents, in order, or None where a dry memo does not have them all.

    Args:
        dataset: The documents.
        chunker: Divides each of them.
        embedder: Counts tokens for the chunker, and embeds sentences for some.
        memo: Caches the chunks; None computes them.
    """
    check_frozen(chunker)
    if memo is None:
        return [c for document in dataset.corpus for c in chunks_of(document, chunker, embedder)]
    texts = {document.id: document for document in dataset.corpus}
    cached_embedder = cached(embedder)

    def compute(items: Sequence) -> list[list[tuple[int, int]]]:
        found = (chunks_of(texts[name], chunker, cached_embedder) for name, _ in items)
        return [[(piece.start, piece.end) for piece in pieces] for pieces in found]

    items = [[document.id, content_key(document.text)] for document in dataset.corpus]
    key = content_key(chunker, model_version(embedder), code_version(chunker))
    spans = memo.map("chunk", key, items, compute, batch=256)
    if None in spans:
        return None
    return [
        chunk_at(document, start, end)
        for document, found in zip(dataset.corpus, spans, strict=True)
        for start, end in found
    ]


def search(collection: Collection, method: Retriever, dataset: Dataset, depth: int) -> dict[str, list[Hit]]:
    """Return query id -> hits, best first.

    Args:
        collection: The passages.
        method: The retriever.
        dataset: The queries.
        depth: How many documents the hits of a query are from, where so many can be found.
    """
    texts = list(dataset.queries.values())

    def some(asked: Sequence[int], k: int) -> list[list[Hit]]:
        return cached_search(collection, method, [texts[i] for i in asked], k)

    k = depth + 1  # one more, for the question's own document
    found = search_deeper(some, len(texts), k, lambda hit: hit.chunk.document_id, depth)
    return dict(zip(dataset.queries, found, strict=True))


def search_deeper(
    search: Callable[[Sequence[int], int], Sequence[list[T]]],
    questions: int,
    k: int,
    document: Callable[[T], str],
    depth: int,
) -> list[list[T]]:
    """Search for passages, and again for more where they are from too few documents.

    Args:
        search: Returns the k best passages of these questions, which are given by number.
        questions: How many there are.
        k: The passages to search for at first.
        document: Returns the document of a passage.
        depth: How many documents are enough.

    Returns:
        The passages of each question, best first: of `depth` documents where so many can be found.
    """
    found: list[list[T]] = [[] for _ in range(questions)]
    short = list(range(questions))
    while short:
        for i, passages in zip(short, search(short, k), strict=True):
            found[i] = passages
        full = [i for i in short if len(found[i]) == k]
        short = [i for i in full if len({document(passage) for passage in found[i]}) < depth]
        k *= 4
    return found


def documents(
    found: Mapping[str, Sequence[Hit]], dataset: Dataset, depth: int
) -> dict[str, dict[str, float]]:
    """Return query id -> document id -> score of the `depth` best documents, as metrics.retrieval.evaluate takes it.

    A document scores as its best chunk (MaxP; Dai and Callan 2019). Where queries are documents of the corpus,
    a query's own document is left out.
    """
    rankings = {
        query: [(hit.chunk.document_id, hit.score) for hit in without_own_document(hits, query, dataset)]
        for query, hits in found.items()
    }
    return {query: best_documents(ranking, str, depth) for query, ranking in rankings.items()}


def best_documents(ranking: Ranking, document: Callable[[Any], str], depth: int) -> dict[str, float]:
    """Return the `depth` best documents of a ranking of passages with their scores, each that of its best passage."""
    best: dict[str, float] = {}
    for passage, score in ranking:
        best.setdefault(document(passage), score)
    return dict(islice(best.items(), depth))


def without_own_document(hits: Sequence[Hit], query: str, dataset: Dataset) -> list[Hit]:
    """Return the hits without the query's own document, where queries are documents of the corpus (ArguAna)."""
    return [hit for hit in hits if not (dataset.drop_self_hits and hit.chunk.document_id == query)]
