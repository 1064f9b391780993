"""Tiny collections: a folder of four files, collections in memory, and indexes on disk with a stand-in embedder."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rag.embed import Embedder
from rag.generate import Generator
from rag.index import store, writer
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.memory import MemoryIndex
from rag.ingest.load.folder import Skipped, load_folder
from rag.retrieve.collection import Collection
from rag.runtime.cache.memo import Memo
from rag.types import Chunk, Document, chunk_at

MANIFEST = "manifest.json"
FILES = {
    "seal.txt": "A seal eats fish. It sleeps on ice.",
    "krill.md": "# Krill\n\nKrill drift in swarms. A whale eats krill.",
    "page.html": "<html><head><title>Gulls</title></head><body><p>A gull nests on a cliff.</p></body></html>",
    "image.png": "\x89PNG",
}


def write_files(folder: Path) -> Path:
    """Write four small files of different kinds, of which one (an image) cannot be loaded."""
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


def write_tree(folder: Path, **files: str | bytes) -> None:
    """Write files, named with `__` for `/` and `_` for the last dot."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load_all(path: Path, **options) -> tuple[dict[str, Document], dict[str, str]]:
    """Load a folder; return the documents by their ids, and the reasons by the paths of skipped files."""
    found = list(load_folder(path, **options))
    documents = {d.id: d for d in found if isinstance(d, Document)}
    reasons = {s.path: s.reason for s in found if isinstance(s, Skipped)}
    assert len(documents) + len(reasons) == len(found), "a name came twice"
    return documents, reasons


def collection_of(
    texts: Sequence[str],
    embedder: Embedder,
    generator: Generator | None = None,
    memo: Memo | None = None,
) -> Collection:
    """Return a collection in memory: the n-th text is the document `dn`, as one chunk."""
    documents = [Document(f"d{n}", f"d{n}.txt", text) for n, text in enumerate(texts)]
    chunks = [chunk_at(document, 0, len(document.text)) for document in documents]
    return Collection(MemoryIndex(documents, chunks, embedder.encode), embedder, lambda: generator, memo)


@dataclass(frozen=True)
class StubEmbedder:
    """A stand-in embedder that cannot embed: an index can only save and restore it, with the words that it learned."""

    words: tuple[str, ...] = ()
    fingerprint: str = "abc"
    score_threshold: float | None = None
    dim: int = 8

    @property
    def spec(self) -> dict:
        return {"kind": "stub", "dim": self.dim}

    def encode(self, texts, progress=None):
        raise NotImplementedError

    def encode_queries(self, texts):
        raise NotImplementedError

    def token_spans(self, text):
        raise NotImplementedError

    def fit(self, texts):
        return self

    def save(self, folder: Path) -> None:
        if self.words:
            (folder / "learned").mkdir()
            (folder / "learned" / "words.txt").write_text("\n".join(self.words))

    def restore(self, folder: Path) -> "StubEmbedder":
        return replace(self, words=tuple((folder / "learned" / "words.txt").read_text().split()))


def make_documents(tag: str = "a", count: int = 3) -> list[Document]:
    texts = ["Grüße, 世界! 🤖 e\u0301\u200d\r\n\tend", "", "plain text of a document " * 20]
    return [Document(f"{tag}/{i}.md", f"/c/{tag}/{i}.md", texts[i % 3], f"Titel {i} ✓") for i in range(count)]


def make_chunks(documents: list[Document], size: int = 7) -> list[Chunk]:
    return [
        Chunk(f"{d.id}:{s}-{s + size}", d.id, d.path, s, s + size, d.text[s : s + size])
        for d in documents
        for s in range(0, len(d.text), size)
    ]


def make_vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def write_index(
    path: Path, tag: str = "a", count: int = 3, embedder: StubEmbedder = StubEmbedder()
) -> tuple[list[Document], list[Chunk], np.ndarray]:
    documents = make_documents(tag, count)
    chunks = make_chunks(documents)
    vectors = make_vectors(len(chunks), seed=len(tag))
    writer.write_index(path, documents, chunks, vectors, embedder, {"chunker": "fixed"})
    return documents, chunks, vectors


def write_index_with_postings(path: Path, tag: str = "a") -> list[Chunk]:
    """Write an index with postings of its chunks."""
    documents = make_documents(tag)
    chunks = make_chunks(documents)
    lexical = LexicalIndex.build([chunk.text for chunk in chunks], Analyzer(stop_words=["of"]))
    writer.write_index(
        path, documents, chunks, make_vectors(len(chunks), seed=len(tag)), StubEmbedder(), {}, lexical
    )
    return chunks


def holds(path: Path, tag: str) -> bool:
    """Return whether the index at `path`, checksums verified, is exactly what write_index(path, tag) wrote."""
    chunks = make_chunks(make_documents(tag))
    index = checked_index(path)
    return index.chunks(range(len(index))) == chunks and np.array_equal(
        index.vectors, make_vectors(len(chunks), seed=len(tag))
    )


def checked_index(path: Path) -> store.Index:
    """Open the index at `path` and compare every byte of it with its checksum."""
    index = store.Index.open(path)
    index.check()
    return index


def segment_of(path: Path) -> Path:
    (segment,) = path.glob("segment-*")
    return segment
