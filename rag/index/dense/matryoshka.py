"""Approximate nearest neighbours by the first dimensions of the vectors, the best of them scored exactly.

    N vectors, Q queries, E embedding dim, k results; first: the first dimensions (the prefix)

Of embedders trained for it (Matryoshka, Kusupati et al. 2022) the first dimensions, scaled to unit length, are an
embedding of their own. All prefixes are scanned, and the rows of highest prefix score are scored exactly by the whole
vectors. With an embedder that was not trained so the recall is poor: scripts/index.py action=audit measures it.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rag.index.dense import refine
from rag.index.dense.exact import DenseIndex
from rag.runtime.machine.measurement import Work
from rag.runtime.options import Count, check_fields
from rag.types import UserError

_MANY = 32  # queries from which exact search is as fast


@dataclass(frozen=True)
class Matryoshka:
    """The options of a MatryoshkaIndex: the first `dims` dimensions choose `candidates` rows to score exactly."""

    dims: Count = 128
    candidates: Count = 256

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "MatryoshkaIndex":
        return MatryoshkaIndex(vectors, self)


class MatryoshkaIndex:
    """A DenseIndex and the prefixes of its vectors: most of the same results, with less memory read.

    Attributes:
        options: how it searches.
        exact: the index of the whole vectors.
        work: the work of the latest search, without padding.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Matryoshka | None = None):
        self.options = options or Matryoshka()
        if self.options.dims > vectors.shape[1]:
            raise UserError(
                f"vector_index.dims is {self.options.dims} and the vectors have {vectors.shape[1]} dimensions: "
                "give fewer than that"
            )
        self.exact = DenseIndex(vectors)
        self._prefixes = jnp.asarray(self._prefix(vectors))
        self.work = Work()

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the vectors and their prefixes, both of which a search reads."""
        return self.exact.nbytes + self._prefixes.nbytes

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return min(k, len) rows of each query: exact cosines, best first, and row numbers; the lower row wins a tie.

        Raises UserError as DenseIndex.search. Batches of more than 31 queries are searched exactly.
        """
        refine.check_queries(queries, self.exact.dim, k)
        if self.path(len(queries), k) == "exact":
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return found
        padded, candidates = refine.padded(queries), max(k, self.options.candidates)
        scores, ids = _search(
            self.exact.rows, self._prefixes, padded, self._prefix(padded), k=k, candidates=candidates
        )
        scan = self._prefixes.nbytes
        self.work = Work(scan, scan, float32=2 * scan // 4 * len(queries))
        self.work += refine.work(self.exact.dim, candidates, len(queries))
        return np.array(scores[: len(queries)]), np.array(ids[: len(queries)])

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Return whether the prefixes are scanned for a batch of so many queries, or it is searched exactly."""
        few = 0 < queries < _MANY and max(k, self.options.candidates) < len(self)
        return "scan" if few else "exact"

    def _prefix(self, vectors: Float[np.ndarray, "n E"]) -> Float32[np.ndarray, "n first"]:
        """Return the first dimensions as unit vectors; zeros stay zeros."""
        prefixes = np.asarray(vectors[:, : self.options.dims], np.float32)
        norms = np.linalg.norm(prefixes, axis=1, keepdims=True)
        return prefixes / np.where(norms > 0, norms, np.float32(1))


@partial(jax.jit, static_argnames=("k", "candidates"))
def _search(
    vectors: Float[Array, "N E"],
    prefixes: Float[Array, "N first"],
    queries: Float[Array, "Q E"],
    query_prefixes: Float[Array, "Q first"],
    *,
    k: int,
    candidates: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    estimates = jax.vmap(partial(refine.scores, prefixes))(query_prefixes)
    best, ids, _ = refine.best_of_estimates(vectors, queries, estimates, k=k, candidates=candidates)
    return best, ids
