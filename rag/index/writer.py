"""Writing an index: a whole new segment, flushed to the disk, then the manifest in one step; see rag.index.store."""

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from rag.embed import Embedder
from rag.index import manifest as manifests
from rag.index.dense.exact import check_vectors
from rag.index.lexical.postings import LexicalIndex
from rag.index.manifest import EMBEDDER, LEXICAL, SEGMENT, EmbedderRecord, FileRecord, Manifest
from rag.index.segment import write_checksums
from rag.index.store import CHUNKS, DOCUMENTS, exists
from rag.runtime import files as cache_files
from rag.runtime.machine import environment
from rag.types import Chunk, Document, UserError, chunk_at

_LOCK = f"{manifests.NAME}.lock"

# What a killed writer can leave behind, and so all that the next one may remove.
_SEGMENT = re.compile(SEGMENT)
_TEMPORARY = re.compile(rf"\.({SEGMENT}|{re.escape(manifests.NAME)})\.[0-9a-f]{{32}}\.tmp")

_BATCH_ROWS = 1 << 14  # of an Arrow record batch: as many rows are held twice while writing


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
    """Write an index, or replace the one at `path` in one step for whoever opens it; waits for other writers.

    vectors[i] is chunks[i]'s, and so is row i of `lexical`, which need not be there. `settings`, JSON-able, go
    into the manifest as they are. Raises UserError for vectors that have no cosine, text that is no Unicode,
    documents that share an id, and a folder that holds something else; ValueError for chunks that their
    documents do not contain. Also UserError when the index's segment is no longer `base` ("": none was
    there), so that what another writer added since is not lost. Then nothing has changed.
    """
    places = _places(documents)
    _check_chunks(chunks, documents, places)
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
                _write_table(folder / "documents.arrow", DOCUMENTS, documents, _document_row)
                _write_table(folder / "chunks.arrow", CHUNKS, chunks, lambda chunk: _chunk_row(chunk, places))
                np.save(folder / "vectors.npy", vectors)
                (folder / EMBEDDER).mkdir()
                embedder.save(folder / EMBEDDER)
                if lexical is not None:
                    (folder / LEXICAL).mkdir()
                    lexical.save(folder / LEXICAL)
                files = {
                    file.relative_to(folder).as_posix(): _file_record(file) for file in _files_below(folder)
                }
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
                file.write(manifests.written(manifest))
            _remove_rubbish(path, keep=name)


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
    """Generation and segment of the index at `path`; of one that cannot be read, and is replaced, the last folder's."""
    try:
        manifest = manifests.read(path)
        return manifest.generation, manifest.segment
    except UserError:
        last = max((name for name in os.listdir(path) if _SEGMENT.fullmatch(name)), default="segment-000000-")
        return int(last.split("-")[1]), ""


def check_writable(path: Path) -> None:
    """UserError when `path` is a file, or a folder with something in it that no index of ours left there.

    An index that is damaged or of an older format may be replaced, one of a newer format not.
    """
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"index.path={path} is not a folder: choose another place for the index.")
    names = os.listdir(path)
    if exists(path):
        try:
            manifests.read(path)
        except manifests.NewerFormat:
            raise
        except UserError:
            if not any(map(_SEGMENT.fullmatch, names)):
                raise  # of something else
        return
    foreign = [name for name in names if name != _LOCK and not _is_rubbish(name)]
    if foreign:
        raise UserError(
            f"The folder {path} holds {min(foreign)!r} and no index: name an empty or new one as index.path."
        )


def _places(documents: Sequence[Document]) -> dict[str, int]:
    """Document id -> row."""
    places = {document.id: row for row, document in enumerate(documents)}
    if len(places) < len(documents):
        twice = next(document.id for row, document in enumerate(documents) if places[document.id] != row)
        raise UserError(f"Two documents have the id {twice!r}: give each document an id of its own.")
    return places


def _check_chunks(chunks: Sequence[Chunk], documents: Sequence[Document], places: Mapping[str, int]) -> None:
    """Chunks are stored as spans: one that its document would not give back is a bug of the caller."""
    for chunk in chunks:
        if chunk.document_id not in places:
            raise ValueError(f"chunk {chunk.id!r} is of document {chunk.document_id!r}, which is not there")
        if chunk != chunk_at(documents[places[chunk.document_id]], chunk.start, chunk.end):
            raise ValueError(f"chunk {chunk.id!r} is not that span of its document")


def _document_row(document: Document) -> tuple[str, ...]:
    return document.id, document.path, document.title, document.text


def _chunk_row(chunk: Chunk, places: Mapping[str, int]) -> tuple[int, ...]:
    return places[chunk.document_id], chunk.start, chunk.end


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


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_record(path: Path) -> FileRecord:
    with path.open("rb") as file:
        return FileRecord(bytes=path.stat().st_size, sha256=hashlib.file_digest(file, "sha256").hexdigest())


def _is_rubbish(name: str) -> bool:
    return bool(_SEGMENT.fullmatch(name) or _TEMPORARY.fullmatch(name))


def tidy(path: Path) -> None:
    """Remove what killed writers left in the folder of the index at `path`, where that can be written."""
    with suppress(OSError), cache_files.locked(path / manifests.NAME):
        _remove_rubbish(path, keep=manifests.read(path).segment)


def _remove_rubbish(path: Path, keep: str) -> None:
    """Remove what killed writers left, and the segments that the manifest no longer names and nobody reads."""
    with suppress(OSError):  # the index counts as it is; the next writer removes what is left
        for entry in list(path.iterdir()):
            if entry.name == keep or not _is_rubbish(entry.name):
                continue
            if not entry.is_dir():
                entry.unlink()
                continue
            with _locked(entry) as nobody_reads:
                if nobody_reads:
                    shutil.rmtree(entry)


@contextmanager
def _locked(segment: Path) -> Iterator[bool]:
    """Whether no reader has the segment open; none can open it while the block runs."""
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
