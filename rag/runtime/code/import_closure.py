"""Compute code versions: keys of the code of a module and of all modules that it imports, read and never run.

A cached result is found again only if the code that computed it has not changed. That code is the import closure of
the stage's modules: the modules that they import, the modules that those import, and so on. It is read from the
source files, so nobody has to list it, and a module that is imported late counts as much as one imported first.

Followed are `import` and `from ... import` anywhere (in functions, and below `if TYPE_CHECKING` too, because a stage is
passed objects of the annotated classes at run time), relative imports, imports of submodules, the `__init__` of every
parent package, and `importlib.import_module` or `__import__` with a literal name. Not seen are imports of a computed
name or through sys.modules, and files that the code reads. A module declares such files itself:

    RAG_SOURCES = ("kernels/*.cc", "words.txt")  # files, as patterns below the module's own folder
    RAG_ENVIRONMENT = ("RAG_NATIVE",)  # environment variables that change results

Comments, docstrings and layout of a source do not count (docstrings do where a module of the closure asks for
__doc__). A package that was installed from an index counts by its version and the versions of what it requires; one
that was installed from a folder or a repository is read like the user's own code. The standard library counts by
Python's version. A missing module counts as missing, so that the version changes when it is added.

A module is read once in a process, when its version is first asked for, and again after it was reloaded. So an edit
between the import of a module and that moment would be taken for the code that runs: do not edit while a run starts.
"""

import hashlib
import os
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rag.runtime.cache.keys import content_key
from rag.runtime.code.module_finder import OUR_PACKAGE, Location, ModuleFinder
from rag.runtime.code.source_code import ParsedSources, SourceCode, compiled_module
from rag.types import UserError

_PYTHON = "python {}.{}".format(*sys.version_info)


@dataclass(frozen=True, slots=True)
class _ModuleCode:
    """The code of one module, and the modules that it imports."""

    source: SourceCode
    imports: tuple[tuple[str, bool], ...] = ()  # absolute names; False: it may be an attribute, no module
    files: tuple[tuple[str, str], ...] = ()  # name and SHA-256 of the files in its RAG_SOURCES


class CodeReader:
    """Reads modules, each when it is first asked for. Modules in `folders` come before all others (ModuleFinder)."""

    def __init__(self, folders: Sequence[str] = ()):
        self._finder = ModuleFinder(folders)
        self._sources = ParsedSources()
        # By name, with the loaded module's spec at the time of reading: reloading a module makes another spec.
        self._modules: dict[str, tuple[object, _ModuleCode | None]] = {}

    def version(self, *names: str) -> str:
        """Return a key of the code of these modules and of all that they import. Raises UserError as `closure` does."""
        modules, others = self.closure(*names)
        documented = any(module.source.reads_docstrings for module in modules.values())
        parts = [
            (
                name,
                module.source.documented if documented else module.source.code,
                module.files,
                [os.environ.get(variable) for variable in module.source.variables],
            )
            for name, module in sorted(modules.items())
        ]
        return content_key(parts, sorted(others))

    def closure(self, *names: str) -> tuple[dict[str, _ModuleCode], set[str]]:
        """Return the import closure of these modules.

        Returns:
            The modules that are read, by name, and the versions of packages that are not read.

        Raises:
            UserError: a module has no file (in a notebook), or its file cannot be read.
        """
        modules: dict[str, _ModuleCode] = {}
        others, seen, pending = {_PYTHON}, set(), [(name, True) for name in names]
        while pending:
            name, required = pending.pop()
            if (name, required) in seen:
                continue
            seen.add((name, required))
            if (versions := self._finder.versions(name)) is not None:
                others.update(versions)
            elif (module := self._module(name)) is not None:
                modules[name] = module
                pending += [(parent, True) for parent in _parents(name)]
                pending += module.imports
            elif required:
                others.add(f"no {name}")
        self._sources.save()
        return modules, others

    def is_read(self, name: str) -> bool:
        """Return whether a module is read, and not identified by the version of its package."""
        return self._finder.versions(name) is None

    def _module(self, name: str) -> _ModuleCode | None:
        """Return the code of a module, or None where there is no such module."""
        loaded = None if self._finder.in_folders(name) else sys.modules.get(name)
        spec = getattr(loaded, "__spec__", None) or loaded
        if name not in self._modules or self._modules[name][0] is not spec:
            location = self._finder.location(name)
            if location == Location(None, ()):
                raise UserError(
                    f"The code of {name!r} is in no file, as in a notebook or at a prompt, so its results cannot be "
                    "known by it: put it into a .py file, and import it from there."
                )
            self._modules[name] = spec, None if location is None else self._read(name, location)
        return self._modules[name][1]

    def _read(self, name: str, location: Location) -> _ModuleCode:
        if location.file is None:  # a namespace package
            return _ModuleCode(SourceCode("", "", False, (), (), ()))
        try:
            data = Path(location.file).read_bytes()
        except OSError as error:
            raise UserError(
                f"Cannot read the code in {location.file} ({error.strerror}): correct the file."
            ) from error
        if not location.file.endswith((".py", ".pyw")):
            return _ModuleCode(compiled_module(data))
        source = self._sources.get(data, location.file)
        package = name if location.folders else name.rpartition(".")[0]
        if name == "__main__":  # of `python -m package.module`
            package = sys.modules[name].__package__ or ""
        imports = [(package, True)] if package else []
        imports += self._absolute(source.imports, package)
        return _ModuleCode(source, tuple(imports), tuple(_digests(Path(location.file), source.files)))

    def _absolute(self, imports: Sequence[Sequence], package: str) -> Iterator[tuple[str, bool]]:
        """Yield the absolute names of what a module of this package imports, and whether each must be a module."""
        for dots, name, members in imports:
            if dots:
                parents = package.split(".")[: len(package.split(".")) - dots + 1]
                name = ".".join([*parents, *([name] if name else [])])
            if not name:
                continue
            yield name, True
            for member in members:
                if member != "*":
                    yield f"{name}.{member}", False
                elif self.is_read(name) and (location := self._finder.location(name)):
                    yield from ((f"{name}.{submodule}", False) for submodule in location.submodules())


def _parents(name: str) -> list[str]:
    """Return the packages that contain a module."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _digests(module: Path, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield the name and SHA-256 of each file that matches the RAG_SOURCES of a module."""
    for pattern in patterns:
        files = sorted(path for path in module.parent.glob(pattern) if path.is_file())
        if not files:
            raise UserError(
                f"{module} names {pattern!r} in RAG_SOURCES, and there is no such file: correct it."
            )
        for file in files:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            yield file.relative_to(module.parent).as_posix(), digest


# --- the code version of values

_READER = CodeReader()


def code_version(*values: Any) -> str:
    """Return a key of the code behind values: of their classes, of functions, and of all that the values contain.

    A value contains the items of a list, tuple or dict, the fields of a dataclass, the arguments of a partial and the
    attributes of an object of a user's class. The base classes of a class count too. Raises UserError as
    `CodeReader.closure` does, and for an object of a class whose module was reloaded.
    """
    seen: set[int] = set()
    return _READER.version(*sorted({name for value in values for name in _modules_of(value, seen)}))


def _modules_of(value: Any, seen: set[int]) -> Iterator[str]:
    """Yield the names of the modules behind a value; `seen` holds the ids of visited objects, which may form cycles."""
    if id(value) in seen:
        return
    seen.add(id(value))
    match value:
        case None | str() | bytes() | bool() | int() | float():
            return
        case type():
            _check_not_reloaded(value)
            yield from (kind.__module__ for kind in value.__mro__ if kind.__module__ != "builtins")
            return
        case list() | tuple():
            yield from _modules_of_all(value, seen)
        case dict():
            yield from _modules_of_all(value.values(), seen)
        case partial():
            yield from _modules_of_all((value.func, *value.args, *value.keywords.values()), seen)
            return
        case _ if is_dataclass(value):
            yield from _modules_of_all((getattr(value, field.name) for field in fields(value)), seen)
        case _ if hasattr(value, "__code__"):  # a function or a bound method
            yield value.__module__
            yield from _modules_of(type(getattr(value, "__self__", None)), seen)
        case _ if _is_user_class(type(value)):
            yield from _modules_of_all(getattr(value, "__dict__", {}).values(), seen)
    yield from _modules_of(type(value), seen)


def _modules_of_all(values: Iterable[Any], seen: set[int]) -> Iterator[str]:
    for value in values:
        yield from _modules_of(value, seen)


def _is_user_class(kind: type) -> bool:
    """Return whether a class is the user's own. The classes of this package import the modules of what they hold."""
    top = kind.__module__.partition(".")[0]
    return top not in (OUR_PACKAGE, "builtins") and _READER.is_read(top)


def _check_not_reloaded(kind: type) -> None:
    """Raise UserError for a class whose module was reloaded: the code that runs is no longer in its file."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    named = (kind.__module__, kind.__qualname__)
    if isinstance(found, type) and found is not kind and (found.__module__, found.__qualname__) == named:
        raise UserError(
            f"{'.'.join(named)} was loaded again after this one was made: make it again from the code in its file now."
        )
