"""The version of the code behind a result: of a module and of all that it imports, read and never run.

A kept result is found again only under the code that made it. That code is the import closure of the stage's modules:
what they import, and what those import, to the end. It is read from the files, so nobody has to list it, and a module
that is imported late counts as much as one that is imported first.

Followed are `import` and `from ... import` wherever they stand (in a function and below `if TYPE_CHECKING` too: what
an annotation names is what a stage is handed at run time), relative ones, those of submodules, the `__init__` of every
package on the way, and `importlib.import_module` or `__import__` of a literal name. What is imported by a computed
name or found through sys.modules is not seen, and neither are files that code reads. A module names such files:

    RAG_SOURCES = ("kernels/*.cc", "words.txt")  # files, as patterns below the module's own folder
    RAG_ENVIRONMENT = ("RAG_NATIVE",)  # environment variables that change results

Each source counts by what it does: comments, docstrings and layout do not (docstrings do where a module of the
closure asks for __doc__). A package that was installed from an index counts by its version, and by the versions of
what it requires; one that was installed from a folder or a repository is read like the user's own. The standard
library counts by Python's version. A module that is not there counts as missing, so that its arrival is noticed.

A module is read once a process, when its version is first asked for, and again when it was loaded again. So an edit
between the import of a module and that moment would be taken for the code that runs: don't edit while a run starts.
"""

import hashlib
import json
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields, is_dataclass
from functools import partial
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, NamedTuple

from rag.runtime import cache
from rag.runtime.cache_key import content_key
from rag.runtime.files import cache_root
from rag.runtime.packages import distributions_of, with_required
from rag.runtime.records import Record
from rag.runtime.source_code import SourceCode, _opaque, parsed
from rag.types import UserError

_OURS = __name__.partition(".")[0]  # read wherever it lies: its version says too little
_PYTHON = "python {}.{}".format(*sys.version_info)
_STANDARD = tuple(sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib"))
_REMEMBERED = 5000  # files whose contents are remembered between processes


class _Sources(Record):
    """What is remembered between processes: the fields of each source, by the SHA-256 of its text."""

    sources: dict[str, list[Any]]


class _Place(NamedTuple):
    """Where a module is: a file, or none of a namespace package; folders if it is a package."""

    file: str | None
    folders: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class _ReadModule:
    """A module that was read."""

    source: SourceCode
    imports: tuple[tuple[str, bool], ...]  # absolute names; False: perhaps an attribute and no module
    files: tuple[tuple[str, str], ...]  # its other sources and their hashes


class Code:
    """Modules by name, each read when it is first asked for.

    Found as Python would find them; with `folders` what lies in those comes first, whatever is loaded.
    """

    def __init__(self, folders: Sequence[str] = ()):
        self._folders = list(folders)
        self._modules: dict[
            str, tuple[object, _ReadModule | None]
        ] = {}  # with what was loaded when it was read
        self._outer: dict[str, frozenset[str] | None] = {}  # what `_outside` found ...
        self._owned: dict[str, bool] = {}  # ... and `_own`
        self._texts: dict[str, SourceCode] | None = None  # by the SHA-256 of their bytes
        self._news = False  # whether there are texts that the next process would read anew

    def version(self, *names: str) -> str:
        """A key of the code of these modules and of all that they reach. Raises UserError as `closure` does."""
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

    def closure(self, *names: str) -> tuple[dict[str, _ReadModule], set[str]]:
        """The modules that are read, by name, and in words what else counts.

        Raises UserError for a module without a file (of a notebook), and for one that cannot be read.
        """
        modules: dict[str, _ReadModule] = {}
        others, seen, todo = {_PYTHON}, set(), [(name, True) for name in names]
        while todo:
            name, required = todo.pop()
            if (name, required) in seen:
                continue
            seen.add((name, required))
            if (outside := self._outside(name.partition(".")[0])) is not None:
                others.update(outside)
            elif (module := self._module(name)) is not None:
                modules[name] = module
                todo += [(parent, True) for parent in _parents(name)]
                todo += module.imports
            elif required:
                others.add(f"no {name}")
        self._remember()
        return modules, others

    def _outside(self, top: str) -> frozenset[str] | None:
        """What a top-level module counts as that is not read; None for one that is."""
        if top not in self._outer:
            self._outer[top] = self._counted(top)
        return self._outer[top]

    def _counted(self, top: str) -> frozenset[str] | None:
        if top == _OURS or self._own(top):
            return None
        place = _loaded(top) or _found(top, None)
        file = place and (place.file or next(iter(place.folders), None))
        if top in sys.stdlib_module_names and (file is None or file.startswith(_STANDARD)):
            return frozenset()
        if file is None:
            return None
        folder = Path(place.folders[0] if place.folders else file).parent
        found = distributions_of(top, str(folder))
        return with_required(found) if found else None

    def _own(self, top: str) -> bool:
        """Whether it lies in this object's folders."""
        if self._folders and top not in self._owned:
            self._owned[top] = PathFinder.find_spec(top, self._folders) is not None
        return self._owned.get(top, False)

    def _module(self, name: str) -> _ReadModule | None:
        """The module of this name; None where there is none."""
        loaded = None if self._own(name.partition(".")[0]) else sys.modules.get(name)
        token = getattr(loaded, "__spec__", None) or loaded  # another one after the module was loaded again
        if name not in self._modules or self._modules[name][0] is not token:
            place = self._place(name)
            if place == _Place(None, ()):
                raise UserError(
                    f"The code of {name!r} is in no file, as in a notebook or at a prompt, so its results cannot be "
                    "known by it: put it into a .py file, and import it from there."
                )
            self._modules[name] = token, None if place is None else self._read(name, place)
        return self._modules[name][1]

    def _place(self, name: str) -> _Place | None:
        own = self._own(name.partition(".")[0])
        if not own and (place := _loaded(name)) is not None:
            return place
        parent = name.rpartition(".")[0]
        if not parent:
            return _found(name, self._folders if own else None)
        above = self._place(parent)
        return _found(name, list(above.folders)) if above is not None and above.folders else None

    def _read(self, name: str, place: _Place) -> _ReadModule:
        if place.file is None:  # a namespace package
            return _ReadModule(SourceCode("", "", False, (), (), ()), (), ())
        try:
            data = Path(place.file).read_bytes()
        except OSError as error:
            raise UserError(f"Cannot read the code in {place.file} ({error.strerror}): mend that.") from error
        if not place.file.endswith((".py", ".pyw")):
            return _ReadModule(_opaque(data), (), ())
        source = self._source(data, place.file)
        package = name if place.folders else name.rpartition(".")[0]
        if name == "__main__":  # of `python -m package.module`
            package = sys.modules[name].__package__ or ""
        imports = [(package, True)] if package else []
        imports += self._imported(source.imports, package)
        return _ReadModule(source, tuple(imports), tuple(_digests(Path(place.file), source.files)))

    def _source(self, data: bytes, file: str) -> SourceCode:
        if self._texts is None:
            self._texts = _remembered()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._texts:
            self._texts[key] = parsed(data, file)
            self._news = True
        return self._texts[key]

    def _imported(self, imports: Sequence[Sequence], package: str) -> Iterator[tuple[str, bool]]:
        for dots, name, members in imports:
            if dots:
                parents = package.split(".")[: len(package.split(".")) - dots + 1]
                name = ".".join([*parents, *([name] if name else [])])
            if not name:
                continue
            yield name, True
            for member in members:
                if member == "*" and (place := self._place_inside(name)):
                    yield from ((f"{name}.{found}", False) for found in _submodules(place))
                elif member != "*":
                    yield f"{name}.{member}", False

    def _place_inside(self, name: str) -> _Place | None:
        return None if self._outside(name.partition(".")[0]) is not None else self._place(name)

    def _remember(self) -> None:
        """Keep what was read for the next process; without it that one reads anew."""
        if self._news:
            self._news, latest = False, _remembered(quiet=True) | self._texts
            kept = {"sources": dict(list(latest.items())[-_REMEMBERED:])}
            with suppress(UserError):  # a cache that cannot be written
                cache.write(_memory(), json.dumps(kept).encode())


def _parents(name: str) -> list[str]:
    """The packages around a module."""
    parts = name.split(".")
    return [".".join(parts[:count]) for count in range(1, len(parts))]


def _loaded(name: str) -> _Place | None:
    """Where a module that is loaded came from."""
    if (module := sys.modules.get(name)) is None:
        return None
    return _Place(getattr(module, "__file__", None), tuple(getattr(module, "__path__", ())))


def _found(name: str, folders: list[str] | None) -> _Place | None:
    """Where Python would find a module, top-level where there are no folders; nothing is imported for it."""
    for finder in sys.meta_path:
        if hasattr(finder, "find_spec") and (spec := finder.find_spec(name, folders)) is not None:
            return _Place(
                spec.origin if spec.has_location else None, tuple(spec.submodule_search_locations or ())
            )
    return None


def _submodules(place: _Place) -> Iterator[str]:
    for folder in place.folders:
        for path in sorted(Path(folder).glob("*")):
            if path.is_dir() or (path.suffix == ".py" and path.stem != "__init__"):
                yield path.stem


def _digests(module: Path, patterns: Sequence[str]) -> Iterator[tuple[str, str]]:
    """(name, SHA-256) of the files that a module names as its RAG_SOURCES."""
    for pattern in patterns:
        files = sorted(path for path in module.parent.glob(pattern) if path.is_file())
        if not files:
            raise UserError(
                f"{module} names {pattern!r} in RAG_SOURCES, and there is no such file: correct it."
            )
        for file in files:
            digest = hashlib.sha256(file.read_bytes()).hexdigest()
            yield file.relative_to(module.parent).as_posix(), digest


def _memory() -> Path:
    """The file in which sources are remembered, for this Python (whose syntax trees are its own) and this code."""
    return cache_root() / "code" / f"{content_key(sys.version, Path(__file__).read_bytes())}.json"


def _remembered(*, quiet: bool = False) -> dict[str, SourceCode]:
    kept = cache.get(_memory(), partial(cache.read_record, schema=_Sources), quiet=quiet)
    return {key: SourceCode(*values) for key, values in kept.sources.items()} if kept else {}


# --- from values to modules

_CODE = Code()


def code_version(*things: Any) -> str:
    """A key of the code behind any values: of their classes, of functions, of all that is inside them.

    Inside are the items of a list, tuple or dict, the fields of a dataclass, the arguments of a partial and the
    attributes of an object of the user's own class; of a class also its bases count. Raises UserError as
    `Code.closure` does.
    """
    seen: set[int] = set()
    return _CODE.version(*sorted({name for thing in things for name in _modules_of(thing, seen)}))


def _modules_of(thing: Any, seen: set[int]) -> Iterator[str]:
    if id(thing) in seen:  # objects may hold one another
        return
    seen.add(id(thing))
    match thing:
        case None | str() | bytes() | bool() | int() | float():
            return
        case type():
            _check_current(thing)
            yield from (kind.__module__ for kind in thing.__mro__ if kind.__module__ != "builtins")
            return
        case list() | tuple():
            yield from _each(thing, seen)
        case dict():
            yield from _each(thing.values(), seen)
        case partial():
            yield from _each((thing.func, *thing.args, *thing.keywords.values()), seen)
            return
        case _ if is_dataclass(thing):
            yield from _each((getattr(thing, field.name) for field in fields(thing)), seen)
        case _ if hasattr(thing, "__code__"):  # a function, or the method of something
            yield thing.__module__
            yield from _modules_of(type(getattr(thing, "__self__", None)), seen)
        case _ if _is_users(type(thing)):
            yield from _each(getattr(thing, "__dict__", {}).values(), seen)
    yield from _modules_of(type(thing), seen)


def _is_users(kind: type) -> bool:
    """Whether a class is of a module that is read, and not of this package, whose own classes name what they hold."""
    top = kind.__module__.partition(".")[0]
    return top not in (_OURS, "builtins") and _CODE._outside(top) is None


def _check_current(kind: type) -> None:
    """UserError for a class of a module that was loaded again since: the code that runs is no longer in its file."""
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    named = (kind.__module__, kind.__qualname__)
    if isinstance(found, type) and found is not kind and (found.__module__, found.__qualname__) == named:
        raise UserError(
            f"{'.'.join(named)} was loaded again after this one was made: make it anew, as its file now says."
        )


def _each(things: Iterable[Any], seen: set[int]) -> Iterator[str]:
    for thing in things:
        yield from _modules_of(thing, seen)
