"""Write files and folders that appear whole or not at all, and lock them against other processes.

A killed process leaves nothing that looks finished: content is written under a temporary name, flushed to the disk,
and renamed.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple


class FileStamp(NamedTuple):
    """The attributes of a file by which a write or a replacement is noticed; the mtime alone can be set back."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int


def file_stamp(path: Path) -> FileStamp:
    """Return the stamp of a file as it is now. Raises FileNotFoundError."""
    found = path.stat()
    return FileStamp(found.st_size, found.st_mtime_ns, found.st_ctime_ns, found.st_ino)


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder and its missing parents, and flush their names to the disk."""
    if path.is_dir():
        return
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(new):
        folder.mkdir(mode, exist_ok=True)
        _sync(folder.parent)
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, "is no folder", str(path))


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on the file `path` + ".lock" against other processes and threads, after waiting for it.

    It is not reentrant. The kernel releases it when the holder dies. The lock file is never removed: otherwise two
    waiting processes could lock two different files of the same name.
    """
    lock = Path(f"{path}.lock")
    make_folder(lock.parent)
    with open(lock, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears at `path` whole when the block ends, or not at all if the block raises.

    An existing file is replaced, and parent folders are made.

    Args:
        path: the file.
        mode: "wb", or "w" for UTF-8 text without newline translation.
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_file writes whole files, mode 'w' or 'wb', not {mode!r}")
    path = Path(path)
    make_folder(path.parent)
    temporary = _temporary(path)
    encoding, newline = (None, None) if mode == "wb" else ("utf-8", "")
    try:
        with open(temporary, mode.replace("w", "x"), encoding=encoding, newline=newline) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync(path.parent)


@contextlib.contextmanager
def atomic_folder(path: str | Path, *, replace: bool = False) -> Iterator[Path]:
    """Yield a temporary folder that becomes `path` when the block ends, or is removed if the block raises.

    Args:
        path: the folder.
        replace: what exists at `path` is removed at the end.

    Raises:
        FileExistsError: `path` exists at the start or at the end, and `replace` is false.
    """
    path = Path(path)
    make_folder(path.parent)
    if not replace:
        _must_not_exist(path)
    temporary = _temporary(path)
    temporary.mkdir()
    try:
        yield temporary
        for folder, _, files in os.walk(temporary):
            for name in files:
                _sync(Path(folder, name))
            _sync(Path(folder))
        if replace:
            discard(path)
        _must_not_exist(path)  # rename would silently replace an empty folder
        try:
            os.rename(temporary, path)
        except OSError as error:
            if error.errno in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise FileExistsError(errno.EEXIST, "appeared meanwhile", str(path)) from error
            raise
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    _sync(path.parent)


def discard(path: Path) -> None:
    """Remove a file or folder if it exists. It is renamed first, so that nobody finds half of it."""
    renamed = _temporary(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, renamed)
        shutil.rmtree(renamed) if renamed.is_dir() and not renamed.is_symlink() else renamed.unlink()


def _temporary(path: Path) -> Path:
    """Return a new hidden name in the same folder, which rag.runtime.cache.eviction recognises if it is left behind."""
    return path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.tmp")


def _must_not_exist(path: Path) -> None:
    if os.path.lexists(path):
        raise FileExistsError(errno.EEXIST, "already exists", str(path))


def _sync(path: Path) -> None:
    """Flush a file or a folder's entries to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
