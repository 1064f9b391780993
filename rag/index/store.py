"""An index on disk: immutable segments, and one manifest that says which of them count.

    index/manifest.json              the only commit point: written last, replaced in one step
    index/segment-000001-1a2b3c4d/   documents.arrow  id, path, title, text
                                     chunks.arrow     document (a row), start, end: a chunk's text is a slice
                                     vectors.npy      [N, E] float32, row i is chunk i's, unit length
                                     embedder/        what the embedder learned from the corpus, if anything
                                     lexical/         the chunks' postings (rag.index.lexical), if asked for

A writer makes a whole new segment and flushes it to the disk, then replaces the manifest. Killed at any
moment it leaves the index of before or of after, and rubbish that the next write removes. Opening reads the
manifest and maps the files into memory; what is not asked for is not read.
"""

import hashlib
import json
import os
import re
import shutil
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32, Int

from rag import cache
from rag.embed import Embedder
from rag.index.dense import check_vectors
from rag.index.lexical import LexicalIndex
from rag.measure import environment
from rag.types import Chunk, Document, UserError, chunk_at

FORMAT = 1  # of the folder's contents; a reader refuses a newer one
_MANIFEST, _LOCK, _EMBEDDER, _LEXICAL = "manifest.json", "manifest.json.lock", "embedder", "lexical"
_KEYS = {"format", "generation", "documents", "chunks", "dim", "embedder", "segments"}

# What a killed writer can leave behind, and so all that the next one may remove.
_SEGMENT = re.compile(r"segment-\d{6}-[0-9a-f]{8}")
_TEMPORARY = re.compile(rf"\.({_SEGMENT.pattern}|{re.escape(_MANIFEST)})\.[0-9a-f]{{32}}\.tmp")

_DOCUMENTS = pa.schema([(name, pa.large_string()) for name in ("id", "path", "title", "text")])
_CHUNKS = pa.schema([(name, pa.int64()) for name in ("document", "start", "end")])
_BATCH_ROWS = 1 << 14  # of an Arrow record batch: as many rows are held twice while writing


def write(
    path: Path,
    documents: Sequence[Document],
    chunks: Sequence[Chunk],
    vectors: Float32[np.ndarray, "N E"],
    embedder: Embedder,
    settings: Mapping[str, Any] | None = None,
    lexical: LexicalIndex | None = None,
    base: int | None = None,
) -> None:
    """Write an index, or replace the one at `path` in one step for whoever opens it; waits for other writers.

    vectors[i] is chunks[i]'s, and so is row i of `lexical`, which need not be there. `settings`, JSON-able, go
    into the manifest as they are. Raises UserError for vectors that have no cosine, text that is no Unicode,
    documents that share an id, and a folder that holds something else; ValueError for chunks that their
    documents do not contain. Also UserError when the index is no longer of the generation `base` (0: none was
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
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"Cannot make the index folder {path} ({error.strerror}): choose another.") from error
    with cache.locked(path / _MANIFEST):
        check_writable(path)
        latest = _read_manifest(path)["generation"] if exists(path) else 0
        if base is not None and base != latest:
            raise UserError(f"Another program changed the index at {path} meanwhile: run this again.")
        name = f"segment-{latest + 1:06d}-{uuid.uuid4().hex[:8]}"
        with cache.atomic_folder(path / name) as folder:
            _write_table(folder / "documents.arrow", _DOCUMENTS, documents, _document_row)
            _write_table(folder / "chunks.arrow", _CHUNKS, chunks, lambda chunk: _chunk_row(chunk, places))
            np.save(folder / "vectors.npy", vectors)
            (folder / _EMBEDDER).mkdir()
            embedder.save(folder / _EMBEDDER)
            if lexical is not None:
                (folder / _LEXICAL).mkdir()
                lexical.save(folder / _LEXICAL)
            files = {file.relative_to(folder).as_posix(): _file_record(file) for file in _files_below(folder)}
        counts = {"documents": len(documents), "chunks": len(chunks)}
        manifest = {
            "format": FORMAT,
            "generation": latest + 1,
            **counts,
            "dim": vectors.shape[1],
            "embedder": {"fingerprint": embedder.fingerprint, "spec": embedder.spec},
            "settings": dict(settings or {}),
            # deleted: rows that no longer count; none can be deleted yet
            "segments": [{"name": name, **counts, "deleted": [], "files": files}],
            "environment": environment(),
        }
        with cache.atomic_file(path / _MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
        _remove_rubbish(path, keep=name)


def exists(path: Path) -> bool:
    """Whether there is an index at `path`, be it one that this version cannot read."""
    return (path / _MANIFEST).exists()


def check_writable(path: Path) -> None:
    """UserError when `path` is a file, or a folder with something in it that no index of ours left there."""
    if not os.path.lexists(path):
        return
    if not path.is_dir():
        raise UserError(f"index.path={path} is not a folder: choose another place for the index.")
    if exists(path):
        _read_manifest(path)
        return
    foreign = [e.name for e in path.iterdir() if e.name != _LOCK and not _is_rubbish(e.name)]
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


def _read_table(path: Path) -> pa.Table:
    """The table, its columns mapped into memory."""
    with pa.memory_map(str(path)) as source, pa.ipc.open_file(source) as reader:
        return reader.read_all()


def _files_below(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _file_record(path: Path) -> dict[str, Any]:
    return {"bytes": path.stat().st_size, "sha256": _sha256(path)}


def _sha256(path: Path) -> str:
    """Of the bytes as they are now: cache.file_sha256 trusts the time stamp, which decay leaves alone."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _is_rubbish(name: str) -> bool:
    return bool(_SEGMENT.fullmatch(name) or _TEMPORARY.fullmatch(name))


def _remove_rubbish(path: Path, keep: str) -> None:
    """Remove the segments that the manifest no longer names, and what killed writers left."""
    for entry in list(path.iterdir()):
        if entry.name != keep and _is_rubbish(entry.name):
            if entry.is_dir():
                shutil.rmtree(entry)
            else:
                entry.unlink()


def _read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of the index at `path`; UserError when there is none that this version can read."""
    file = path / _MANIFEST
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "holds no index" if path.is_dir() else "does not exist" if not path.exists() else "is a file"
        raise UserError(
            f"index.path={path} {what}: make one with scripts/ingest.py corpus.path=DIR index.path=DIR."
        ) from error
    except (OSError, ValueError) as error:  # ValueError: neither UTF-8 nor JSON
        raise UserError(f"Cannot read {file} ({error}): ingest the corpus into another folder.") from error
    if not isinstance(manifest, dict) or not isinstance(manifest.get("format"), int):
        raise UserError(f"{file} is not the manifest of an index: choose another index.path.")
    if manifest["format"] > FORMAT:
        raise UserError(
            f"The index at {path} is of format {manifest['format']}, and this version reads {FORMAT}: "
            "update this program, or ingest the corpus into another folder."
        )
    if missing := _KEYS - manifest.keys():
        raise UserError(
            f"{file} is damaged, it has no {min(missing)!r}: ingest the corpus into another folder."
        )
    return manifest


class Index:
    """An opened index, read-only; chunk numbers are the rows of `vectors`.

    It stays as it was when it was opened, even while another process replaces the one on disk.
    """

    def __init__(self, path: Path, manifest: dict[str, Any], *, verify: bool):
        self.path, self.manifest = path, manifest
        [segment] = manifest["segments"]
        self._segment = path / segment["name"]
        _check_files(self._segment, segment["files"], verify)
        try:
            self._vectors = np.load(self._segment / "vectors.npy", mmap_mode="r", allow_pickle=False)
            self._documents = _read_table(self._segment / "documents.arrow")
            self._spans = _read_table(self._segment / "chunks.arrow")
        except (pa.ArrowInvalid, ValueError) as error:
            raise UserError(f"The index at {path} is damaged ({error}): ingest the corpus again.") from error
        found = (len(self._documents), len(self._spans), *self._vectors.shape)
        if found != (manifest["documents"], manifest["chunks"], manifest["chunks"], manifest["dim"]):
            raise UserError(
                f"The index at {path} is damaged, its files differ in size: ingest the corpus again."
            )

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "Index":
        """The index at `path`; `verify` reads all files and compares their checksums.

        Raises UserError when there is none, when it is of a newer format, and when a file is missing, cut
        short or (with `verify`) changed.
        """
        manifest = _read_manifest(path)
        while True:
            try:
                return cls(path, manifest, verify=verify)
            except (UserError, FileNotFoundError):
                latest = _read_manifest(path)
                if latest["generation"] == manifest["generation"]:
                    raise
                manifest = latest  # a writer replaced the index while it was being opened

    def __len__(self) -> int:
        """How many chunks there are."""
        return len(self._spans)

    @property
    def fingerprint(self) -> str:
        """64 hex digits of the documents' texts and the chunks' spans."""
        files = self.manifest["segments"][0]["files"]
        return cache.content_key([files[name]["sha256"] for name in ("documents.arrow", "chunks.arrow")])

    @property
    def generation(self) -> int:
        """Which of the indexes that were written to this folder it is, from 1."""
        return self.manifest["generation"]

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return len(self._documents)

    @property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """The vectors of all chunks, memory-mapped."""
        return self._vectors

    @property
    def lexical(self) -> LexicalIndex | None:
        """The chunks' postings, mapped into memory anew at each call; None where the index has none.

        Also None once another process has replaced the index: they can be built from the chunks' texts.
        """
        if not any(name.startswith(f"{_LEXICAL}/") for name in self.manifest["segments"][0]["files"]):
            return None
        try:
            lexical = LexicalIndex.load(self._segment / _LEXICAL)
        except UserError:
            if _read_manifest(self.path)["generation"] != self.manifest["generation"]:
                return None
            raise
        if len(lexical) != len(self):
            raise UserError(
                f"The index at {self.path} is damaged, its postings are of {len(lexical)} chunks and not of "
                f"{len(self)}: ingest the corpus again."
            )
        return lexical

    def check_embedder(self, embedder: Embedder) -> None:
        """UserError when it is not the one that made this index."""
        made_by = self.manifest["embedder"]
        if embedder.fingerprint != made_by["fingerprint"]:
            named = made_by["spec"].get("uri", made_by["spec"].get("kind"))
            if named == embedder.spec.get("uri", embedder.spec.get("kind")):
                named += " with other files or settings than it has now"
            raise UserError(
                f"The index at {self.path} was built by another embedder, {named}: "
                "choose that one with embedder=..., or ingest the corpus again with this one."
            )

    def restore(self, embedder: Embedder) -> Embedder:
        """The embedder as it was when it made this index; UserError when another one did."""
        self.check_embedder(embedder)
        return embedder.restore(self._segment / _EMBEDDER)

    def chunks(self, rows: Iterable[int] | Int[np.ndarray, "n"]) -> list[Chunk]:
        """The chunks with these numbers, in this order. Raises IndexError for a number out of range."""
        spans = [self._span(int(row)) for row in rows]
        documents = {place: self._document(place) for place in {span["document"] for span in spans}}
        return [chunk_at(documents[span["document"]], span["start"], span["end"]) for span in spans]

    def document_text(self, document_id: str) -> str:
        """The extracted text that a document's spans point into. Raises KeyError for an unknown id."""
        return self._document(self._places[document_id]).text

    def all_documents(self) -> list[Document]:
        """The documents in their order."""
        return [Document(**row) for row in self._documents.to_pylist()]

    def document_ids(self) -> list[str]:
        """The documents' ids in their order."""
        return self._documents["id"].to_pylist()

    def spans(self) -> Int[np.ndarray, "N 3"]:
        """Of each chunk the number of its document, its first character and its end, exclusive: int64."""
        return np.stack([self._spans[name].to_numpy() for name in ("document", "start", "end")], axis=1)

    def _span(self, row: int) -> dict[str, int]:
        if not 0 <= row < len(self):
            raise IndexError(f"chunk {row} of {len(self)}")
        return self._spans.slice(row, 1).to_pylist()[0]

    def _document(self, place: int) -> Document:
        return Document(**self._documents.slice(place, 1).to_pylist()[0])

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._documents["id"].to_pylist())}


def _check_files(folder: Path, files: Mapping[str, Mapping[str, Any]], verify: bool) -> None:
    for name, expected in files.items():
        file = folder / name
        if not file.is_file():
            problem = "is missing"
        elif file.stat().st_size != expected["bytes"]:
            problem = f"has {file.stat().st_size} bytes instead of {expected['bytes']}"
        elif verify and _sha256(file) != expected["sha256"]:
            problem = "has changed since it was written"
        else:
            continue
        raise UserError(f"The index is damaged, {file} {problem}: ingest the corpus again.")
