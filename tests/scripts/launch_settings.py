"""Settings classes of the tiny configuration in conftest.py, importable from other processes, and special texts."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from settings import Part, Shared

from rag.types import UserError


@dataclass(frozen=True)
class Place:
    path: str | None


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    question: str | None = None
    n: int = 3
    index: Place
    corpus: Place
    logged: bool = False
    stage: Part | None = None


@dataclass(frozen=True)
class Stage:
    size: int = 128
    ratio: float = 0.5
    name: str | None = None
    inner: "Stage | None" = None
    words: Sequence[str] = ()
    parts: Sequence[str] = ()
    order: Literal["score", "reverse"] = "score"

    def __post_init__(self):
        if self.size < 0:
            raise UserError("stage.size must be 0 or more")


# Texts that mean something to a shell, to Hydra or to OmegaConf.
SPECIAL = [
    'What\'s attention, (really)? [yes=no] #1 "x" \U0001f916',
    "",
    " ",
    "  both ends  ",
    "null",
    "true",
    "123",
    "1e3",
    "???",
    "????",
    "${index.path}",
    "\\${index.path}",
    "\\\\${oc.env:HOME}",
    "a $ b ${ c } $} {$",
    "${???}",
    "'",
    '"',
    "\\'",
    "\\\\'",
    '\\"',
    "\\",
    "\\\\",
    "ends with \\",
    "'quoted'",
    '"quoted"',
    "line one\nline two\r\n\ttab",
    "a=b,c=d",
    "choice(a, b)",
    "range(1,3)",
    "[1,2]",
    "{a: 1}",
    "-m",
    "--multirun",
    "~x",
    "%s %(now)s {0}",
    "caf\u00e9 \u6ce8\u610f \u202etfel",
    "\udcff not UTF-8",
    "/path with spaces/and#sha256=0a",
    "pypi:name==1.2/file.gguf#sha256=0a",
]
