"""The manifest of an index on disk: what the index holds, the folder of its segment, and that folder's files.

It is JSON that is checked by a schema, and ends with a checksum of its own fields, so that a damaged manifest is
refused before its fields are used.
"""

import json
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Annotated, Any

import xxhash
from annotated_types import Ge, Predicate
from pydantic import StringConstraints

from rag.runtime.records import Record, fitted_record, read_json, stays_inside
from rag.types import UserError

FORMAT = 2  # of the folder's contents; other formats are refused
NAME = "manifest.json"
EMBEDDER, LEXICAL = "embedder/", "lexical/"  # folders of the segment
SEGMENT = r"segment-\d{6}-[0-9a-f]{8}"

_REMEDY = "ingest the corpus again"


def _names_a_file(name: str) -> bool:
    return bool(PurePosixPath(name).parts) and stays_inside(name)


FileName = Annotated[str, Predicate(_names_a_file)]
Digest = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
Number = Annotated[int, Ge(0)]


class NewerFormat(UserError):
    """The index was written by a later version of this program."""


class FileRecord(Record):
    """A file of the segment as it was written."""

    bytes: Number
    sha256: Digest


class EmbedderRecord(Record):
    """The embedder that made the vectors."""

    fingerprint: str
    spec: dict[str, Any]


class Manifest(Record):
    """Schema of manifest.json, which names the current segment of an index and its files."""

    format: Number
    generation: Annotated[int, Ge(1)]  # how many indexes were written to this folder
    documents: Number
    chunks: Number
    dim: Number
    embedder: EmbedderRecord
    settings: dict[str, Any]
    segment: Annotated[str, StringConstraints(pattern=f"^{SEGMENT}$")]
    files: dict[FileName, FileRecord]  # of the segment, in the order of their names
    checksums: str  # XXH3-128 of the file that holds the checksums of their pieces
    environment: dict[str, Any]
    checksum: str = ""


def to_json(manifest: Manifest) -> str:
    """Return the manifest as JSON, with its checksum."""
    fields = manifest.model_dump(exclude={"checksum"})
    return json.dumps({**fields, "checksum": _checksum(fields)}, indent=1)


def read(index: Path) -> Manifest:
    """Return the manifest of the index in a folder.

    Raises UserError where there is no index, where the manifest is damaged, and for another format than this one.
    """
    file = index / NAME
    try:
        fields = read_json(file, _REMEDY)
    except (FileNotFoundError, NotADirectoryError) as error:
        what = "holds no index" if index.is_dir() else "is a file" if index.exists() else "does not exist"
        raise UserError(
            f"index.path={index} {what}: make one with scripts/ingest.py corpus.path=DIR index.path=DIR."
        ) from error
    if "checksum" in fields and fields["checksum"] != _checksum(fields):
        raise UserError(f"{file} has changed since it was written: {_REMEDY}.")
    if not isinstance(fields.get("format"), int) or "generation" not in fields:
        raise UserError(f"{file} is not the manifest of an index: choose another index.path.")
    if fields["format"] > FORMAT:
        raise NewerFormat(
            f"The index at {index} is of format {fields['format']}, and this version reads {FORMAT}: "
            "update this program, or ingest the corpus into another folder."
        )
    if fields["format"] < FORMAT:
        raise UserError(
            f"The index at {index} is of format {fields['format']}, an older one than {FORMAT}: make it again with "
            f"scripts/ingest.py corpus.path=DIR index.path={index}."
        )
    if "checksum" not in fields:
        raise UserError(f"{file} is damaged, it has no checksum: {_REMEDY}.")
    return fitted_record(file, fields, Manifest, _REMEDY)


def _checksum(fields: Mapping[str, Any]) -> str:
    """Return XXH3-128 of the other fields, 32 hex digits."""
    others = {name: value for name, value in fields.items() if name != "checksum"}
    return xxhash.xxh3_128_hexdigest(json.dumps(others, sort_keys=True).encode())
