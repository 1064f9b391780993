"""The door to the cache: an entry is used if it is what was written, and made again, with a notice, if it is not.

A file ends with its checksum (rag.runtime.checksums). A folder holds a file of its files' checksums, which ends with its own.
So a changed byte, a cut file and a missing one are found before anything is computed with them. Each entry is compared
once a process, when it is first opened. Where nothing has to be made, nothing is written: a read-only cache will do.
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

from rag.runtime import eviction
from rag.runtime.checksums import Damaged, check_sealed, read_sealed, seal, stamp
from rag.runtime.files import (
    atomic_file,
    atomic_folder,
    entry_lock,
    entry_name,
    make_private_folder,
    notice,
    write_errors,
)
from rag.runtime.machine import cores
from rag.runtime.records import Record, parse_json
from rag.types import UserError

T = TypeVar("T")
R = TypeVar("R", bound=Record)

_BLOCK = 1 << 18  # bytes read at once
CHECKSUMS = ".checksums"  # the file of a folder that holds those of the others
_REMEMBERED = 1 << 16  # files that are known to have been compared


class _Checksums(Record):
    """XXH3-128 of a folder's files, as hex digits, by their paths in it."""

    files: dict[str, str]


def get_or_make(
    path: Path, make: Callable[[], None], read: Callable[[Path], T], lock: Path | None = None
) -> T:
    """What `read(path)` gives, after `make()` where nothing is there or what is there is damaged.

    `read` raises FileNotFoundError where nothing is there, and Damaged. `make` puts a whole file or folder at `path`
    in place of what is there (`write`, `write_folder`); it runs once, however many processes ask: they wait for the
    lock of `lock`, or of `path`. Raises UserError when the cache cannot be written, and what `make` raises.
    """
    if (known := get(path, read, quiet=True)) is not None:
        return known
    with entry_lock(lock or path):
        if (known := get(path, read)) is not None:  # another process may have made it while this one waited
            return known
        make()
        try:
            return read(path)
        except Damaged as damage:
            raise UserError(
                f"{damage}, as soon as it was written: check the disk, or set RAG_CACHE to another folder."
            ) from damage


def get(path: Path, read: Callable[[Path], T], *, quiet: bool = False) -> T | None:
    """What `read(path)` gives; None where nothing is there, and, with a notice unless `quiet`, where it is damaged."""
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
    """Put a file with its checksum at `path`. Raises UserError when it cannot be written."""
    with write_errors(path):
        make_private_folder(path.parent)
        with atomic_file(path) as file:
            os.fchmod(file.fileno(), 0o600)
            file.write(content)
            seal(file, entry_name(path))
        eviction.written(path)


def read_record(path: Path, schema: type[R]) -> R:
    """The record in a JSON file that `write` wrote; errors as `once` wants them."""
    return _record(path, entry_name(path), schema)


def _record(path: Path, name: str, schema: type[R]) -> R:
    content = read_sealed(path, name)
    try:
        record = schema.model_validate(parse_json(content))
    except ValueError as error:  # pydantic's ValidationError among them
        raise Damaged(f"{path} holds something else than what was written") from error
    eviction.used(path)
    return record


def read_array(path: Path) -> np.ndarray:
    """The array in a .npy file that `write` wrote, memory-mapped; errors as `once` wants them."""
    verified_path(path)
    try:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise Damaged(f"{path} holds no array") from error
    return array


def verified_path(path: Path) -> Path:
    """The path of a file that `write` wrote, after it was compared; errors as `once` wants them."""
    eviction.used(path)
    _check(path, stamp(path))
    return path


@lru_cache(_REMEMBERED)
def _check(path: Path, _: tuple[int, ...]) -> None:
    check_sealed(path, entry_name(path))


# --- folders


def write_folder(path: Path, fill: Callable[[Path], None]) -> None:
    """Put a folder at `path`, with what `fill(folder)` writes and its checksums.

    Raises UserError when it cannot be written, and what `fill` raises; an OSError counts as the cache's.
    """
    with write_errors(path):
        make_private_folder(path.parent)
        with atomic_folder(path, replace=True) as folder:
            folder.chmod(0o700)
            fill(folder)
            seal_folder(folder, entry_name(path))
        eviction.written(path)


def seal_folder(folder: Path, name: str, without: Collection[str] = ()) -> None:
    """Write the checksums of a folder's files, but for those that are compared in another way, into it.

    `name` is the `entry_name` that the folder is going to have.
    """
    names = sorted(
        path.relative_to(folder).as_posix()
        for path in folder.rglob("*")
        if path.is_file() and path.name != CHECKSUMS
    )
    files = _checksums(folder, [name for name in names if name not in without])
    with atomic_file(folder / CHECKSUMS) as file:
        file.write(json.dumps({"files": files}).encode())
        seal(file, name)


def check_folder(folder: Path) -> Path:
    """The path of a folder, after its files were compared with their checksums; errors as `once` wants them."""
    if not folder.is_dir():
        raise FileNotFoundError(folder)
    try:
        files = _record(folder / CHECKSUMS, entry_name(folder), _Checksums).files
        sums = _checksums(folder, list(files))
    except FileNotFoundError as error:
        raise Damaged(f"{error.filename} is missing") from error
    for name, wanted in files.items():
        if sums[name] != wanted:
            raise Damaged(f"{folder / name} has changed since it was written")
    eviction.used(folder)
    return folder


def _checksums(folder: Path, names: Sequence[str]) -> dict[str, str]:
    """XXH3-128 of these files as hex digits, a share of the files for each core."""
    shares = [names[i :: cores()] for i in range(cores())]
    with ThreadPoolExecutor(cores()) as pool:
        sums = pool.map(lambda share: {name: _checksum(folder / name) for name in share}, shares)
        return {name: checksum for some in sums for name, checksum in some.items()}


def _checksum(path: Path) -> str:
    """Read in blocks that stay in the processor's cache, which is faster than a memory map."""
    digest = xxhash.xxh3_128()
    with path.open("rb", buffering=0) as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()
