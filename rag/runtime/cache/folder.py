"""The cache folder: where it is, whom it belongs to, and the locks of its entries.

Four rules make the cache safe:

- A cache key is made of contents, never of names, so an outdated result cannot be found (rag.runtime.cache.keys).
- A file or folder appears whole or not at all, so a killed process leaves nothing that looks finished.
- Writers of one entry take its lock, so two processes never do the same work.
- What is read is trusted, native code too, so the folder belongs to the user and nobody else may write to it.
"""

import contextlib
import os
import stat
import sys
from collections.abc import Iterator
from pathlib import Path

from rag.runtime import files
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


def make_private_folder(path: Path) -> None:
    """Make a folder of the cache for the user alone, because files in it are trusted."""
    files.make_folder(path, 0o700)


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


@contextlib.contextmanager
def entry_lock(path: str | Path) -> Iterator[None]:
    """Hold the lock of a cache entry. Raises UserError when it cannot be made; errors of the block are passed on."""
    with contextlib.ExitStack() as stack:
        with write_errors(Path(path)):
            make_private_folder(Path(path).parent)
            stack.enter_context(files.locked(path))
        yield
