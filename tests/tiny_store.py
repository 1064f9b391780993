"""Small indexes with an embedder that only has to be saved and restored."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from rag.index import store, writer
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.types import Chunk, Document

MANIFEST = "manifest.json"


@dataclass(frozen=True)
class Stub:
    """An embedder as far as a store can tell: one that learned some words."""

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

    def restore(self, folder: Path) -> "Stub":
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
    path: Path, tag: str = "a", count: int = 3, embedder: Stub = Stub()
) -> tuple[list[Document], list[Chunk], np.ndarray]:
    documents = make_documents(tag, count)
    chunks = make_chunks(documents)
    vectors = make_vectors(len(chunks), seed=len(tag))
    writer.write_index(path, documents, chunks, vectors, embedder, {"chunker": "fixed"})
    return documents, chunks, vectors


def write_with_words(path: Path, tag: str = "a") -> list[Chunk]:
    """As _write, with postings."""
    documents = make_documents(tag)
    chunks = make_chunks(documents)
    lexical = LexicalIndex.build([chunk.text for chunk in chunks], Analyzer(stop_words=["of"]))
    writer.write_index(path, documents, chunks, make_vectors(len(chunks), seed=len(tag)), Stub(), {}, lexical)
    return chunks


def holds(path: Path, tag: str) -> bool:
    """Whether the index at `path`, checksums verified, is exactly what write_index(path, tag) wrote."""
    chunks = make_chunks(make_documents(tag))
    index = checked_index(path)
    return index.chunks(range(len(index))) == chunks and np.array_equal(
        index.vectors, make_vectors(len(chunks), seed=len(tag))
    )


def checked_index(path: Path) -> store.Index:
    """The index at `path`, every byte of it compared with its checksum."""
    index = store.Index.open(path)
    index.check()
    return index


def segment_of(path: Path) -> Path:
    (segment,) = path.glob("segment-*")
    return segment
