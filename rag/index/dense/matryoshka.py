"""Approximate nearest neighbours by the first dimensions of vectors trained to be cut (Matryoshka).

    N vectors, Q queries, E embedding dim, D dimensions of the prefix, k results

Kusupati et al. 2022 (arXiv:2205.13147) train embedders so that the first D dimensions, made unit vectors again,
are an embedding of their own. They are scanned, and the rows that they put first are scored exactly by the
whole vectors. With an embedder that was not trained so the recall is poor: `audit` says how poor.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rag.index.dense import refine
from rag.index.dense.audit import Audit, audit
from rag.index.dense.exact import DenseIndex
from rag.index.dense.growing import Growing, _round_up
from rag.runtime.measurement import Work
from rag.runtime.options import Count, check_fields
from rag.types import UserError

_MANY = 32  # queries from which exact search is as fast


@dataclass(frozen=True)
class Matryoshka:
    """Options of a PrefixIndex: the first `dims` dimensions choose `candidates` rows, which are scored exactly."""

    dims: Count = 128
    candidates: Count = 256

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "MatryoshkaIndex":
        return MatryoshkaIndex(vectors, self)


class MatryoshkaIndex:
    """A DenseIndex and the first dimensions of its vectors: most of the same results, with less reading.

    `work` is what the latest search did, padding left out.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Matryoshka | None = None):
        self.options = options or Matryoshka()
        if self.options.dims > vectors.shape[1]:
            raise UserError(
                f"vector_index.dims is {self.options.dims} and the vectors have {vectors.shape[1]} dimensions: "
                "give fewer than that"
            )
        self.exact = DenseIndex(vectors)
        self._prefixes = Growing(jnp.asarray(self._cut(vectors)))
        self.work = Work()

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Of the vectors and their prefixes, both of which a search reads."""
        return self.exact.nbytes + 4 * len(self) * self.options.dims

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """min(k, len) rows of each query: exact cosines, best first, and row numbers; lower ones win ties.

        UserError as DenseIndex.search. Batches of more than 31 queries are searched exactly.
        """
        refine.check_queries(queries, self.exact.dim, k)
        if self.path(len(queries), k) == "exact":
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return found
        padded = refine.padded(queries, _round_up(len(queries), 1))
        rows, prefixes, live = self.exact.rows, self._prefixes.values, np.int32(len(self))
        candidates = max(k, self.options.candidates)
        found = _search(rows, prefixes, padded, self._cut(padded), live, k=k, candidates=candidates)
        scan = self.nbytes - self.exact.nbytes
        self.work = Work(scan, scan, float32=2 * scan // 4 * len(queries))
        self.work += refine.work(self.exact.dim, candidates, len(queries))
        scores, ids = (np.array(part[: len(queries)]) for part in found)
        return scores, ids

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Whether the prefixes are scanned for a batch of so many queries, or it is searched exactly."""
        few = 0 < queries < _MANY and max(k, self.options.candidates) < len(self)
        return "scan" if few else "exact"

    def audit(self, queries: Float[np.ndarray, "Q E"], k: int) -> Audit:
        """The recall that these queries get, one at a time, against exact search."""
        return audit(self, self.exact, queries, k)

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows, as DenseIndex.add does."""
        self.exact.add(vectors)
        self._prefixes.append(self._cut(vectors))

    def _cut(self, vectors: Float[np.ndarray, "n E"]) -> Float32[np.ndarray, "n D"]:
        """The first dimensions as unit vectors; zeros stay zeros."""
        cut = np.asarray(vectors[:, : self.options.dims], np.float32)
        norms = np.linalg.norm(cut, axis=1, keepdims=True)
        return cut / np.where(norms > 0, norms, np.float32(1))


@partial(jax.jit, static_argnames=("k", "candidates"))
def _search(
    vectors: Float[Array, "N E"],
    prefixes: Float[Array, "N D"],
    queries: Float[Array, "Q E"],
    cut: Float[Array, "Q D"],
    live: Int[Array, ""],
    *,
    k: int,
    candidates: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    estimates = jax.vmap(partial(refine.scores, prefixes))(cut)
    *found, _ = refine.best_of_estimates(vectors, queries, estimates, live, k=k, candidates=candidates)
    return tuple(found)
