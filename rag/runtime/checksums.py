"""Checksums of files (XXH3), so that a byte that changed on the disk is never computed with.

An index is compared piece by piece, each before its first use, because a query may touch little of a large file. A file
of the cache is compared as a whole when it is opened; its checksum is its own last bytes, so that it is written in one
step with what it covers:

    content | magic, 8 bytes | length of the content, 8 bytes | XXH3-128 of content, magic, length and name, 16 bytes

The name is that of the entry, so that a file in the place of another one is damage too. numpy, a dynamic linker and a
memory map read such a file as if its end were not there.

XXH3 finds damage by chance, not by intent; whoever may write to a folder may also write its checksums.
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

PIECE = 1 << 16  # bytes of a file that have one checksum

_MAGIC = b"ragseal\1"
_TRAILER = 32  # bytes


class Damaged(Exception):
    """A file is not what was written. The message begins with its name and says how it differs."""


def piece_checksums(path: Path) -> UInt64[np.ndarray, "P"]:
    """XXH3-64 of each piece of a file, of PIECE bytes each but for the last."""
    with memory_map(path) as content:
        return _checksums(content, range(pieces(len(content))))


def pieces(size: int) -> int:
    """How many checksums a file of so many bytes has."""
    return -(-size // PIECE)


def check_size(path: Path, size: int) -> None:
    """Raise Damaged when a file is missing or is not of so many bytes."""
    if not path.is_file():
        raise Damaged(f"{path} is missing")
    if (found := path.stat().st_size) != size:
        raise Damaged(f"{path} has {found} bytes instead of {size}")


def stamp(path: Path) -> tuple[int, ...]:
    """What tells that a file was written to or replaced. Raises FileNotFoundError."""
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


class CheckedFile:
    """A file in memory of which each piece is compared with its checksum before it is first used."""

    def __init__(self, path: Path, size: int, checksums: UInt64[np.ndarray, "P"]):
        """`size` in bytes and `checksums` are what the file had when it was written.

        Raises Damaged when the file is missing or has another size, and ValueError for another number of checksums.
        """
        if len(checksums) != pieces(size):
            raise ValueError(f"{size} bytes have {pieces(size)} checksums, not {len(checksums)}")
        check_size(path, size)
        self.path, self._checksums = path, checksums
        self.content = _map(path)
        self._compared = np.zeros(len(checksums), bool)
        self._stamp = stamp(path)

    def recheck(self) -> None:
        """Compare again what was compared before, if somebody has written to the file since. Raises Damaged."""
        try:
            now = stamp(self.path)
        except FileNotFoundError:  # what is mapped of it stays as it is
            return
        if now == self._stamp:
            return
        check_size(self.path, len(self.content))
        known = np.flatnonzero(self._compared)
        self._compared[:] = False
        self._compare(known)
        self._stamp = now

    def check(self, start: int = 0, stop: int | None = None) -> None:
        """Compare the pieces that hold the bytes from `start` to `stop` (the end). Raises Damaged."""
        stop = len(self.content) if stop is None else stop
        if start >= stop:
            return
        first, end = start // PIECE, pieces(stop)
        if not self._compared[first:end].all():
            self._compare(first + np.flatnonzero(~self._compared[first:end]))

    def _compare(self, numbers: np.ndarray) -> None:
        wrong = _checksums(self.content, numbers) != self._checksums[numbers]
        if wrong.any():
            place = int(numbers[wrong][0]) * PIECE
            raise Damaged(f"{self.path} has changed since it was written (behind byte {place})")
        self._compared[numbers] = True


def _checksums(content: memoryview, numbers: range | np.ndarray) -> UInt64[np.ndarray, "P"]:
    digests = (xxhash.xxh3_64_intdigest(content[i * PIECE : (i + 1) * PIECE]) for i in map(int, numbers))
    return np.fromiter(digests, np.uint64, len(numbers))


def _map(path: Path) -> memoryview:
    """The bytes of a file, mapped into memory. The map lives as long as a view of it does."""
    with path.open("rb") as file:
        if os.fstat(file.fileno()).st_size == 0:  # which cannot be mapped
            return memoryview(b"")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def memory_map(path: Path) -> Iterator[memoryview]:
    """The bytes of a file while the block runs, mapped into memory."""
    content = _map(path)
    try:
        yield content
    finally:
        whole = content.obj
        content.release()
        if isinstance(whole, mmap.mmap):
            whole.close()


# --- files that end with their own checksum


def seal(file: IO[bytes], name: str = "") -> None:
    """Write the checksum of a file behind its content. `file` is open for writing at its end."""
    file.flush()
    with memory_map(Path(file.name)) as content:
        file.write(_trailer(content, name))


def check_sealed(path: Path, name: str = "") -> int:
    """Read a file that `seal` ended, and compare. Returns the length of its content in bytes.

    Raises FileNotFoundError where there is none, and Damaged where it is not what was written.
    """
    with memory_map(path) as data:
        return _length(data, path, name)


def read_sealed(path: Path, name: str = "") -> bytes:
    """The content of a file that `seal` ended; errors as in `check_sealed`."""
    data = path.read_bytes()
    return data[: _length(memoryview(data), path, name)]


def _length(data: memoryview, path: Path, name: str) -> int:
    """The length of the content, after it was compared. Raises Damaged."""
    length = len(data) - _TRAILER
    if length < 0:
        raise Damaged(f"{path} is cut short")
    with data[:length] as content:
        if bytes(data[length:]) != _trailer(content, name):
            raise Damaged(f"{path} has changed since it was written")
    return length


def _trailer(content: memoryview, name: str) -> bytes:
    head = _MAGIC + struct.pack("<Q", len(content))
    digest = xxhash.xxh3_128(content)
    digest.update(head + name.encode())
    return head + digest.digest()
