"""What the text of a Python module says: what it imports, and a hash of what it does."""

import ast
import hashlib
from collections.abc import Sequence
from contextlib import suppress
from typing import NamedTuple

from rag.types import UserError

_IMPORTERS = ("import_module", "__import__")
_DOCUMENTED = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


class SourceCode(NamedTuple):
    """What the text of a module says."""

    code: str  # hash of what it does ...
    documented: str  # ... with its docstrings
    reads_docstrings: bool
    imports: Sequence[Sequence]  # (dots, module, names) of every import
    files: Sequence[str]  # its RAG_SOURCES ...
    variables: Sequence[str]  # ... and its RAG_ENVIRONMENT


# --- what a text says


def parsed(data: bytes, file: str) -> SourceCode:
    """The source of a module from its bytes; `file` names it in errors. Raises UserError where it is no Python."""
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
            ) if caller in _IMPORTERS:
                bare = name.lstrip(".")
                imports.append((len(name) - len(bare), bare, ()))
            case ast.Name(id="__doc__" | "getdoc") | ast.Attribute(attr="__doc__" | "getdoc"):
                reads_docstrings = True
    files, variables = (_named(tree, name, file) for name in ("RAG_SOURCES", "RAG_ENVIRONMENT"))
    try:
        documented = _hash(ast.dump(tree))
        for node in ast.walk(tree):
            if isinstance(node, _DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
                node.body = node.body[1:] or [ast.Pass()]
        code = _hash(ast.dump(tree))
    except RecursionError:  # an expression of hundreds of terms
        code = documented = hashlib.sha256(data).hexdigest()
    return SourceCode(code, documented, reads_docstrings, tuple(dict.fromkeys(imports)), files, variables)


def _named(tree: ast.Module, name: str, file: str) -> tuple[str, ...]:
    """The strings of a constant at the top of a module; none where it has no such constant."""
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


def _opaque(data: bytes) -> SourceCode:
    """A compiled module: its bytes."""
    digest = hashlib.sha256(data).hexdigest()
    return SourceCode(digest, digest, False, (), (), ())


def _hash(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()
