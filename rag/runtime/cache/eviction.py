"""Limit the size of the cache: when it grows beyond the limit, the least recently used entries are removed.

An entry is a file or a folder that is added and removed as a whole. Weights, which come from the network, are removed
only after all others. A process that has mapped an entry into memory can still read it; a process that looks for it
later does not find it and makes it again. Only names that the cache itself gives are entries, so a user's own folder
with the name `results` is never removed, whatever RAG_CACHE is set to.
"""

import math
import os
import re
import stat
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rag.runtime.cache.folder import cache_root, notice
from rag.runtime.files import discard
from rag.types import UserError

_KEY = "[0-9a-f]{64}"
# Patterns of the names below each folder of the cache (the kind of its entries), down to the entries.
_NAMES = {
    "chunk_kv": (rf"{_KEY}\.npy",),
    "code": (rf"{_KEY}\.json",),
    "converted": (_KEY, _KEY),
    "native": (rf"{_KEY}\.(so|log)",),
    "requantised": (r"[0-9a-f]{16}-\w+",),
    "results": (_KEY,),
    "sha256": (rf"{_KEY}(\.sha256)?",),
    "stages": (r"[\w-]+", _KEY, rf"{_KEY}\.json"),
    "vectors": (_KEY, rf"{_KEY}\.(npy|todo)"),
    "weights": (r"\w.*-[\w.!+-]+",),
    "xla": ("[0-9a-f]{16}", rf".+-{_KEY}-cache"),
}
KINDS = tuple(_NAMES)
WEIGHTS = "weights"  # removed last
_UNFINISHED = (
    r"\..+\.[0-9a-f]{32}\.tmp"  # temporary names of rag.runtime.files, left behind by a killed process
)

_GB = 10**9
_DEFAULT_GB = 20.0
_SCAN_AFTER = 1 / 20  # all entries are scanned (which is slow) after a process wrote this share of the limit
_IN_USE_S = 600  # an entry used more recently is never removed: a process may be about to open it
_RECORD_AFTER_S = 60  # a use is recorded if the last record is older
_DAY_S = 86_400

_used: set[Path] = set()  # folders that this process used: it may open files in them again
_written_bytes = math.inf  # that this process wrote since its last scan; the first write scans


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder of the cache."""

    kind: str
    path: Path
    nbytes: int  # the size of a file with several hard links is divided by their number
    used: float  # time of the last use, in seconds since the epoch


def size_limit() -> int:
    """Return how many bytes the cache may hold: RAG_CACHE_GB GB, by default 20. Raises UserError for other values."""
    text = os.environ.get("RAG_CACHE_GB") or str(_DEFAULT_GB)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return int(float(text) * _GB)
    raise UserError(
        f"RAG_CACHE_GB={text} is not valid: it must be a number above 0, the GB that the cache may hold."
    )


def record_use(path: Path) -> None:
    """Record that an entry was used, in its mtime, to the minute.

    This process does not evict a folder that it has used. The mtime stays where the cache cannot be written.
    """
    with suppress(OSError):
        found = path.stat()
        if stat.S_ISDIR(found.st_mode):
            _used.add(path)
        if time.time() - found.st_mtime > _RECORD_AFTER_S:
            os.utime(path)


def record_write(path: Path) -> None:
    """Record that an entry was written, and evict others if the cache has grown beyond its limit."""
    global _written_bytes
    root, most = cache_root(), size_limit()
    if not path.is_relative_to(root):
        return
    _written_bytes += _size(path)
    if _written_bytes < most * _SCAN_AFTER:
        return
    _written_bytes = 0
    if removed := evict(most, path):
        notice(
            f"The cache {root} was larger than {most / _GB:g} GB (RAG_CACHE_GB): {len(removed)} entries of "
            f"{sum(entry.nbytes for entry in removed) / _GB:.2g} GB that were used longest ago are removed."
        )


def evict(most: int, protected: Path) -> list[Entry]:
    """Remove the least recently used entries until at most `most` bytes are left, and return them.

    Not removed are the entry `protected`, or the one that contains it, folders that this process has used, and what
    any process has used within the last ten minutes.
    """
    found = sorted(entries(), key=lambda entry: (entry.kind == WEIGHTS, entry.used))
    total = sum(entry.nbytes for entry in found)
    removed: list[Entry] = []
    for entry in found:
        if total <= most:
            break
        if (
            protected.is_relative_to(entry.path)
            or entry.path in _used
            or time.time() - entry.used < _IN_USE_S
        ):
            continue
        with suppress(OSError):  # a cache that cannot be written
            discard(entry.path)
            total -= entry.nbytes
            removed.append(entry)
    return removed


def entries(kinds: Iterable[str] = KINDS) -> list[Entry]:
    """Return all entries of these kinds."""
    root, found = cache_root(), []
    for kind in kinds:
        for path in _below(root / kind, _NAMES[kind]):
            with suppress(FileNotFoundError):  # removed meanwhile
                found.append(Entry(kind, path, _size(path), _last_use(path)))
    return found


def _below(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """Yield the paths whose names match, and unfinished files that a killed process left behind over a day ago."""
    try:
        listed = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in listed:
        path = Path(item.path)
        if item.is_symlink() or item.name.endswith(".lock"):
            continue
        if re.fullmatch(_UNFINISHED, item.name):
            if time.time() - item.stat().st_mtime > _DAY_S:
                yield path
        elif re.fullmatch(names[0], item.name) and len(names) == 1:
            # Weights without a lock file were copied there by hand.
            if folder.name != WEIGHTS or Path(f"{path}.lock").exists():
                yield path
        elif re.fullmatch(names[0], item.name) and item.is_dir():
            yield from _below(path, names[1:])


def _last_use(path: Path) -> float:
    """Return the recorded last use; for a file also its atime, because JAX's own entries record no use."""
    found = path.stat()
    stamp = found.st_mtime if path.is_dir() else max(found.st_mtime, found.st_atime)
    # A time in the future is that of a wrong clock: the entry is removed first.
    return stamp if stamp < time.time() + _IN_USE_S else 0.0


def _size(path: Path) -> int:
    if not path.is_dir():
        found = path.stat()
        return found.st_size // found.st_nlink
    files = (Path(folder, name).lstat() for folder, _, names in os.walk(path) for name in names)
    return sum(file.st_size // file.st_nlink for file in files)
