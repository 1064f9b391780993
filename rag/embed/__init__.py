"""Embedders: they turn texts into vectors.

A new embedder is one file with a class of this protocol, and one YAML file in conf/embedder.
Letters: N texts, E embedding dim, n tokens of a text.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32, Int

Progress = Callable[[int], None]  # is called with the number of texts that are done


@runtime_checkable
class Embedder(Protocol):
    """The protocol of an embedder, whose vectors are compared by their dot product.

    Vectors have unit length, so that the dot product is the cosine; only a text without any known word may have the
    zero vector.
    """

    @property
    def dim(self) -> int:
        """Return the embedding dimension E."""
        ...

    @property
    def fingerprint(self) -> str:
        """Return 64 hex digits; two embedders with the same fingerprint return the same vectors."""
        ...

    @property
    def score_threshold(self) -> float | None:
        """Return the score from which a passage is likely to be relevant to the question, or None if unknown."""
        ...

    @property
    def spec(self) -> dict[str, Any]:
        """Return a description of the embedder, JSON-able, which an index stores."""
        ...

    def encode(self, texts: Sequence[str], progress: Progress = ...) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of passages, in their order."""
        ...

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of questions, in their order."""
        ...

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Return the character offsets (start, end) of the text's tokens; chunk sizes count these tokens."""
        ...

    def fit(self, texts: Sequence[str]) -> "Embedder":
        """Return the embedder fitted to a corpus; itself if it has nothing to learn from a corpus."""
        ...

    def save(self, folder: Path) -> None:
        """Write what `fit` learned into the folder of an index."""
        ...

    def restore(self, folder: Path) -> "Embedder":
        """Return the embedder with what `save` wrote into the folder of an index."""
        ...
