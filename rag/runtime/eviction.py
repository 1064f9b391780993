"""The size of the cache: what is in it, when each entry was last used, and which go when it grows beyond its limit.

An entry is a file or a folder that appears whole and goes whole. Those that were used longest ago go first, and
weights, which come from the network, after all others. A process that has an entry open keeps what it mapped; one that
looks for it later finds nothing there and makes it again. Only names that the cache itself gives are entries, so that
a folder of the user's own that is called `results` stays, whatever RAG_CACHE is set to.
"""

import math
import os
import re
import time
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from rag.runtime.files import cache_root, discard, notice
from rag.types import UserError

_KEY = "[0-9a-f]{64}"
# The names on the way from the cache folder to the entries of each kind, which is the first folder.
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
WEIGHTS = "weights"  # the last to go
_LEFT_BEHIND = r"\..+\.[0-9a-f]{32}\.tmp"  # by a killed process: rag.runtime.files's unfinished files

_GB = 10**9
_DEFAULT_GB = 20.0
_LOOK_EVERY = 1 / 20  # of the limit, in bytes that this process wrote: to look at all entries takes a while
_IN_USE_S = 60  # what was used so lately stays: somebody may be about to open it
_HOUR_S, _DAY_S = 3600, 86_400

_unseen = math.inf  # bytes that this process wrote since it last looked at all entries


@dataclass(frozen=True, slots=True)
class Entry:
    """A file or folder of the cache."""

    kind: str
    path: Path
    nbytes: int  # of a file with several hard links its share
    used: float  # seconds since the epoch


def limit() -> int:
    """The bytes that the cache may hold: RAG_CACHE_GB, by default 20. Raises UserError where that is no such number."""
    text = os.environ.get("RAG_CACHE_GB") or str(_DEFAULT_GB)
    with suppress(ValueError):
        if 0 < float(text) < math.inf:
            return int(float(text) * _GB)
    raise UserError(
        f"RAG_CACHE_GB={text} will not do: it must be a number above 0, the GB that the cache may hold."
    )


def used(path: Path) -> None:
    """Record that an entry was used, to the hour, where the cache can be written."""
    with suppress(OSError):
        if time.time() - path.stat().st_mtime > _HOUR_S:
            os.utime(path)


def written(path: Path) -> None:
    """Take note of an entry that was written, and remove others where the cache has grown beyond its limit."""
    global _unseen
    root, most = cache_root(), limit()
    if not path.is_relative_to(root):
        return
    _unseen += _size(path)
    if _unseen < most * _LOOK_EVERY:
        return
    _unseen = 0
    if gone := evict(most, path):
        notice(
            f"The cache {root} was larger than {most / _GB:g} GB (RAG_CACHE_GB): {len(gone)} entries of "
            f"{sum(entry.nbytes for entry in gone) / _GB:.2g} GB that were used longest ago are removed."
        )


def evict(most: int, kept: Path) -> list[Entry]:
    """Remove the entries that were used longest ago until no more than `most` bytes are left; return them.

    `kept` stays, and so does what was used within the last minute.
    """
    found = sorted(entries(), key=lambda entry: (entry.kind == WEIGHTS, entry.used))
    total, gone = sum(entry.nbytes for entry in found), []
    for entry in found:
        if total <= most:
            break
        if entry.path == kept or kept.is_relative_to(entry.path) or time.time() - entry.used < _IN_USE_S:
            continue
        with suppress(OSError):  # a cache that cannot be written
            discard(entry.path)
            total -= entry.nbytes
            gone.append(entry)
    return gone


def entries(kinds: Iterable[str] = KINDS) -> list[Entry]:
    """All entries of these kinds."""
    root, found = cache_root(), []
    for kind in kinds:
        for path in _below(root / kind, _NAMES[kind]):
            with suppress(FileNotFoundError):  # gone meanwhile
                found.append(Entry(kind, path, _size(path), _last_use(path)))
    return found


def _below(folder: Path, names: tuple[str, ...]) -> Iterator[Path]:
    """The paths whose names match, and what a killed process left unfinished."""
    try:
        listed = list(os.scandir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return
    for item in listed:
        path = Path(item.path)
        if item.is_symlink() or item.name.endswith(".lock"):
            continue
        if re.fullmatch(_LEFT_BEHIND, item.name):
            if time.time() - item.stat().st_mtime > _DAY_S:
                yield path
        elif re.fullmatch(names[0], item.name) and len(names) == 1:
            if folder.name != WEIGHTS or Path(f"{path}.lock").exists():  # else placed by hand
                yield path
        elif re.fullmatch(names[0], item.name) and item.is_dir():
            yield from _below(path, names[1:])


def _last_use(path: Path) -> float:
    """The last use that was recorded; of a file also the last reading that the system knows of, as for JAX's own."""
    found = path.stat()
    stamp = found.st_mtime if path.is_dir() else max(found.st_mtime, found.st_atime)
    return stamp if stamp < time.time() + _IN_USE_S else 0.0  # of a clock that was wrong: the first to go


def _size(path: Path) -> int:
    if not path.is_dir():
        found = path.stat()
        return found.st_size // found.st_nlink
    files = (Path(folder, name).lstat() for folder, _, names in os.walk(path) for name in names)
    return sum(file.st_size // file.st_nlink for file in files)
