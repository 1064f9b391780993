"""Approximate nearest neighbours by one bit for each dimension, the best of them scored exactly.

    N vectors, Q queries, E embedding dim, k results, n vectors of a block; words: of 32 bits, which hold E bits

RaBitQ (Gao and Long 2024, arXiv:2405.12497): a vector minus the corpus's mean is rotated by a random rotation, so that
no dimension matters more than others, and its signs are stored. With b its signs as +-1 and y the rotated difference,
<q, b> |y|^2 / |y|_1 estimates <q, y> without bias; the factor is stored beside the bits. A query is rounded to 4 bits
a dimension (_PLANES), so that <q, b> is 4 counts of the bits in which two words differ.

The rows of highest estimate are scored exactly. How many of them the requested recall takes is calibrated against exact
search, on queries mixed of the index's own rows; scripts/index.py action=audit measures the recall on others. Where
scoring so many is not expected to be faster than exact search, the search is exact: that is counted and not timed, so
that the same index gives the same results on every run.
"""

from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Array, Float, Float32, Int, UInt32

from rag.index.dense import cost, refine
from rag.index.dense.audit import mixed_queries, sample_pairs
from rag.index.dense.exact import DenseIndex
from rag.runtime.machine.measurement import Work
from rag.runtime.options import Count, Seed, check_fields
from rag.runtime.shapes import next_power_of_two

_PLANES = 4
# The cost of a query, in rows of exact search for one (rag.index.dense.cost): the estimate of a row, finding the best
# of the estimates, which does not shrink with the dimensions, and a candidate's exact score.
_ESTIMATE_COST, _SELECTION_COST, _CANDIDATE_COST = 1 / 12, 8, 20
_BLOCK = 1 << 14  # rows that are coded at once
_WORD = 32


@dataclass(frozen=True)
class Binary:
    """The options of a BinaryIndex: the requested `recall` of the exact results, and how that is calibrated.

    Building calibrates for `k` results, on `sample` rows; another k is calibrated when it is first asked for.
    """

    recall: Annotated[float, Gt(0), Lt(1)] = 0.99
    k: Count = 10
    sample: Count = 256
    seed: Seed = 0

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "BinaryIndex":
        return BinaryIndex(vectors, self)


class BinaryIndex:
    """A DenseIndex and one bit of each entry: nearly the same results, for few queries in a small part of the time.

    Attributes:
        options: the recall and how it is calibrated.
        exact: the index of the whole vectors.
        work: the work of the latest search, without padding; counting bits is none of its operations.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Binary | None = None):
        self.options = options or Binary()
        self.exact = DenseIndex(vectors)
        dim, rng = vectors.shape[1], np.random.default_rng(self.options.seed)
        self._rotation = jnp.asarray(np.linalg.qr(rng.standard_normal((dim, dim)))[0], jnp.float32)
        mean = vectors.mean(axis=0) if len(vectors) else np.zeros(dim, np.float32)
        starts = range(0, len(vectors), _BLOCK) or [0]
        codes = [_coded(vectors[start : start + _BLOCK], mean, self._rotation) for start in starts]
        self._bits = jnp.asarray(np.concatenate([bits for bits, _ in codes], axis=1))
        self._factors = jnp.asarray(np.concatenate([factors for _, factors in codes]))
        self.work = Work()
        self._candidates: dict[int, int] = {}  # k -> rows that are scored exactly
        self.path(1, self.options.k)

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the vectors and their codes, both of which a search reads."""
        return self.exact.nbytes + self._bits.nbytes + self._factors.nbytes

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return min(k, len) rows of each query, nearly all of them the best: exact cosines, best first, and rows.

        Raises UserError as DenseIndex.search. Where `path` is "exact" they are the best, as that finds them.
        """
        refine.check_queries(queries, self.exact.dim, k)
        if self.path(len(queries), k) == "exact":
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return found
        candidates, padded = self.candidates(k), refine.padded(queries)
        scores, ids = _search(
            self.exact.rows, self._bits, self._factors, padded, self._rotation, k=k, candidates=candidates
        )
        codes = self.nbytes - self.exact.nbytes  # read again for each query
        self.work = Work(codes * len(queries), codes)
        self.work += refine.work(self.exact.dim, candidates, len(queries))
        return np.array(scores[: len(queries)]), np.array(ids[: len(queries)])

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Return whether the codes are scanned for a batch of so many queries, or it is searched exactly.

        It is a count of what both would do, the same on every run.
        """
        if not queries or k >= len(self) or not self._pays(k, queries):
            return "exact"  # even with the fewest candidates
        return "scan" if self._pays(self.candidates(k), queries) else "exact"

    def _pays(self, candidates: int, queries: int) -> bool:
        rows, dim = len(self), self.exact.dim
        each = rows * (_ESTIMATE_COST + _SELECTION_COST / dim) + _CANDIDATE_COST * candidates
        return cost.pays(next_power_of_two(queries) * each, rows, queries)

    def candidates(self, k: int) -> int:
        """Return how many rows are scored exactly for k results; calibrated when k is first asked for."""
        if k >= len(self):
            return len(self)
        if k not in self._candidates:
            self._candidates[k] = self._calibrate(k)
        return self._candidates[k]

    def _calibrate(self, k: int) -> int:
        """Return the power of two of candidates that hold `recall` of the k nearest rows of sampled queries.

        The row that a query was made of is not counted; and half of the misses are left as a margin.
        """
        pairs = sample_pairs(len(self), self.options.sample, self.options.seed)
        queries = mixed_queries(self.exact, pairs)
        _, best = self.exact.search(queries, k + 1)
        ranks = [
            np.asarray(_ranks(self._bits, self._factors, query, self._rotation, ids[1:]))
            for query, ids in zip(queries, best, strict=True)
        ]
        wanted = np.quantile(np.concatenate(ranks), (1 + self.options.recall) / 2, method="higher")
        count = next_power_of_two(max(int(wanted) + 1, k))
        return min(max(refine.LEAST, count), len(self))


def _coded(
    vectors: Float32[np.ndarray, "n E"], mean: Float32[np.ndarray, "E"], rotation: Float32[Array, "E E"]
) -> tuple[UInt32[np.ndarray, "words n"], Float32[np.ndarray, "n"]]:
    """Return the bits and the factors of a block of rows."""
    bits, factors = jax.device_get(_code(refine.padded(vectors, refine.LEAST), mean, rotation))
    return bits[:, : len(vectors)], factors[: len(vectors)]


@jax.jit
def _code(
    vectors: Float32[Array, "n E"], mean: Float32[Array, "E"], rotation: Float32[Array, "E E"]
) -> tuple[UInt32[Array, "words n"], Float32[Array, "n"]]:
    """Return the signs of the rotated differences, and |y|^2 / |y|_1 of each; the factor of a zero difference is 0."""
    rotated = jnp.matmul(vectors - mean, rotation, precision="highest")
    total = jnp.abs(rotated).sum(axis=1)
    factors = jnp.square(rotated).sum(axis=1) / jnp.where(total > 0, total, 1.0)
    return jax.vmap(_words, out_axes=1)(rotated > 0), factors


def _words(bits: Array) -> UInt32[Array, "words"]:
    """Return E booleans packed into words, followed by zeros."""
    wide = jnp.pad(bits, (0, -len(bits) % _WORD)).astype(jnp.uint32).reshape(-1, _WORD)
    return (wide << jnp.arange(_WORD, dtype=jnp.uint32)).sum(axis=1, dtype=jnp.uint32)


def _estimates(
    bits: UInt32[Array, "words N"],
    factors: Float32[Array, "N"],
    query: Float32[Array, "E"],
    rotation: Float32[Array, "E E"],
) -> Float32[Array, "N"]:
    """Return estimates of <q, x> of every row x, without the product with the mean, which is the same for all."""
    with jax.named_scope("estimates"):
        rotated = jnp.matmul(query, rotation, precision="highest")
        top = 2**_PLANES - 1
        step = jnp.maximum(2 * jnp.abs(rotated).max() / top, jnp.finfo(jnp.float32).tiny)
        levels = jnp.clip(jnp.round(rotated / step + top / 2), 0, top).astype(jnp.uint32)
        differing = jnp.zeros(bits.shape[1], jnp.int32)
        for plane in range(_PLANES):
            words = _words((levels >> plane) & 1)
            for row, word in zip(bits, words, strict=True):
                differing += jax.lax.population_count(row ^ word).astype(jnp.int32) << plane
        return (top * len(query) - 2 * differing).astype(jnp.float32) * factors * (step / 2)


@partial(jax.jit, static_argnames=("k", "candidates"))
def _search(
    vectors: Float[Array, "N E"],
    bits: UInt32[Array, "words N"],
    factors: Float32[Array, "N"],
    queries: Float32[Array, "Q E"],
    rotation: Float32[Array, "E E"],
    *,
    k: int,
    candidates: int,
) -> tuple[Float[Array, "Q k"], Int[Array, "Q k"]]:
    def one(query: Float32[Array, "1 E"]) -> tuple[Float32[Array, "1 k"], Int[Array, "1 k"]]:
        estimates = _estimates(bits, factors, query[0], rotation)[None]
        best, ids, _ = refine.best_of_estimates(vectors, query, estimates, k=k, candidates=candidates)
        return best, ids

    best, ids = refine.in_blocks(one, 1, queries)
    return best, ids


@jax.jit
def _ranks(
    bits: UInt32[Array, "words N"],
    factors: Float32[Array, "N"],
    query: Float32[Array, "E"],
    rotation: Float32[Array, "E E"],
    ids: Int[Array, "k"],
) -> Int[Array, "k"]:
    """Return for each of these rows how many rows have a higher estimate."""
    estimates = _estimates(bits, factors, query, rotation)
    return jax.lax.map(lambda row: (estimates > estimates[row]).sum(), ids)
