"""Vector search: the protocols of a vector index and of its options.

N vectors, Q queries, E embedding dim, k results
"""

from typing import Literal, Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float, Float32, Int


@runtime_checkable
class VectorIndex(Protocol):
    """Vectors that are searched by cosine."""

    def __len__(self) -> int: ...

    @property
    def nbytes(self) -> int:
        """Return the bytes that a search may read."""
        ...

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return min(k, len) rows of each query: cosines, best first, and row numbers; the lower row wins a tie."""
        ...

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Return how a batch of so many queries is searched: by a scan of codes first, or exactly at once."""
        ...


@runtime_checkable
class VectorSearch(Protocol):
    """A frozen dataclass of options: one way to search vectors."""

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> VectorIndex:
        """Return the index of the vectors; a memory map is not copied."""
        ...
