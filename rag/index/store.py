"""Open an index on disk, which rag.index.writer wrote: one immutable segment, and the manifest that names it.

    index/manifest.json              the only commit point: written last, replaced in one step (rag.index.manifest)
    index/segment-000001-1a2b3c4d/   documents.arrow  id, path, title, text
                                     chunks.arrow     document (its row), start, end: a chunk's text is a slice
                                     vectors.npy      [N, E] float32, row i is chunk i's, unit length
                                     embedder/        what the embedder learned from the corpus, if anything
                                     lexical/         the chunks' postings (rag.index.lexical.postings), if wanted
                                     checksums        of each piece of the other files (rag.index.segment)

N is the number of chunks, E the embedding dim. A writer makes a whole new segment and flushes it to the disk, then
replaces the manifest. A writer that is killed leaves a whole index, the old one or the new one, and temporary files
that the next writer removes. A reader holds a shared lock on its segment, and no writer removes a locked segment: an
opened index does not change. Opening reads the manifest and maps the files into memory; data is read only when it is
asked for, and compared with its checksum first.
"""

import fcntl
import os
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int, Int64

from rag.embed import Embedder
from rag.index import manifest as manifests
from rag.index.lexical.postings import LexicalIndex
from rag.index.manifest import EMBEDDER, LEXICAL, Manifest
from rag.index.segment import Segment, VerifiedTable
from rag.runtime.cache.keys import content_key
from rag.runtime.checksums import Damaged
from rag.types import Chunk, Document, UserError, chunk_at

DOCUMENTS = pa.schema([(name, pa.large_string()) for name in ("id", "path", "title", "text")])
CHUNKS = pa.schema([(name, pa.int64()) for name in ("document", "start", "end")])


def exists(path: Path) -> bool:
    """Return whether there is an index at `path`, even one that this version cannot read."""
    return (path / manifests.NAME).exists()


class Index:
    """An opened index, read-only; the number of a chunk is its row in `vectors`.

    It does not change, even while another process replaces the one on disk. Every method raises UserError where a file
    that it reads is damaged.
    """

    def __init__(self, path: Path, manifest: Manifest):
        self.path, self.manifest = path, manifest
        self._document_row: dict[str, int] = {}  # of documents that were read: document_text usually follows
        folder = path / manifest.segment
        with _undamaged(path):
            self._close = weakref.finalize(self, os.close, _shared_lock(folder))
            self._segment = Segment(folder, manifest.files, manifest.checksums)
            self._vectors = self._segment.array("vectors.npy")
            self._documents = VerifiedTable(self._segment["documents.arrow"], DOCUMENTS)
            self._chunks = self._segment["chunks.arrow"]
            expected = (manifest.chunks, manifest.dim)
            if self._vectors.dtype != np.float32 or self._vectors.shape != expected:
                raise Damaged(
                    f"{folder / 'vectors.npy'} does not hold {expected[0]} vectors of {expected[1]} numbers"
                )
            if len(self._documents) != manifest.documents:
                raise Damaged(f"{folder / 'documents.arrow'} does not hold {manifest.documents} documents")

    @classmethod
    def open(cls, path: Path) -> "Index":
        """Open the index at `path`. Raises UserError if there is none, or of another format, or a file is damaged."""
        manifest = manifests.read(path)
        while True:
            try:
                return cls(path, manifest)
            except UserError:
                latest = manifests.read(path)
                if latest.segment == manifest.segment:
                    raise
                manifest = latest  # a writer replaced the index while it was being opened

    def close(self) -> None:
        """Let writers remove the files. Arrays that were read stay valid; nothing more may be read."""
        self._close()

    def recheck(self) -> None:
        """Verify again the parts that were read already, of files modified since. Raises UserError."""
        with _undamaged(self.path):
            self._segment.recheck()

    def check(self) -> None:
        """Compare every byte of the index with its checksum. Raises UserError."""
        with _undamaged(self.path):
            self._segment.check()

    def __len__(self) -> int:
        """Return the number of chunks."""
        return len(self._vectors)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the files."""
        return sum(record.bytes for record in self.manifest.files.values())

    @property
    def fingerprint(self) -> str:
        """Return the SHA-256 (hex) of the documents' texts and the chunks' spans, not of the vectors."""
        files = self.manifest.files
        return content_key([files[name].sha256 for name in ("documents.arrow", "chunks.arrow")])

    @property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of all chunks, memory-mapped; the first access verifies all of them."""
        with _undamaged(self.path):
            self._segment["vectors.npy"].check()
        return self._vectors

    @property
    def lexical(self) -> LexicalIndex | None:
        """Return the chunks' postings, memory-mapped again at each call; None where the index has none."""
        if not any(name.startswith(LEXICAL) for name in self.manifest.files):
            return None
        with _undamaged(self.path):
            self._segment.check(LEXICAL)
            lexical = LexicalIndex.load(self._segment.folder / LEXICAL)
            if len(lexical) != len(self):
                raise Damaged(f"{self._segment.folder / LEXICAL} holds postings of {len(lexical)} chunks")
        return lexical

    def check_embedder(self, embedder: Embedder) -> None:
        """Raise UserError when this embedder did not make the index."""
        made_by = self.manifest.embedder
        if embedder.fingerprint != made_by.fingerprint:
            named = str(made_by.spec.get("uri", made_by.spec.get("kind")))
            if named == embedder.spec.get("uri", embedder.spec.get("kind")):
                named += " with other files or settings than it has now"
            raise UserError(
                f"The index at {self.path} was built by another embedder, {named}: "
                "choose that one with embedder=..., or ingest the corpus again with this one."
            )

    def restore(self, embedder: Embedder) -> Embedder:
        """Return the embedder as it was when it made this index. Raises UserError when another one made it."""
        self.check_embedder(embedder)
        with _undamaged(self.path):
            self._segment.check(EMBEDDER)
        return embedder.restore(self._segment.folder / EMBEDDER)

    def chunks(self, rows: Iterable[int] | Int[np.ndarray, "n"]) -> list[Chunk]:
        """Return the chunks of these rows, in this order. Raises IndexError for a row out of range."""
        wanted = [int(row) for row in rows]
        for row in wanted:
            if not 0 <= row < len(self):
                raise IndexError(f"chunk {row} of {len(self)}")
        spans = self.spans[wanted].tolist()
        documents = self._documents_at({document for document, _, _ in spans})
        return [chunk_at(documents[document], start, end) for document, start, end in spans]

    def document_text(self, document_id: str) -> str:
        """Return the extracted text that a document's spans point into. Raises KeyError for an unknown id."""
        row = self._document_row.get(document_id)
        if row is None:
            self._document_row = {name: row for row, name in enumerate(self.document_ids())}
            row = self._document_row[document_id]
        return self._documents_at({row})[row].text

    def all_documents(self) -> list[Document]:
        """Return the documents in their order."""
        with _undamaged(self.path):
            return [Document(**row) for row in self._documents.rows()]

    def document_ids(self) -> list[str]:
        """Return the documents' ids in their order."""
        with _undamaged(self.path):
            return self._documents.column("id")

    @cached_property
    def spans(self) -> Int64[np.ndarray, "N 3"]:
        """Return the row of each chunk's document, its first character and its end character (exclusive)."""
        with _undamaged(self.path):
            self._chunks.check()
            with pa.ipc.open_file(pa.py_buffer(self._chunks.content)) as reader:
                table = reader.read_all()
            if table.schema != CHUNKS or len(table) != len(self):
                raise Damaged(f"{self._chunks.path} does not hold the spans of {len(self)} chunks")
        return np.stack([column.to_numpy() for column in table.columns], axis=1)

    def _documents_at(self, rows: set[int]) -> dict[int, Document]:
        with _undamaged(self.path):
            documents = {row: Document(**self._documents.row(row)) for row in rows}
        self._document_row.update((document.id, row) for row, document in documents.items())
        return documents


@contextmanager
def _undamaged(path: Path) -> Iterator[None]:
    """Turn Damaged into a UserError that names the index."""
    try:
        yield
    except Damaged as error:
        if not path.exists():
            raise UserError(
                f"The index at {path} was moved or removed while it was open: open it again."
            ) from error
        raise UserError(f"The index at {path} is damaged, {error}: ingest the corpus again.") from error


def _shared_lock(folder: Path) -> int:
    """Lock the folder and return an open descriptor, whose closing unlocks it. Raises Damaged where it is missing."""
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except (FileNotFoundError, NotADirectoryError) as error:
        raise Damaged(f"{folder} is missing") from error
    fcntl.flock(descriptor, fcntl.LOCK_SH)
    return descriptor
