"""Find the files of modules as Python would, and tell which modules are identified by a version instead."""

import os
import sys
import sysconfig
from collections.abc import Sequence
from importlib.machinery import PathFinder
from pathlib import Path
from typing import NamedTuple

from rag.runtime.code.packages import distributions_of, with_required

OUR_PACKAGE = __name__.partition(".")[0]  # always read: its version says too little about its code
_STANDARD_LIBRARY = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))


class Location(NamedTuple):
    """Where a module is: its file (None for a namespace package), and its folders if it is a package."""

    file: str | None
    folders: tuple[str, ...]

    def submodules(self) -> list[str]:
        """Return the names of the modules in a package."""
        return [
            path.stem
            for folder in self.folders
            for path in sorted(Path(folder).glob("*"))
            if path.is_dir() or (path.suffix == ".py" and path.stem != "__init__")
        ]


class ModuleFinder:
    """Finds modules as Python would; with `folders`, modules in these come before all others, loaded ones too."""

    def __init__(self, folders: Sequence[str] = ()):
        self._folders = list(folders)
        self._in_folders: dict[str, bool] = {}  # results of `in_folders`, by top-level module
        self._versions: dict[str, frozenset[str] | None] = {}  # results of `versions`, by top-level module

    def in_folders(self, name: str) -> bool:
        """Return whether a module is found in `folders`."""
        top = name.partition(".")[0]
        if self._folders and top not in self._in_folders:
            self._in_folders[top] = PathFinder.find_spec(top, self._folders) is not None
        return self._in_folders.get(top, False)

    def versions(self, name: str) -> frozenset[str] | None:
        """Return what identifies the code of a module that is not read, or None for a module that is read.

        A package installed from an index is identified by its version and the versions of what it requires. The
        standard library needs nothing (the empty set), since the version of Python identifies it.
        """
        top = name.partition(".")[0]
        if top not in self._versions:
            self._versions[top] = self._find_versions(top)
        return self._versions[top]

    def _find_versions(self, top: str) -> frozenset[str] | None:
        if top == OUR_PACKAGE or self.in_folders(top):
            return None
        location = _loaded(top) or _found(top, None)
        file = location and (location.file or next(iter(location.folders), None))
        if top in sys.stdlib_module_names and (file is None or file.startswith(_STANDARD_LIBRARY)):
            return frozenset()
        if location is None or file is None:
            return None
        folder = Path(location.folders[0] if location.folders else file).parent
        distributions = distributions_of(top, str(folder))
        return with_required(distributions) if distributions else None

    def location(self, name: str) -> Location | None:
        """Return where a module is, or None where there is none. Nothing is imported for it."""
        in_folders = self.in_folders(name)
        if not in_folders and (loaded := _loaded(name)) is not None:
            return loaded
        parent = name.rpartition(".")[0]
        if not parent:
            return _found(name, self._folders if in_folders else None)
        package = self.location(parent)
        return _found(name, list(package.folders)) if package is not None and package.folders else None


def _loaded(name: str) -> Location | None:
    """Return where a loaded module came from, or None if it is not loaded."""
    if (module := sys.modules.get(name)) is None:
        return None
    return Location(getattr(module, "__file__", None), tuple(getattr(module, "__path__", ())))


def _found(name: str, folders: list[str] | None) -> Location | None:
    """Return where Python would find a module in the folders, or on sys.path without folders."""
    for finder in sys.meta_path:
        if hasattr(finder, "find_spec") and (spec := finder.find_spec(name, folders)) is not None:
            file = spec.origin if spec.has_location else None
            return Location(file, tuple(spec.submodule_search_locations or ()))
    return None
