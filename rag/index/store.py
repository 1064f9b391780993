"""An index on disk: immutable segments, and one manifest that says which of them count.

    index/manifest.json                the only commit point: written last, replaced in one step
    index/segments/<name>/documents.arrow  id, path, title, text
                          chunks.arrow     document (row number), start, end: a chunk's text is a slice
                          vectors.npy      [chunks, E] float32, unit length
                          embedder/        what the embedder learned from the corpus, if anything

A crash at any moment leaves the manifest of before or of after, each with whole segments; what it left half
written is removed by the next write. Nothing is read until it is asked for: Arrow and .npy are memory-mapped.
"""

import hashlib
import json
import shutil
import uuid
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from jaxtyping import Float32

from rag import cache
from rag.embed import Embedder
from rag.index.dense import check_vectors
from rag.measure import environment
from rag.types import Chunk, Document, UserError

FORMAT = 1
_MANIFEST, _SEGMENTS, _EMBEDDER = "manifest.json", "segments", "embedder"


def write(
    path: Path,
    documents: Sequence[Document],
    chunks: Sequence[Chunk],
    vectors: Float32[np.ndarray, "N E"],
    embedder: Embedder,
    settings: dict[str, Any] | None = None,
) -> None:
    """Write an index, or replace the one at `path` in one step; `settings` go into the manifest as they are.

    Raises UserError for vectors that have no cosine and for a folder that holds something else; then nothing
    has changed.
    """
    check_writable(path)
    check_vectors(vectors)
    with cache.locked(path / "write"):
        segment = uuid.uuid4().hex[:12]
        with cache.atomic_folder(path / _SEGMENTS / segment) as folder:
            _write_segment(folder, documents, chunks, vectors, embedder)
        manifest = {
            "format": FORMAT,
            "embedder": {"fingerprint": embedder.fingerprint, "spec": embedder.spec, "segment": segment},
            "segments": [
                {
                    "name": segment,
                    "documents": len(documents),
                    "chunks": len(chunks),
                    "deleted": [],  # rows that no longer count; none can be deleted yet
                    "files": _files(path / _SEGMENTS / segment),
                }
            ],
            "settings": settings or {},
            "environment": environment(),
        }
        with cache.atomic_file(path / _MANIFEST, "w") as file:
            json.dump(manifest, file, indent=1)
        _remove_others(path / _SEGMENTS, segment)


def check_writable(path: Path) -> None:
    """Raise UserError when `path` is a file, or a folder that holds something other than an index."""
    if path.exists() and not path.is_dir():
        raise UserError(f"index.path={path} is a file; name a folder")
    ours = {_MANIFEST, _SEGMENTS, "write.lock"}
    if path.is_dir() and (others := sorted(entry.name for entry in path.iterdir() if entry.name not in ours)):
        leftovers = all(name.startswith(f".{_MANIFEST}.") for name in others)  # of a write that was killed
        if not leftovers:
            raise UserError(
                f"{path} is no index, it holds {others[0]!r}; name an empty folder, a new one, or an index"
            )


def _write_segment(folder: Path, documents, chunks, vectors, embedder: Embedder) -> None:
    place = {document.id: row for row, document in enumerate(documents)}
    text = {name: pa.array([getattr(d, name) for d in documents], pa.large_string()) for name in _TEXTS}
    _write_arrow(folder / "documents.arrow", pa.table(text))
    spans = {
        "document": [place[chunk.document_id] for chunk in chunks],
        "start": [chunk.start for chunk in chunks],
        "end": [chunk.end for chunk in chunks],
    }
    _write_arrow(folder / "chunks.arrow", pa.table({k: pa.array(v, pa.int64()) for k, v in spans.items()}))
    np.save(folder / "vectors.npy", vectors)
    (folder / _EMBEDDER).mkdir()
    embedder.save(folder / _EMBEDDER)


_TEXTS = ("id", "path", "title", "text")


def _write_arrow(path: Path, table: pa.Table) -> None:
    with pa.ipc.new_file(path, table.schema) as writer:
        writer.write_table(table.combine_chunks())


def _read_arrow(path: Path) -> dict[str, pa.Array]:
    """The columns of a file with at most one record batch, memory-mapped."""
    table = pa.ipc.open_file(pa.memory_map(str(path))).read_all()
    return {name: table.column(name).combine_chunks() for name in table.column_names}


def _files(folder: Path) -> dict[str, dict[str, Any]]:
    """Name -> size and SHA-256 of every file below `folder`."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): {"bytes": path.stat().st_size, "sha256": _sha256(path)}
        for path in paths
    }


def _sha256(path: Path) -> str:
    """Of the bytes as they are now: cache.file_sha256 would trust the time stamp, and decay leaves that alone."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _remove_others(folder: Path, keep: str) -> None:
    """Remove the segments that the manifest no longer names, and what a killed write left."""
    for entry in folder.iterdir():
        if entry.name != keep:
            shutil.rmtree(entry)


class Index:
    """An opened index; chunk numbers are the rows of `vectors`."""

    def __init__(self, path: Path, manifest: dict[str, Any]):
        self.path, self.manifest = path, manifest
        [segment] = manifest["segments"]
        self._segment = path / _SEGMENTS / segment["name"]
        self._counts = segment["documents"], segment["chunks"]

    @classmethod
    def open(cls, path: Path, *, verify: bool = False) -> "Index":
        """The index at `path`; `verify` reads all files and compares their checksums.

        Raises UserError when there is none, when it is of a newer format, and when a file is missing,
        cut short or (with `verify`) changed.
        """
        try:
            manifest = json.loads((path / _MANIFEST).read_text())
        except FileNotFoundError as error:
            what = "holds no index" if path.is_dir() else "does not exist"
            raise UserError(
                f"index.path={path} {what}; make one with scripts/ingest.py corpus.path=DIR index.path={path}"
            ) from error
        except (OSError, ValueError) as error:
            raise UserError(f"cannot read {path / _MANIFEST} ({error}); ingest the corpus again") from error
        if manifest.get("format") != FORMAT:
            raise UserError(
                f"{path} is of format {manifest.get('format')}, and this version reads {FORMAT}; ingest the corpus again"
            )
        for segment in manifest["segments"]:
            _check_files(path / _SEGMENTS / segment["name"], segment["files"], verify)
        return cls(path, manifest)

    def __len__(self) -> int:
        return self._counts[1]

    @property
    def documents(self) -> int:
        """How many documents there are."""
        return self._counts[0]

    @cached_property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """The vectors of all chunks, memory-mapped."""
        return np.load(self._segment / "vectors.npy", mmap_mode="r")

    def restore(self, embedder: Embedder) -> Embedder:
        """The embedder as it was when it made this index; UserError when another one did."""
        made_by = self.manifest["embedder"]
        if embedder.fingerprint != made_by["fingerprint"]:
            named = made_by["spec"].get("uri", made_by["spec"]["kind"])
            raise UserError(
                f"the index {self.path} was built by another embedder, {named}; "
                "choose that one with embedder=..., or ingest the corpus again with this one"
            )
        return embedder.restore(self._segment / _EMBEDDER)

    def chunks(self, rows: Iterable[int]) -> list[Chunk]:
        """The chunks with these numbers."""
        return [self._chunk(int(row)) for row in rows]

    def document_text(self, document_id: str) -> str:
        """The extracted text that a document's spans point into. Raises KeyError for an unknown id."""
        return self._documents["text"][self._places[document_id]].as_py()

    def _chunk(self, row: int) -> Chunk:
        document, start, end = (self._spans[name][row].as_py() for name in ("document", "start", "end"))
        name, path, text = (self._documents[column][document].as_py() for column in ("id", "path", "text"))
        return Chunk(f"{name}:{start}-{end}", name, path, start, end, text[start:end])

    @cached_property
    def _documents(self) -> dict[str, pa.Array]:
        return _read_arrow(self._segment / "documents.arrow")

    @cached_property
    def _spans(self) -> dict[str, pa.Array]:
        return _read_arrow(self._segment / "chunks.arrow")

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: row for row, name in enumerate(self._documents["id"].to_pylist())}


def _check_files(folder: Path, files: dict[str, dict[str, Any]], verify: bool) -> None:
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
        raise UserError(f"the index is damaged, {file} {problem}; ingest the corpus again")
