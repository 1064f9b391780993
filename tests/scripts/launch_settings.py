"""The settings classes of the tiny configurations in test_launch.py, importable from the processes that it starts."""

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
