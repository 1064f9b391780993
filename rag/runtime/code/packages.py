"""Find the installed package of a module and its version, from the .dist-info folders that pip writes.

importlib.metadata returns the same, but takes a quarter of a second; here only the names of folders are read, and for
a few packages the list of their files and their requirements.
"""

import os
import re
import sys
from collections.abc import Mapping
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import NamedTuple


class Distribution(NamedTuple):
    """An installed package."""

    name: str  # in lower case, with hyphens
    version: str
    folder: str  # its .dist-info


@cache
def _installed(folder: str) -> Mapping[str, Distribution]:
    """Return the distributions in a folder of sys.path, by name."""
    try:
        entries = sorted(os.listdir(folder or "."))
    except OSError:  # sys.path may contain missing folders
        return {}
    found = {}
    for entry in entries:
        if entry.endswith(".dist-info"):
            name, _, version = entry.removesuffix(".dist-info").partition("-")
            found[_normal(name)] = Distribution(_normal(name), version, os.path.join(folder, entry))
    return found


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


@cache
def distributions_of(top: str, folder: str) -> tuple[Distribution, ...]:
    """Return the distributions to which a top-level module in this folder belongs.

    The result is empty where one of them was installed from a folder or a repository, because then its version says
    too little about its code.
    """
    installed = _installed(folder)
    named = installed.get(_normal(top))
    found = (named,) if named else tuple(one for one in installed.values() if _holds(one, top))
    local = any(os.path.exists(os.path.join(one.folder, "direct_url.json")) for one in found)
    return () if local else found


def _holds(distribution: Distribution, top: str) -> bool:
    """Return whether a distribution's list of files contains the top-level module."""
    with suppress(OSError):
        record = Path(distribution.folder, "RECORD").read_bytes()
        return re.search(rb"^%s[/.]" % re.escape(top.encode()), record, re.MULTILINE) is not None
    return False


@cache
def with_required(distributions: tuple[Distribution, ...]) -> frozenset[str]:
    """Return the names and versions of distributions and of all their installed requirements."""
    found, pending = set(distributions), list(distributions)
    while pending:
        for name in _requirements(pending.pop()):
            required = next((there for path in sys.path if (there := _installed(path).get(name))), None)
            if required is not None and required not in found:
                found.add(required)
                pending.append(required)
    return frozenset(f"{one.name} {one.version}" for one in found)


@cache
def _requirements(distribution: Distribution) -> list[str]:
    """Return the names of the packages that a distribution requires without extras."""
    try:
        text = Path(distribution.folder, "METADATA").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = re.findall(r"^Requires-Dist: *([\w.-]+)(.*)$", text.partition("\n\n")[0], re.MULTILINE)
    return [_normal(name) for name, rest in lines if not re.search(r"\bextra *==", rest)]
