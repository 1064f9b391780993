"""Parse Python modules: their imports, and hashes of their code that ignore comments and layout.

Parsed sources are cached on disk by the SHA-256 of their bytes, so that a process parses only files that are new.
"""

import ast
import hashlib
import json
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from rag.runtime.cache import entries
from rag.runtime.cache.folder import cache_root
from rag.runtime.cache.keys import content_key
from rag.runtime.records import Record
from rag.types import UserError

_IMPORT_FUNCTIONS = ("import_module", "__import__")
_HAVE_DOCSTRINGS = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef
_MAX_CACHED = 5000  # parsed sources in the file on disk


class SourceCode(NamedTuple):
    """The facts about the source of one module that its code version depends on."""

    code: str  # hash of the syntax tree without docstrings
    documented: str  # hash of the syntax tree with docstrings
    reads_docstrings: bool  # whether the code asks for __doc__
    imports: Sequence[Sequence]  # (leading dots, module, names) of every import
    files: Sequence[str]  # its RAG_SOURCES
    variables: Sequence[str]  # its RAG_ENVIRONMENT


def parse_source(data: bytes, file: str) -> SourceCode:
    """Parse the source of a module.

    Args:
        data: the bytes of the source.
        file: the name of the file, for error messages.

    Raises:
        UserError: the source is not Python, or RAG_SOURCES or RAG_ENVIRONMENT is not a tuple of plain strings.
    """
    try:
        tree = ast.parse(data)
    except (SyntaxError, ValueError, RecursionError) as error:  # ValueError: a null byte, before Python 3.12
        raise UserError(f"{file} cannot be read as Python ({error}): correct it.") from error
    imports: list[tuple[int, str, tuple[str, ...]]] = []
    reads_docstrings = False
    for node in ast.walk(tree):
        match node:
            case ast.Import():
                imports += [(0, alias.name, ()) for alias in node.names]
            case ast.ImportFrom():
                imports.append((node.level, node.module or "", tuple(alias.name for alias in node.names)))
            case ast.Call(
                func=ast.Name(id=caller) | ast.Attribute(attr=caller),
                args=[ast.Constant(value=str(name)), *_],
            ) if caller in _IMPORT_FUNCTIONS:
                bare = name.lstrip(".")
                imports.append((len(name) - len(bare), bare, ()))
            case ast.Name(id="__doc__" | "getdoc") | ast.Attribute(attr="__doc__" | "getdoc"):
                reads_docstrings = True
    files, variables = (_string_constants(tree, name, file) for name in ("RAG_SOURCES", "RAG_ENVIRONMENT"))
    try:
        documented = _hash(ast.dump(tree))
        for node in ast.walk(tree):
            if isinstance(node, _HAVE_DOCSTRINGS) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code = _hash(ast.dump(tree))
    except RecursionError:  # an expression of hundreds of terms
        code = documented = hashlib.sha256(data).hexdigest()
    return SourceCode(code, documented, reads_docstrings, tuple(dict.fromkeys(imports)), files, variables)


def _string_constants(tree: ast.Module, name: str, file: str) -> tuple[str, ...]:
    """Return the strings of a constant at the top level of a module, or none if it has no such constant."""
    values = [
        node.value
        for node in tree.body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name) and target.id == name and node.value is not None
    ]
    if not values:
        return ()
    with suppress(ValueError):
        found = ast.literal_eval(values[-1])
        if isinstance(found, tuple | list) and all(isinstance(item, str) for item in found):
            return tuple(found)
    raise UserError(
        f"{file} makes {name} of something else than plain strings: write a tuple of them, since it is read and "
        "not run, or give the constant another name."
    )


def compiled_module(data: bytes) -> SourceCode:
    """Return the code of a compiled module, which is the hash of its bytes."""
    digest = hashlib.sha256(data).hexdigest()
    return SourceCode(digest, digest, False, (), (), ())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


# --- the cache of parsed sources


class _CachedSources(Record):
    """The file on disk: the fields of each SourceCode, by the SHA-256 of the source."""

    sources: dict[str, list[Any]]


class ParsedSources:
    """The parsed sources of this process and of earlier ones, by the SHA-256 of their bytes."""

    def __init__(self) -> None:
        self._sources: dict[str, SourceCode] | None = None  # None until the first use
        self._changed = False

    def get(self, data: bytes, file: str) -> SourceCode:
        """Return the parsed source. Raises UserError as `parse_source` does."""
        if self._sources is None:
            self._sources = _load()
        key = hashlib.sha256(data).hexdigest()
        if key not in self._sources:
            self._sources[key] = parse_source(data, file)
            self._changed = True
        return self._sources[key]

    def save(self) -> None:
        """Write new sources to disk. If the cache cannot be written, the next process parses them again."""
        if self._sources is not None and self._changed:
            latest = _load(quiet=True) | self._sources
            content = {"sources": dict(list(latest.items())[-_MAX_CACHED:])}
            with suppress(UserError):
                entries.write(_cache_file(), json.dumps(content).encode())
            self._changed = False


def _cache_file() -> Path:
    """Return the path of the file on disk, which depends on this Python (its syntax trees differ) and this parser."""
    return cache_root() / "code" / f"{content_key(sys.version, Path(__file__).read_bytes())}.json"


def _load(*, quiet: bool = False) -> dict[str, SourceCode]:
    cached = entries.get(_cache_file(), partial(entries.read_record, schema=_CachedSources), quiet=quiet)
    return {key: SourceCode(*values) for key, values in cached.sources.items()} if cached else {}
