"""Checksums of files (XXH3), so that nothing is computed with bytes that have changed on the disk.

The files of an index are verified piece by piece, each piece before its first use, because a query may need little of a
large file. A file of the cache is verified as a whole when it is opened. Its checksum is at its end (the trailer), so
that the content and its checksum are written in one step:

    content | magic, 8 bytes | length of the content, 8 bytes | XXH3-128 of content, magic, length and name, 16 bytes

The name is that of the cache entry, so that a file copied over another one is damage too. numpy, a dynamic linker and a
memory map ignore the trailer.

XXH3 finds accidental damage, not attacks: whoever may write to a folder may also write its checksums.
Source: Y. Collet, xxhash.com; github.com/Cyan4973/xxHash, doc/xxhash_spec.md.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

import numpy as np
import xxhash
from jaxtyping import UInt64

from rag.runtime.files import file_stamp
from rag.runtime.shapes import ceil_div

PIECE = 1 << 16  # bytes of a piece, which has one checksum

_MAGIC = b"ragseal\1"
_TRAILER = 32  # bytes


class Damaged(Exception):
    """A file is not as it was written. The message begins with its path and says how it differs."""


def piece_checksums(path: Path) -> UInt64[np.ndarray, "pieces"]:
    """Return the XXH3-64 of each piece of a file; pieces have PIECE bytes, and the last may have fewer."""
    with memory_map(path) as content:
        return _checksums(content, range(pieces(len(content))))


def pieces(size: int) -> int:
    """Return how many pieces a file of `size` bytes has."""
    return ceil_div(size, PIECE)


def check_size(path: Path, size: int) -> None:
    """Raise Damaged when a file is missing or does not have `size` bytes."""
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise Damaged(f"{path} has {found} bytes instead of {size}")


class CheckedFile:
    """A memory-mapped file; `check` verifies the pieces that are about to be used, each once."""

    def __init__(self, path: Path, size: int, checksums: UInt64[np.ndarray, "pieces"]):
        """Map a file into memory, without verifying it.

        Args:
            path: the file.
            size: its bytes when it was written.
            checksums: its `piece_checksums` when it was written.

        Raises:
            Damaged: the file is missing or has another size.
            ValueError: the number of checksums does not fit the size.
        """
        if len(checksums) != pieces(size):
            raise ValueError(f"{size} bytes have {pieces(size)} checksums, not {len(checksums)}")
        check_size(path, size)
        self.path, self._checksums = path, checksums
        self.content = _map(path)
        self._verified = np.zeros(len(checksums), bool)
        self._stamp = file_stamp(path)

    def recheck(self) -> None:
        """Verify the verified pieces again if the file was written to since then. Raises Damaged."""
        try:
            now = file_stamp(self.path)
        except FileNotFoundError:  # the mapped pages stay as they are
            return
        if now == self._stamp:
            return
        check_size(self.path, len(self.content))
        verified = np.flatnonzero(self._verified)
        self._verified[:] = False
        self._verify(verified)
        self._stamp = now

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Verify the pieces with the bytes from `start` to `stop` (None: the end of the file). Raises Damaged."""
        stop = len(self.content) if stop is None else stop
        if start >= stop:
            return
        first, end = start // PIECE, pieces(stop)
        if not self._verified[first:end].all():
            self._verify(first + np.flatnonzero(~self._verified[first:end]))

    def _verify(self, numbers: np.ndarray) -> None:
        wrong = _checksums(self.content, numbers) != self._checksums[numbers]
        if wrong.any():
            start = int(numbers[wrong][0]) * PIECE
            raise Damaged(f"{self.path} has changed since it was written (after byte {start})")
        self._verified[numbers] = True


def _checksums(content: memoryview, numbers: range | np.ndarray) -> UInt64[np.ndarray, "pieces"]:
    digests = (xxhash.xxh3_64_intdigest(content[i * PIECE : (i + 1) * PIECE]) for i in map(int, numbers))
    return np.fromiter(digests, np.uint64, len(numbers))


def _map(path: Path) -> memoryview:
    """Map the bytes of a file into memory, for as long as a view of them exists."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # an empty file cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def memory_map(path: Path) -> Iterator[memoryview]:
    """Map the bytes of a file into memory while the block runs."""
    content = _map(path)
    try:
        yield content
    finally:
        whole = content.obj
        content.release()
        if isinstance(whole, mmap.mmap):
            whole.close()


# --- files that end with their checksum


def append_checksum(file: IO[bytes], name: str = "") -> None:
    """Write the trailer with the checksum at the end of a file.

    Args:
        file: the file, open for writing at its end.
        name: the name of the cache entry, which the checksum covers too.
    """
    file.flush()
    with memory_map(Path(file.name)) as content:
        file.write(_trailer(content, name))


def verify_file(path: Path, name: str = "") -> None:
    """Verify a file that `append_checksum` ended.

    Raises:
        FileNotFoundError: there is no such file.
        Damaged: the file is not as it was written.
    """
    with memory_map(path) as data:
        _verify_trailer(data, path, name)


def read_verified(path: Path, name: str = "") -> bytes:
    """Return the content of a file that `append_checksum` ended. Raises as `verify_file` does."""
    data = path.read_bytes()
    _verify_trailer(memoryview(data), path, name)
    return data[:-_TRAILER]


def _verify_trailer(data: memoryview, path: Path, name: str) -> None:
    length = len(data) - _TRAILER
    if length < 0:
        raise Damaged(f"{path} is cut short")
    with data[:length] as content:
        if bytes(data[length:]) != _trailer(content, name):
            raise Damaged(f"{path} has changed since it was written")


def _trailer(content: memoryview, name: str) -> bytes:
    head = _MAGIC + struct.pack("<Q", len(content))
    digest = xxhash.xxh3_128(content)
    digest.update(head + name.encode())
    return head + digest.digest()
