"""Vector search. The protocols of a vector index and of its options."""

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int


@runtime_checkable
class VectorIndex(Protocol):
    """Vectors that are searched by cosine."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Of all that a search reads."""
        ...

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """min(k, len) rows of each query: cosines, best first, and row numbers; lower ones win ties."""
        ...

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """How a batch of so many queries is searched: by codes first, or exactly at once."""
        ...

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows."""
        ...


@runtime_checkable
class VectorSearch(Protocol):
    """A frozen dataclass of options: one way of searching vectors."""

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> VectorIndex:
        """The vectors, ready to be searched; a memory map is not copied."""
        ...
