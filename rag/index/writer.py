"""Write an index: a whole new segment, flushed to the disk, then the manifest in one step; see rag.index.store."""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from operator import attrgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float, Float32

from rag.embed import Embedder
from rag.index import manifest as manifests
from rag.index.lexical.postings import LexicalIndex
from rag.index.manifest import EMBEDDER, LEXICAL, SEGMENT, EmbedderRecord, FileRecord, Manifest
from rag.index.segment import write_checksums
from rag.index.store import CHUNKS, DOCUMENTS, exists
from rag.runtime import files as cache_files
from rag.runtime.machine.hardware import environment
from rag.types import Chunk, Document, UserError, chunk_at

_LOCK = f"{manifests.NAME}.lock"

# The names of what a killed writer can leave, and so of all that the next one may remove.
_SEGMENT = re.compile(SEGMENT)
_TEMPORARY = re.compile(rf"\.({SEGMENT}|{re.escape(manifests.NAME)})\.[0-9a-f]{{32}}\.tmp")

_CHECKED_ROWS = 1 << 14  # vectors that are checked together
_BATCH_ROWS = 1 << 14  # rows of an Arrow record batch: so many are in memory twice while writing


def write_index(
    path: Path,
    documents: Sequence[Document],
    chunks: Sequence[Chunk],
    vectors: Float32[np.ndarray, "N E"],
    embedder: Embedder,
    settings: Mapping[str, Any] | None = None,
    lexical: LexicalIndex | None = None,
    base: str | None = None,
) -> None:
    """Write an index, or replace the one at `path` in one step for all who open it; waits for other writers.

    Where it raises, the index at `path` has not changed.

    Args:
        path: the folder of the index.
        documents: of which each chunk is a span.
        chunks: in the order of their rows.
        vectors: vectors[i] is that of chunks[i].
        embedder: the one that made the vectors.
        settings: JSON-able, stored in the manifest.
        lexical: the chunks' postings in the same order; None for an index without postings.
        base: the segment that the index must still have, "" for no index, so that what another writer added since is
            not lost; None replaces any.

    Raises:
        UserError: for vectors without a cosine, text that is not Unicode, documents that share an id, a folder that
            holds something else, and an index that no longer has the segment `base`.
        ValueError: for chunks that their documents do not contain.
    """
    document_rows = _rows_by_id(documents)
    _check_chunks(chunks, documents, document_rows)
    if len(vectors) != len(chunks):
        raise ValueError(f"{len(chunks)} chunks need as many vectors, not {len(vectors)}")
    if lexical is not None and len(lexical) != len(chunks):
        raise ValueError(f"{len(chunks)} chunks need postings of as many, not {len(lexical)}")
    check_vectors(vectors)
    check_writable(path)  # before the lock, which would leave a file there
    with _writing(path):
        cache_files.make_folder(path)
        with cache_files.locked(path / manifests.NAME):
            check_writable(path)
            latest, segment = _latest(path)
            if base is not None and base != segment:
                raise UserError(f"Another program changed the index at {path} meanwhile: run this again.")
            name = f"segment-{latest + 1:06d}-{uuid.uuid4().hex[:8]}"
            with cache_files.atomic_folder(path / name) as folder:
                _write_table(folder / "documents.arrow", DOCUMENTS, documents, attrgetter(*DOCUMENTS.names))
                _write_table(
                    folder / "chunks.arrow",
                    CHUNKS,
                    chunks,
                    lambda chunk: (document_rows[chunk.document_id], chunk.start, chunk.end),
                )
                np.save(folder / "vectors.npy", vectors)
                (folder / EMBEDDER).mkdir()
                embedder.save(folder / EMBEDDER)
                if lexical is not None:
                    (folder / LEXICAL).mkdir()
                    lexical.save(folder / LEXICAL)
                written = sorted(file for file in folder.rglob("*") if file.is_file())
                files = {file.relative_to(folder).as_posix(): _file_record(file) for file in written}
                checksums = write_checksums(folder, list(files))
            manifest = Manifest(
                format=manifests.FORMAT,
                generation=latest + 1,
                documents=len(documents),
                chunks=len(chunks),
                dim=vectors.shape[1],
                embedder=EmbedderRecord(fingerprint=embedder.fingerprint, spec=embedder.spec),
                settings=dict(settings or {}),
                segment=name,
                files=files,
                checksums=checksums,
                environment=environment(),
            )
            with cache_files.atomic_file(path / manifests.NAME, "w") as file:
                file.write(manifests.to_json(manifest))
            _remove_leftovers(path, keep=name)


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:  # numpy's short writes have no strerror
        raise UserError(
            f"Cannot write the index at {path} ({error.strerror or error}): what was there is as it was; make "
            "room and permission there, or choose another index.path."
        ) from error


def _latest(path: Path) -> tuple[int, str]:
    """Return generation and segment of the index at `path`; the last folder's generation where it cannot be read."""
    try:
        manifest = manifests.read(path)
        return manifest.generation, manifest.segment
    except UserError:
        last = max((name for name in os.listdir(path) if _SEGMENT.fullmatch(name)), default="segment-000000-")
        return int(last.split("-")[1]), ""


def check_writable(path: Path) -> None:
    """Raise UserError when `path` is a file, or a folder with files in it that are not of an index.

    An index that is damaged or of an older format may be replaced, one of a newer format not.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"index.path={path} is not a folder: choose a folder for the index.")
    names = os.listdir(path)
    if exists(path):
        try:
            manifests.read(path)
        except manifests.NewerFormat:
            raise
        except UserError:
            if not any(map(_SEGMENT.fullmatch, names)):
                raise  # the manifest is of something else
        return
    foreign = [name for name in names if name != _LOCK and not _is_leftover(name)]
    if foreign:
        raise UserError(
            f"The folder {path} holds {min(foreign)!r} and no index: name an empty or new one as index.path."
        )


def _rows_by_id(documents: Sequence[Document]) -> dict[str, int]:
    rows = {document.id: row for row, document in enumerate(documents)}
    if len(rows) < len(documents):
        twice = next(document.id for row, document in enumerate(documents) if rows[document.id] != row)
        raise UserError(f"Two documents have the id {twice!r}: give each document an id of its own.")
    return rows


def _check_chunks(chunks: Sequence[Chunk], documents: Sequence[Document], rows: Mapping[str, int]) -> None:
    """Raise ValueError for a chunk that is not a span of its document: chunks are stored as spans."""
    for chunk in chunks:
        if chunk.document_id not in rows:
            raise ValueError(f"chunk {chunk.id!r} is of document {chunk.document_id!r}, which is not there")
        if chunk != chunk_at(documents[rows[chunk.document_id]], chunk.start, chunk.end):
            raise ValueError(f"chunk {chunk.id!r} is not that span of its document")


def check_vectors(vectors: Float[np.ndarray, "N E"]) -> None:
    """Raise UserError unless every row is a finite unit vector: NaN would rank first, zero has no cosine."""
    for start in range(0, len(vectors), _CHECKED_ROWS):  # a memory-mapped matrix stays on disk
        norms = np.linalg.norm(np.asarray(vectors[start : start + _CHECKED_ROWS]), axis=1)
        wrong = np.flatnonzero(~(np.abs(norms - 1) < 1e-2))
        if len(wrong):
            row, norm = start + wrong[0], norms[wrong[0]]
            what = "holds NaN or infinity" if not np.isfinite(norm) else f"has length {norm:.3g} instead of 1"
            raise UserError(
                f"Vector {row} of {len(vectors)} {what}, so it has no cosine: "
                "leave its text out, or check the embedder that made it."
            )


def _write_table(path: Path, schema: pa.Schema, items: Sequence, row: Callable[[Any], tuple]) -> None:
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, schema) as writer:
        for start in range(0, len(items), _BATCH_ROWS):
            columns = zip(*map(row, items[start : start + _BATCH_ROWS]), strict=True)
            try:
                arrays = [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)]
            except UnicodeEncodeError as error:
                raise UserError(
                    f"A document's text, id, path or title holds {error.object[error.start]!r}, half of a "
                    "character, which cannot be stored: remove it."
                ) from error
            writer.write_batch(pa.record_batch(arrays, schema=schema))


def _file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _is_leftover(name: str) -> bool:
    return bool(_SEGMENT.fullmatch(name) or _TEMPORARY.fullmatch(name))


def tidy(path: Path) -> None:
    """Remove what killed writers left in the folder of the index at `path`, where the folder is writable."""
    with suppress(OSError), cache_files.locked(path / manifests.NAME):
        _remove_leftovers(path, keep=manifests.read(path).segment)


def _remove_leftovers(path: Path, keep: str) -> None:
    """Remove what killed writers left, and the segments that the manifest no longer names and nobody reads."""
    with suppress(OSError):  # the index is whole without this; the next writer removes the rest
        for entry in list(path.iterdir()):
            if entry.name == keep or not _is_leftover(entry.name):
                continue
            if not entry.is_dir():
                entry.unlink()
                continue
            with _locked(entry) as nobody_reads:
                if nobody_reads:
                    shutil.rmtree(entry)


@contextmanager
def _locked(segment: Path) -> Iterator[bool]:
    """Yield whether no reader has the segment open; none can open it while the block runs."""
    descriptor = os.open(segment, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        yield True
    finally:
        os.close(descriptor)
