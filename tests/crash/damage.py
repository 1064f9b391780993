"""What can happen to a stored file: a bit or byte flips, a range becomes zeros, it is cut, grows or is lost."""

import os
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rag import native
from rag.runtime import compilation_cache
from rag.types import UserError
from tests.crash import workloads

_KINDS = ("bit", "byte", "zero sector", "zero page", "cut", "longer", "lost", "swapped")
_SECTOR, _PAGE = 512, 4096  # bytes


def warm_up() -> None:
    """Take programs and the native library from the machine's own cache, before one of the trials' is entered."""
    compilation_cache.enable_compilation_cache()
    native.available()
    workloads.warm_up()


def linked(source: Path, target: Path) -> None:
    """Copy a folder without copying bytes: `replace` gives a file bytes of its own."""
    shutil.copytree(source, target, copy_function=os.link)


def replace(path: Path, content: bytes) -> None:
    path.unlink()
    path.write_bytes(content)


def damage(draw: random.Random, files: Sequence[Path]) -> tuple[str, list[Path]]:
    """Damage one of the files, or swap two. Returns what was done, and to which; their content differs now."""
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
    """(where, the content with that damage), which may by chance be the same."""
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
    """What the call returns, or the exception that it ends in."""
    try:
        return call()
    except Exception as error:  # whichever it is, the verdict tells
        return error


def verdict(
    wanted: Sequence[object], found: Sequence[object], damaged: Sequence[Path], done: str
) -> tuple[str, str, str]:
    """(outcome, what was done, detail) from answers, of which each may be an exception instead.

    "same" where all are as wanted, "refused" where some are UserErrors that name a damaged file; else a fault.
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
