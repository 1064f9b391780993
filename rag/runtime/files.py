"""Content keys, locks and atomic files: the one cache that every stage shares.

Four rules keep it honest. A key is made of contents, never of names, so a stale result cannot be found. A
file or folder appears whole or not at all, so a killed process leaves nothing that looks finished. Writers of
one entry take its lock, so two processes never do the same work into the same place. What is read is trusted, native
code among it, so the folder is the user's own and nobody else may write to it.

Entries are read and made through rag.runtime.cache, which compares their checksums; rag.runtime.eviction keeps their size in bounds.
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
from typing import IO

from rag.types import UserError

_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def cache_root() -> Path:
    """The cache folder, made on demand: $RAG_CACHE, or ~/.cache/rag-jax. Raises UserError as `own_folder` does."""
    chosen = os.environ.get("RAG_CACHE")
    return private_folder(Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "rag-jax")


def private_folder(path: Path, setting: str = "RAG_CACHE") -> Path:
    """The folder, behind links, made for the user alone (0700) where there is none.

    Raises UserError, which names the `setting` that chooses another, when it cannot be made, belongs to another user,
    or may be written to by others.
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
    """The path of a file that nobody but the user may write to. Raises UserError for another."""
    found = path.stat()
    if found.st_uid != os.geteuid() or found.st_mode & _OTHERS_WRITE:
        raise UserError(
            f"Others may write to {path}, so it is not to be trusted: remove it, and it is made again."
        )
    return path


def notice(text: str) -> None:
    """Tell a person on stderr, in one line, what went another way than expected."""
    print(text, file=sys.stderr, flush=True)


def entry_name(path: Path) -> str:
    """What an entry of the cache is called, with the folder that it is in; part of its checksum."""
    return f"{path.parent.name}/{path.name}"


@contextlib.contextmanager
def write_errors(path: Path | None = None) -> Iterator[None]:
    """Make an OSError in the block, which writes to the cache, a UserError that says what to do about it.

    `path` is what is written, where that may lie outside of the cache folder.
    """
    try:
        yield
    except OSError as error:  # numpy's short writes have no strerror
        root = cache_root()
        outside = path is not None and not path.is_relative_to(root)
        where = f"the folder {path.parent}" if outside else f"the cache folder {root}"
        remedy = "choose another folder" if outside else "set RAG_CACHE to another folder"
        raise UserError(
            f"cannot write to {where} ({error.strerror or error}); make room and permission there, or {remedy}"
        ) from error


def make_folder(path: Path, mode: int = 0o777) -> None:
    """Make a folder, and those above it, where they are not there, and flush their names to the disk."""
    if path.is_dir():
        return
    new = [folder for folder in (path, *path.parents) if not folder.exists()]
    for folder in reversed(new):
        folder.mkdir(mode, exist_ok=True)
        _sync(folder.parent)
    if not path.is_dir():
        raise FileExistsError(errno.EEXIST, "is no folder", str(path))


def make_private_folder(path: Path) -> None:
    """Make a folder of the cache for the user alone: what is read there is trusted."""
    make_folder(path, 0o700)


@contextlib.contextmanager
def locked(path: str | Path) -> Iterator[None]:
    """Hold an exclusive lock on `path` + ".lock" against other processes and threads; waits for it.

    Not reentrant. The kernel releases it when the holder dies. The lock file stays: removing it would let two
    waiters lock two different files of the same name.
    """
    lock = Path(f"{path}.lock")
    make_folder(lock.parent)
    with open(lock, "ab") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield  # closing the file releases the lock


@contextlib.contextmanager
def entry_lock(path: str | Path) -> Iterator[None]:
    """`locked` for a file of the cache: UserError when the lock cannot be made; the block's errors stay its own."""
    with contextlib.ExitStack() as stack:
        with write_errors(Path(path)):
            make_private_folder(Path(path).parent)
            stack.enter_context(locked(path))
        yield


@contextlib.contextmanager
def atomic_file(path: str | Path, mode: str = "wb") -> Iterator[IO]:
    """Open a file that appears at `path` whole when the block ends, or not at all if it raises.

    Replaces an existing file; makes the parent folders. `mode` is "wb" or "w" (UTF-8, newlines as written).
    """
    if mode not in ("w", "wb"):
        raise ValueError(f"atomic_file writes whole files, mode 'w' or 'wb', not {mode!r}")
    path = Path(path)
    make_folder(path.parent)
    temporary = _beside(path)
    text = {} if "b" in mode else {"encoding": "utf-8", "newline": ""}
    try:
        with open(temporary, mode.replace("w", "x"), **text) as file:
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
    """Yield a temporary folder that becomes `path` when the block ends, or is removed if it raises.

    What is at `path` already is removed at the end with `replace`; without it FileExistsError is raised, at the start
    or the end.
    """
    path = Path(path)
    make_folder(path.parent)
    if not replace:
        _must_not_exist(path)
    temporary = _beside(path)
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
    """Remove a file or folder, if it is there, so that nobody finds half of it: it is renamed first."""
    away = _beside(path)
    with contextlib.suppress(FileNotFoundError):
        os.rename(path, away)
        shutil.rmtree(away) if away.is_dir() and not away.is_symlink() else away.unlink()


def _beside(path: Path) -> Path:
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
