"""Texts to unit vectors. The protocol of an embedder."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

Progress = Callable[[int], None]  # texts done so far


@runtime_checkable
class Embedder(Protocol):
    """What turns passages and questions into vectors that are compared by their dot product."""

    @property
    def dim(self) -> int: ...

    @property
    def fingerprint(self) -> str:
        """64 hex digits; two embedders that share it give the same vectors."""
        ...

    @property
    def score_threshold(self) -> float | None:
        """The score from which a passage is likely to be about the question; None where that is not known."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """What an index says about the embedder that made it, JSON-able."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress = ...) -> Float32[np.ndarray, "N E"]:
        """The vectors of passages, in their order."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """The vectors of questions, in their order."""
        ...

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Character offsets (start, end) of the text's tokens, which chunk sizes are counted in."""
        ...

    def fit(self, texts: Sequence[str]) -> "Embedder":
        """The embedder made ready for a corpus."""
        ...

    def save(self, folder: Path) -> None:
        """Write into an index's folder what `fit` learned."""
        ...

    def restore(self, folder: Path) -> "Embedder":
        """The embedder as it was when it made the index in this folder."""
        ...
