"""Damage stored files: flip bits or bytes, fill a range with zeros, truncate, append, remove."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rag import native
from rag.runtime.cache import compilation_cache
from rag.types import UserError
from tests.crash import workloads

_KINDS = ("bit", "byte", "zero sector", "zero page", "cut", "longer", "lost", "swapped")
_SECTOR, _PAGE = 512, 4096  # bytes


def warm_up() -> None:
    """Load compiled programs and the native library from the machine's own cache, before a trial's cache is used."""
    compilation_cache.enable_compilation_cache()
    native.available()
    workloads.warm_up()


def linked(source: Path, target: Path) -> None:
    """Copy a folder by hard links; `replace` gives one file a copy of its own."""
    shutil.copytree(source, target, copy_function=os.link)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def damage(draw: random.Random, files: Sequence[Path]) -> tuple[str, list[Path]]:
    """Damage one of the files, or swap two, so that their content differs. Return what was done, and the files."""
    while True:
        path, kind = draw.choice(files), draw.choice(_KINDS)
        content = path.read_bytes()
        if kind == "lost":
            path.unlink()
            return f"{path.name} lost", [path]
        if kind == "swapped":
            other = draw.choice([file for file in files if file.suffix == path.suffix])
            if (theirs := other.read_bytes()) != content:
                replace(path, theirs)
                replace(other, content)
                return f"{path.name} and {other.name} swapped", [path, other]
            continue
        where, damaged = _damaged(draw, kind, content)
        if damaged != content:
            replace(path, damaged)
            return f"{path.name}, {len(content)} bytes, {kind} at {where}", [path]


def _damaged(draw: random.Random, kind: str, content: bytes) -> tuple[int, bytes]:
    """Return the position and the damaged content, which may by chance be the same content."""
    if kind == "longer":
        return len(content), content + draw.randbytes(draw.choice([1, 8, 100, _PAGE]))
    at = draw.randrange(len(content)) if content else 0
    if kind == "cut":
        return at, content[:at]
    if not content:
        return at, content
    if kind.startswith("zero"):
        size = _SECTOR if kind == "zero sector" else _PAGE
        at -= at % size
        return at, content[:at] + bytes(len(content[at : at + size])) + content[at + size :]
    changed = content[at] ^ (1 << draw.randrange(8) if kind == "bit" else draw.randrange(1, 256))
    return at, content[:at] + bytes([changed]) + content[at + 1 :]


def or_error(call: Callable[[], Any]) -> Any:
    """Return what the call returns, or the exception that it raises."""
    try:
        return call()
    except Exception as error:  # of any kind: the verdict reports it
        return error


def verdict(
    wanted: Sequence[object], found: Sequence[object], damaged: Sequence[Path], done: str
) -> tuple[str, str, str]:
    """Return (outcome, what was done, detail) for answers, each of which may be an exception instead.

    The outcome is "same" if all are as wanted, "refused" if some are UserErrors that name a damaged file, else a fault.
    """
    refusals = [one for one in found if isinstance(one, UserError)]
    bugs = [one for one in found if isinstance(one, BaseException) and not isinstance(one, UserError)]
    wrong = [
        i
        for i, (one, other) in enumerate(zip(wanted, found, strict=True))
        if not isinstance(other, BaseException) and one != other
    ]
    if wrong:
        return "wrong", done, f"answers {wrong} differ"
    if bugs:
        return "traceback", done, f"{type(bugs[0]).__name__}: {bugs[0]}"
    unnamed = [error for error in refusals if not any(path.name in str(error) for path in damaged)]
    if unnamed:
        return "unnamed", done, str(unnamed[0])
    return ("refused", done, str(refusals[0])) if refusals else ("same", done, "")
