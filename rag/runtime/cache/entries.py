"""The cache on disk: use an entry if it is as it was written, and make it again, with a notice, if it is damaged.

A file ends with its checksum (rag.runtime.checksums). A folder contains a file with the checksums of its other files,
which ends with its own checksum. So changed bytes, truncated files and missing files are found before anything is
computed with them. Each file is verified once in a process, when it is first opened. Where nothing has to be made,
nothing is written, so a read-only cache works too.
"""

import json
import os
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import TypeVar

import numpy as np
import xxhash

from rag.runtime.cache import eviction
from rag.runtime.cache.folder import entry_lock, entry_name, make_private_folder, notice, write_errors
from rag.runtime.checksums import Damaged, append_checksum, read_verified, verify_file
from rag.runtime.files import atomic_file, atomic_folder, file_stamp
from rag.runtime.machine.hardware import cores
from rag.runtime.records import Record, parse_json
from rag.types import UserError

T = TypeVar("T")
R = TypeVar("R", bound=Record)

CHECKSUMS = ".checksums"  # the file in a folder with the checksums of its other files
_BLOCK = 1 << 18  # bytes that are hashed at once
_MAX_VERIFIED = 1 << 16  # verified files that a process remembers


class _Checksums(Record):
    """The XXH3-128 checksums of a folder's files, as hex digits, by their paths in the folder."""

    files: dict[str, str]


def get_or_make(
    path: Path, make: Callable[[], None], read: Callable[[Path], T], lock: Path | None = None
) -> T:
    """Return `read(path)`; where the entry is missing or damaged, call `make()` first.

    Args:
        path: the entry, a file or folder.
        make: puts a whole entry at `path` (with `write` or `write_folder`), and replaces a damaged one. It is called
            once, however many processes ask: the others wait for the lock.
        read: returns the value of the entry. It raises FileNotFoundError where there is none, and Damaged.
        lock: the path whose lock is taken; None takes that of `path`.

    Raises:
        UserError: the cache cannot be written. What `make` raises is passed on.
    """
    if (value := get(path, read, quiet=True)) is not None:
        return value
    with entry_lock(lock or path):
        if (value := get(path, read)) is not None:  # another process made it while this one waited
            return value
        make()
        try:
            return read(path)
        except Damaged as damage:
            raise UserError(
                f"{damage}, as soon as it was written: check the disk, or set RAG_CACHE to another folder."
            ) from damage


def get(path: Path, read: Callable[[Path], T], *, quiet: bool = False) -> T | None:
    """Return `read(path)`, or None where the entry is missing or damaged; damage prints a notice unless `quiet`."""
    try:
        return read(path)
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as damage:
        if not quiet:
            notice(f"{damage}: it is made again.")
        return None


# --- files


def write(path: Path, content: bytes) -> None:
    """Write a file and its checksum. Raises UserError when it cannot be written."""
    with write_errors(path):
        make_private_folder(path.parent)
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            append_checksum(file, entry_name(path))
        eviction.record_write(path)


def read_record(path: Path, schema: type[R]) -> R:
    """Return the record in a JSON file that `write` wrote. Raises FileNotFoundError and Damaged."""
    return _read_record(path, entry_name(path), schema)


def _read_record(path: Path, name: str, schema: type[R]) -> R:
    content = read_verified(path, name)
    try:
        record = schema.model_validate(parse_json(content))
    except ValueError as error:  # includes pydantic's ValidationError
        raise Damaged(f"{path} holds something else than what was written") from error
    eviction.record_use(path)
    return record


def read_array(path: Path) -> np.ndarray:
    """Return the array in a .npy file that `write` wrote, memory-mapped. Raises FileNotFoundError and Damaged."""
    verified_path(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Damaged(f"{path} holds no array") from error
    return array


def verified_path(path: Path) -> Path:
    """Verify a file that `write` wrote, and return its path. Raises FileNotFoundError and Damaged."""
    eviction.record_use(path)
    _verify_once(path, file_stamp(path))
    return path


@lru_cache(_MAX_VERIFIED)
def _verify_once(path: Path, _: tuple[int, ...]) -> None:
    verify_file(path, entry_name(path))


# --- folders


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Write a folder with the files that `fill(folder)` writes into it, and their checksums.

    Raises:
        UserError: the folder cannot be written; an OSError of `fill` counts as that too. Other errors are passed on.
    """
    with write_errors(path):
        make_private_folder(path.parent)
        with atomic_folder(path, replace=True) as folder:
            folder.chmod(0o700)
            fill(folder)
            write_checksums(folder, entry_name(path))
        eviction.record_write(path)


def write_checksums(folder: Path, name: str, without: Collection[str] = ()) -> None:
    """Write the checksums of a folder's files into it.

    Args:
        folder: the folder.
        name: the `entry_name` of the path where the folder will be.
        without: files that are verified in another way.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS
    )
    files = _checksums(folder, [name for name in names if name not in without])
    with atomic_file(folder / CHECKSUMS) as file:
        file.write(json.dumps({"files": files}).encode())
        append_checksum(file, name)


def check_folder(folder: Path) -> Path:
    """Verify the files of a folder, and return its path. Raises FileNotFoundError and Damaged."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        files = _read_record(folder / CHECKSUMS, entry_name(folder), _Checksums).files
        sums = _checksums(folder, list(files))
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename} is missing") from error
    for name, wanted in files.items():
        if sums[name] != wanted:
            raise Damaged(f"{folder / name} has changed since it was written")
    eviction.record_use(folder)
    return folder


def _checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """Return the XXH3-128 of these files as hex digits; each core hashes a part of the files."""
    parts = [names[i :: cores()] for i in range(cores())]
    with ThreadPoolExecutor(cores()) as pool:
        sums = pool.map(lambda part: {name: _checksum(folder / name) for name in part}, parts)
        return {name: checksum for some in sums for name, checksum in some.items()}


def _checksum(path: Path) -> str:
    """Hash in blocks that stay in the processor's cache, which is faster than a memory map."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
