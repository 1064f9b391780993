"""Content keys, locks and atomic files: the one cache that every stage shares.

Four rules keep it honest. A key is made of contents, never of names, so a stale result cannot be found. A
file or folder appears whole or not at all, so a killed process leaves nothing that looks finished. Writers of
one entry take its lock, so two processes never do the same work into the same place. What is read is trusted, native
code among it, so the folder is the user's own and nobody else may write to it.

Entries are read and made through rag.cached, which compares their checksums; rag.eviction keeps their size in bounds.
"""

import contextlib
import dataclasses
import errno
import fcntl
import functools
import glob
import hashlib
import math
import os
import platform
import re
import shutil
import stat
import struct
import sys
import time
import uuid
import warnings
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from rag.types import UserError

_READ_BYTES = 1 << 20
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH
_ZSTD = b"\x28\xb5\x2f\xfd"  # JAX's entries begin with it where zstandard is installed
# A file changed this recently could change again under the same mtime on a coarse clock: don't remember it.
_RACY_NS = 2_000_000_000


def cache_root() -> Path:
    """The cache folder, made on demand: $RAG_CACHE, or ~/.cache/rag-jax. Raises UserError as `own_folder` does."""
    chosen = os.environ.get("RAG_CACHE")
    return own_folder(Path(os.path.expanduser(chosen)) if chosen else Path.home() / ".cache" / "rag-jax")


def own_folder(path: Path, setting: str = "RAG_CACHE") -> Path:
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


def own_file(path: Path) -> Path:
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


def content_key(*parts: object) -> str:
    """SHA-256 (64 hex digits) of a canonical, typed encoding of the parts.

    Takes None, bool, int, float, str, bytes, lists and tuples (alike), dicts (in any order) and dataclasses
    (by their class's name and fields), nested at will; 1, 1.0, "1" and True all differ, as do -0.0 and 0.0.
    Raises TypeError for anything else: a path or an array must first be turned into what identifies it.
    """
    return hashlib.sha256(_encode(parts)).hexdigest()


def _encode(value: object) -> bytes:
    """Tag, payload length, payload: no two different values share an encoding."""
    tag, payload = _tagged(value)
    return tag + struct.pack(">Q", len(payload)) + payload


def _tagged(value: object) -> tuple[bytes, bytes]:
    match value:
        case None:
            return b"n", b""
        case bool():  # before int: True is an int
            return b"b", b"1" if value else b"0"
        case int():
            return b"i", str(int(value)).encode()
        case float():  # one NaN, whatever its payload bits
            return b"f", struct.pack(">d", math.nan if math.isnan(value) else value)
        case str():
            return b"s", str(value).encode("utf-8", "surrogatepass")
        case bytes():
            return b"y", value
        case list() | tuple():
            return b"l", b"".join(_encode(item) for item in value)
        case dict():
            return b"d", b"".join(sorted(_encode(key) + _encode(item) for key, item in value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return b"c", _encode(f"{kind.__module__}.{kind.__qualname__}") + _encode(fields)
    raise TypeError(f"content_key takes plain values and dataclasses, not {type(value).__name__}")


def file_sha256(path: str | Path, *, fresh: bool = False) -> str:
    """SHA-256 of a file's bytes (64 hex digits), remembered by path, size, mtime, ctime and inode.

    A large file is read once; a changed or replaced one is read again, and with `fresh` any is. Raises OSError when it
    cannot be read.
    """
    from rag.checksums import seal  # here: it needs numpy, for which a typo on a command line should not wait

    path = Path(path).resolve()
    before = path.stat()
    memory = cache_root() / "sha256" / f"{content_key(str(path), *_stamp(before), before.st_ino)}.sha256"
    if not fresh and (known := _remembered_digest(memory)) is not None:
        return known
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_READ_BYTES):
            digest.update(block)
    changed_ns = max(before.st_mtime_ns, before.st_ctime_ns)
    if _stamp(path.stat()) == _stamp(before) and time.time_ns() - changed_ns > _RACY_NS:
        # A cache that cannot be written (read-only, full) costs the next start a reading, and no more.
        with contextlib.suppress(OSError):
            make_private(memory.parent)
            with atomic_file(memory) as file:
                file.write(digest.hexdigest().encode())
                seal(file, entry_name(memory))
    return digest.hexdigest()


def _remembered_digest(memory: Path) -> str | None:
    from rag.checksums import Damaged, read_sealed

    try:
        return read_sealed(memory, entry_name(memory)).decode()
    except FileNotFoundError:
        return None
    except (Damaged, OSError) as error:
        notice(f"{error}: the file whose digest it holds is read again.")
        return None


def entry_name(path: Path) -> str:
    """What an entry of the cache is called, with the folder that it is in; part of its checksum."""
    return f"{path.parent.name}/{path.name}"


def _stamp(found: os.stat_result) -> tuple[int, int, int]:
    """What tells that a file was written to; the mtime alone can be set to what it was."""
    return found.st_size, found.st_mtime_ns, found.st_ctime_ns


@contextlib.contextmanager
def writing(path: Path | None = None) -> Iterator[None]:
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


def make_private(path: Path) -> None:
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
def claimed(path: str | Path) -> Iterator[None]:
    """`locked` for a file of the cache: UserError when the lock cannot be made; the block's errors stay its own."""
    with contextlib.ExitStack() as stack:
        with writing(Path(path)):
            make_private(Path(path).parent)
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


def enable_compilation_cache() -> None:
    """Keep every compiled program on disk, so that a second process does not compile it again.

    The folder is JAX_COMPILATION_CACHE_DIR if set, else one of the cache per kind of processor: XLA compiles
    for the instructions of the machine it runs on, and a home folder may be shared by several.
    """
    import jax  # here, not above: most users of this file need no JAX

    if not jax.config.jax_compilation_cache_dir:
        folder = cache_root() / "xla" / content_key(platform.machine(), _processor())[:16]
        with contextlib.suppress(OSError):  # a cache that cannot be written
            make_private(folder)
        jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    _remove_damaged_programs(Path(jax.config.jax_compilation_cache_dir))


@functools.cache
def _remove_damaged_programs(folder: Path) -> None:
    """Remove a program that JAX warns it cannot read, and tell of it in one line instead of a warning at every start.

    JAX never runs such a program (its entries are compressed by zlib, which compares a checksum) and compiles it anew,
    but it writes an entry only where there is none.
    """
    show = warnings.showwarning

    def remove(message, category, filename, lineno, file=None, line=None) -> None:
        name = re.search("reading persistent compilation cache entry for '([^']+)'", str(message))
        damaged = (
            [path for path in folder.glob(f"{glob.escape(name[1])}-*") if not _unpacks(path)] if name else []
        )
        if not damaged:
            return show(message, category, filename, lineno, file, line)
        for path in damaged:
            with contextlib.suppress(OSError):  # a cache that cannot be written
                path.unlink()
            notice(f"The compiled program {path} has changed since it was written: it is compiled again.")

    warnings.filterwarnings("always", "Error reading persistent compilation cache entry")
    warnings.showwarning = remove


def _unpacks(path: Path) -> bool:
    """Whether an entry of JAX's is whole. Raises nothing: one that is gone, or packed in another way, is left alone."""
    try:
        zlib.decompress(path.read_bytes())
    except zlib.error:
        return path.read_bytes().startswith(_ZSTD)
    except OSError:
        return True
    return True


def _processor() -> str:
    """The processor's model and instruction sets as Linux lists them, or its name elsewhere."""
    try:
        lines = Path("/proc/cpuinfo").read_text().split("\n\n", 1)[0].splitlines()
    except OSError:
        return platform.processor()
    return "\n".join(line for line in lines if line.startswith(("model name", "flags", "Features")))


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
