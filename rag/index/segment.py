"""The files of a segment: each byte is compared with its checksum before anything is computed from it.

Arrays of a .npy file and columns of an Arrow file are views of the memory-mapped file: opening reads next to nothing,
and data that is never asked for is never read.
"""

import struct
from collections.abc import Mapping
from functools import cached_property
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import xxhash
from numpy.lib import format as numpy_format

from rag.index.manifest import FileRecord
from rag.runtime.checksums import CheckedFile, Damaged, check_size, piece_checksums, pieces

CHECKSUMS = "checksums"  # the file of all other files' checksums, in the order of their names
_NPY_HEADER = 1 << 10  # bytes: more than the header of an array of few dimensions has


def write_checksums(folder: Path, names: list[str]) -> str:
    """Write the checksums of the pieces of these files in `folder`; return the checksum of the checksums."""
    sums = b"".join(piece_checksums(folder / name).astype("<u8").tobytes() for name in names)
    (folder / CHECKSUMS).write_bytes(sums)
    return xxhash.xxh3_128_hexdigest(sums)


class Segment:
    """The files in a folder, as the manifest records them.

    Args:
        folder: where the files are.
        records: the size and digest of each file, by its path in the folder.
        checksum: of the file of checksums.

    Raises:
        Damaged: when a file is missing or has another size, or the checksums are not those that were written.
    """

    def __init__(self, folder: Path, records: Mapping[str, FileRecord], checksum: str):
        self.folder = folder
        self._files: dict[str, CheckedFile] = {}
        self._records = records
        try:
            content = (folder / CHECKSUMS).read_bytes()
        except FileNotFoundError as error:
            raise Damaged(f"{folder / CHECKSUMS} is missing") from error
        if xxhash.xxh3_128_hexdigest(content) != checksum:
            raise Damaged(f"{folder / CHECKSUMS} has changed since it was written")
        sums = np.frombuffer(content, "<u8")
        self._checksums: dict[str, np.ndarray] = {}
        start = 0
        for name, record in records.items():
            stop = start + pieces(record.bytes)
            self._checksums[name], start = sums[start:stop], stop
            check_size(folder / name, record.bytes)
        if start != len(sums):
            raise Damaged(f"{folder / CHECKSUMS} holds {len(sums)} checksums instead of {start}")

    def __getitem__(self, name: str) -> CheckedFile:
        """Return a file, memory-mapped. Raises Damaged, also for one that the manifest does not name."""
        if name not in self._records:
            raise Damaged(f"its manifest does not name {name}")
        if name not in self._files:
            size = self._records[name].bytes
            self._files[name] = CheckedFile(self.folder / name, size, self._checksums[name])
        return self._files[name]

    def recheck(self) -> None:
        """Compare what was read with its checksums again, of files that were written to since. Raises Damaged."""
        for file in self._files.values():
            file.recheck()

    def check(self, folder: str = "") -> None:
        """Compare all files in a folder of the segment with their checksums, by default all. Raises Damaged."""
        for name in self._records:
            if name.startswith(folder):
                self[name].check()

    def array(self, name: str) -> np.ndarray:
        """Return the array of a .npy file; only its header is compared. Raises Damaged where it is not one."""
        file = self[name]
        file.check(0, min(len(file.content), _NPY_HEADER))
        header = BytesIO(file.content[:_NPY_HEADER])
        try:
            if numpy_format.read_magic(header) == (1, 0):
                shape, by_columns, dtype = numpy_format.read_array_header_1_0(header)
            else:
                shape, by_columns, dtype = numpy_format.read_array_header_2_0(header)
            order: Literal["F", "C"] = "F" if by_columns else "C"
            return np.ndarray(shape, dtype, file.content, offset=header.tell(), order=order)
        except (ValueError, TypeError) as error:
            raise Damaged(f"{file.path} is no array ({error})") from error


class VerifiedTable:
    """An Arrow file of text columns; a row is compared with its checksums before it is read.

    Raises Damaged where the file is no Arrow file of the schema.
    """

    def __init__(self, file: CheckedFile, schema: pa.Schema):
        self._file = file
        buffer = pa.py_buffer(file.content)
        self._base = buffer.address
        try:
            with pa.ipc.open_file(buffer) as reader:
                self._table = reader.read_all()
            self._check_outside_columns()
        except (pa.ArrowException, ValueError, OSError) as error:  # the footer is read before it is compared
            raise Damaged(f"{file.path} is no Arrow file ({error})") from error
        if self._table.schema != schema:
            raise Damaged(f"{file.path} has other columns than {', '.join(schema.names)}")

    def __len__(self) -> int:
        return len(self._table)

    def row(self, row: int) -> dict[str, Any]:
        """Return the values of a row by the names of their columns. Raises Damaged."""
        batch = int(np.searchsorted(self._ends, row, side="right"))
        position = row - (int(self._ends[batch - 1]) if batch else 0)
        values = {}
        for name, column in zip(self._table.column_names, self._table.columns, strict=True):
            chunk = column.chunk(batch)
            self._check_text(chunk, position)
            values[name] = chunk[position].as_py()
        return values

    def column(self, name: str) -> list[Any]:
        """Return all values of a column. Raises Damaged."""
        for chunk in self._table[name].chunks:
            for buffer in filter(None, chunk.buffers()):
                self._file.check(*self._extent(buffer))
        return self._table[name].to_pylist()

    def rows(self) -> list[dict[str, Any]]:
        """Return all rows. Raises Damaged."""
        self._file.check()
        return self._table.to_pylist()

    @cached_property
    def _ends(self) -> np.ndarray:
        """Return the first row after each record batch."""
        return np.cumsum([len(chunk) for chunk in self._table.column(0).chunks])

    def _check_outside_columns(self) -> None:
        """Compare the bytes of the file that are not values of columns: they say where the values are."""
        chunks = [chunk for column in self._table.columns for chunk in column.chunks]
        end = 0
        for start, stop in sorted(self._extent(b) for chunk in chunks for b in filter(None, chunk.buffers())):
            self._file.check(end, start)
            end = max(end, stop)
        self._file.check(end)

    def _check_text(self, chunk: pa.Array, position: int) -> None:
        """Compare one text of a large_string array: its offsets, then its characters."""
        _, offsets, characters = chunk.buffers()
        at = self._extent(offsets)[0] + 8 * (chunk.offset + position)
        self._file.check(at, at + 16)
        start, stop = struct.unpack_from("<qq", self._file.content, at)
        first = self._extent(characters)[0]
        self._file.check(first + start, first + stop)

    def _extent(self, buffer: pa.Buffer) -> tuple[int, int]:
        """Return where a buffer begins and ends in the file."""
        start = buffer.address - self._base
        return start, start + buffer.size
