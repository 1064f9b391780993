"""A dataset through the retrieval stages: its passages, and what each question finds among them."""

from collections.abc import Callable, Mapping, Sequence

from rag.cache import content_key
from rag.embed import Embedder
from rag.embed_cache import CachedEmbedder
from rag.evaluate.datasets import Dataset
from rag.generate import Generator
from rag.index.memory import MemoryIndex
from rag.ingest import chunk, sentences
from rag.ingest.chunk import Chunker, chunks_of
from rag.memo import Memo, code_version
from rag.retrieve.collection import Collection, Retriever
from rag.types import Chunk, Document, Hit, UserError

Progress = Callable[[str, int, int], None]  # stage, done, of how many


def collect(
    dataset: Dataset,
    chunker: Chunker,
    embedder: Embedder,
    generator: Callable[[], Generator] | None = None,
    memo: Memo | None = None,
    progress: Progress = lambda *_: None,
) -> Collection:
    """The dataset's corpus in chunks, ready to be searched. UserError when no document has text."""
    chunks = _chunks(dataset, chunker, embedder, memo)
    if not chunks:
        raise UserError(f"no document of {dataset.name} has text; check the dataset's corpus")
    texts = [chunk.text for chunk in chunks]
    fitted = embedder.fit(texts)
    if memo is not None and fitted is embedder:  # else a vector depends on the corpus, not on its text alone
        fitted = CachedEmbedder(embedder)
    index = MemoryIndex(
        dataset.corpus,
        chunks,
        lambda texts: fitted.encode(texts, progress=lambda done: progress("embed", done, len(texts))),
    )
    return Collection(index, fitted, generator, memo)


def _chunks(dataset: Dataset, chunker: Chunker, embedder: Embedder, memo: Memo | None) -> list[Chunk]:
    if memo is None:
        return [c for document in dataset.corpus for c in chunks_of(document, chunker, embedder)]
    documents = {document.id: document for document in dataset.corpus}

    def compute(items: Sequence) -> list[list[tuple[int, int]]]:
        found = (chunks_of(documents[name], chunker, embedder) for name, _ in items)
        return [[(chunk.start, chunk.end) for chunk in chunks] for chunks in found]

    items = [[document.id, content_key(document.text)] for document in dataset.corpus]
    meaning = content_key(chunker, embedder.fingerprint, code_version(chunk, sentences))
    spans = memo.map("chunk", meaning, items, compute, batch=256)
    return [
        _chunk(document, start, end)
        for document, found in zip(dataset.corpus, spans, strict=True)
        for start, end in found or ()
    ]


def _chunk(document: Document, start: int, end: int) -> Chunk:
    name = f"{document.id}:{start}-{end}"
    return Chunk(name, document.id, document.path, start, end, document.text[start:end])


def search(
    collection: Collection, method: Retriever, dataset: Dataset, depth: int
) -> dict[str, list[Hit]]:
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
    run: dict[str, dict[str, float]] = {}
    for query, hits in found.items():
        best: dict[str, float] = {}
        for hit in others(hits, query, dataset):
            best.setdefault(hit.chunk.document_id, hit.score)
        run[query] = dict(list(best.items())[:depth])
    return run


def others(hits: Sequence[Hit], query: str, dataset: Dataset) -> list[Hit]:
    """The hits without the query's own document, where queries are documents of the corpus."""
    return [hit for hit in hits if not (dataset.drop_self_hits and hit.chunk.document_id == query)]
