"""The cache folder, locks, and files and folders that appear whole or not at all.

Four rules make the cache safe:

- A cache key is made of contents, never of names, so an outdated result cannot be found (rag.runtime.cache_key).
- A file or folder appears whole or not at all, so a killed process leaves nothing that looks finished.
- Writers of one entry take its lock, so two processes never do the same work.
- What is read is trusted, native code too, so the folder belongs to the user and nobody else may write to it.

Entries are read and made with rag.runtime.cache, which verifies checksums; rag.runtime.eviction limits their size.
"""

import contextlib
import errno
import fcntl
import os
import shutil
import stat
import sys
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import IO, NamedTuple

from rag.types import UserError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """Return the cache folder, $RAG_CACHE or ~/.cache/rag-jax, made if needed. Raises as `private_folder` does."""
    chosen = os.environ.get("RAG_CACHE")
    return private_folder(Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "rag-jax")


def private_folder(path: Path, setting: str = "RAG_CACHE") -> Path:
    """Return a folder's path with links resolved; a missing folder is made for the user alone (mode 0700).

    Args:
        path: the folder.
        setting: the setting that chooses another folder, which errors name.

    Raises:
        UserError: the folder cannot be made, belongs to another user, or others may write to it.
    """
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path = path.resolve()
        found = path.stat()
    except OSError as error:
        raise UserError(f"Cannot make the cache folder {path} ({error.strerror}): set {setting}.") from error
    if found.st_uid != os.geteuid():
        raise UserError(
            f"The cache folder {path} belongs to another user, whose files are not to be trusted: set {setting} to a "
            "folder of your own."
        )
    if found.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"Others may write to the cache folder {path}, so what is in it is not to be trusted: run "
            f"`chmod -R go-w {path}`, or set {setting} to another folder."
        )
    return path


def private_file(path: Path) -> Path:
    """Return the path of a file; raise UserError if anybody but the user may write to it."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"Others may write to {path}, so it is not to be trusted: remove it, and it is made again."
        )
    return path


def notice(text: str) -> None:
    """Print one line to stderr about something unexpected that is no error."""
    print(text, file=sys.stderr, flush=True)


def entry_name(path: Path) -> str:
    """Return the name of a cache entry with that of its folder; the entry's checksum covers it."""
    return f"{path.parent.name}/{path.name}"


@contextlib.contextmanager
def write_errors(path: Path | None = None) -> Iterator[None]:
    """Turn an OSError in the block, which writes to the cache, into a UserError that says what to do.

    Args:
        path: the path that is written; needed only where it may be outside of the cache folder.
    """
    try:
        yield
    except OSError as error:  # numpy's short writes have no strerror
        root = cache_root()
        where, remedy = f"the cache folder {root}", "set RAG_CACHE to another folder"
        if path is not None and not path.is_relative_to(root):
            where, remedy = f"the folder {path.parent}", "choose another folder"
        raise UserError(
            f"cannot write to {where} ({error.strerror or error}); make room and permission there, or {remedy}"
        ) from error


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


def make_private_folder(path: Path) -> None:
    """Make a folder of the cache for the user alone, because files in it are trusted."""
    make_folder(path, 0o700)


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
def entry_lock(path: str | Path) -> Iterator[None]:
    """Hold the lock of a cache entry. Raises UserError when it cannot be made; errors of the block are passed on."""
    with contextlib.ExitStack() as stack:
        with write_errors(Path(path)):
            make_private_folder(Path(path).parent)
            stack.enter_context(locked(path))
        yield


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
    """Return a new hidden name in the same folder, which rag.runtime.eviction recognises if it is left behind."""
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
