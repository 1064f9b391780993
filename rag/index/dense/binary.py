"""Approximate nearest neighbours: vectors in one bit a dimension, the best of them scored exactly.

    N vectors, Q queries, E embedding dim, k results, W words of 32 bits that hold E, P bit planes of a query

RaBitQ (Gao and Long 2024, arXiv:2405.12497): a vector less the corpus's mean is turned by a random rotation, so
that no dimension matters more than others, and its signs are kept. With b its signs as +-1 and y the rotated
difference, <q, b> |y|^2 / |y|_1 estimates <q, y> without bias; the factor is kept beside the bits. A query is
rounded to P bits a dimension, so that <q, b> is P counts of the bits in which two words differ.

The rows of highest estimate are scored exactly. How many that takes for the recall that was asked for is found
by comparing with exact search, on queries mixed of the index's own rows; `audit` says what other queries get. Where
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
from rag.index.dense.audit import Audit, audit
from rag.index.dense.calibration import Calibrated, mixed_queries
from rag.index.dense.exact import DenseIndex
from rag.index.dense.growing import Growing, _round_up
from rag.runtime.measurement import Work
from rag.runtime.options import Count, Seed, check_fields

_PLANES = 4
# What a query costs, in rows of exact search for one (rag.index.dense.cost): the estimate of a row, and of its place among
# the best, which does not shrink with the dimensions; and a candidate's exact score.
_ESTIMATE_COST, _PLACE_COST, _CANDIDATE_COST = 1 / 12, 8, 20
_BLOCK = 1 << 14  # rows that are coded at once
_WORD = 32


@dataclass(frozen=True)
class Binary:
    """Options of a BinaryIndex: the `recall` of the exact results that is asked for, and how that is calibrated.

    Building does so for `k` results, on `sample` rows; another k is calibrated when first asked for.
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

    `work` is what the latest search did, padding left out; counting bits is none of its operations.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Binary | None = None):
        self.options = options or Binary()
        self.exact = DenseIndex(vectors)
        dim, rng = vectors.shape[1], np.random.default_rng(self.options.seed)
        self._rotation = jnp.asarray(np.linalg.qr(rng.standard_normal((dim, dim)))[0], jnp.float32)
        self._centre = vectors.mean(axis=0) if len(vectors) else np.zeros(dim, np.float32)
        parts = [self._coded(vectors[start : start + _BLOCK]) for start in range(0, len(vectors), _BLOCK)]
        parts = parts or [self._coded(vectors)]
        bits, factors = (np.concatenate(part, axis=-1) for part in zip(*parts, strict=True))
        self._bits, self._factors = Growing(jnp.asarray(bits), axis=1), Growing(jnp.asarray(factors))
        self.work = Work()
        self._candidates = Calibrated[int]()
        self.path(1, self.options.k)

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Of the vectors and their codes, both of which a search reads."""
        return self.exact.nbytes + len(self) * 4 * (len(self._bits.values) + 1)

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """min(k, len) rows of each query, nearly all of them the best: exact cosines, best first, row numbers.

        UserError as DenseIndex.search. Where `path` says so they are the best, as that finds them.
        """
        refine.check_queries(queries, self.exact.dim, k)
        if self.path(len(queries), k) == "exact":
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return found
        candidates = self.candidates(k)
        padded = refine.padded(queries, _round_up(len(queries), 1))
        scores, ids = _search(
            self.exact.rows,
            (self._bits.values, self._factors.values),
            padded,
            self._rotation,
            np.int32(len(self)),
            k=k,
            candidates=candidates,
        )
        codes = self.nbytes - self.exact.nbytes  # read anew for each query
        self.work = Work(codes * len(queries), codes)
        self.work += refine.work(self.exact.dim, candidates, len(queries))
        return np.array(scores[: len(queries)]), np.array(ids[: len(queries)])

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Whether the codes are scanned for a batch of so many queries, or it is searched exactly, because scanning
        is not expected to be faster: a count of what both would do, the same on every run."""
        if not queries or k >= len(self) or not self._pays(k, queries):
            return "exact"  # however few candidates would do
        return "scan" if self._pays(self.candidates(k), queries) else "exact"

    def _pays(self, candidates: int, queries: int) -> bool:
        rows, dim = len(self), self.exact.dim
        each = rows * (_ESTIMATE_COST + _PLACE_COST / dim) + _CANDIDATE_COST * candidates
        return cost.pays(_round_up(queries, 1) * each, rows, queries)

    def candidates(self, k: int) -> int:
        """Rows scored exactly for k results: found when first asked for, and again when the index has doubled."""
        return self._candidates.of(k, len(self), self._calibrate) if k < len(self) else len(self)

    def _calibrate(self, k: int) -> int:
        """The power of two of candidates that hold `recall` of the k nearest rows of sampled queries.

        The row that a query was made of is not counted; and half of the misses are left as a margin.
        """
        queries = mixed_queries(self.exact, self.options.sample, self.options.seed)
        _, best = self.exact.search(queries, k + 1)
        live, ranks = np.int32(len(self)), []
        for query, ids in zip(queries, best, strict=True):
            coded = (self._bits.values, self._factors.values)
            ranks.append(np.asarray(_ranks(coded, query, self._rotation, ids[1:], live)))
        wanted = np.quantile(np.concatenate(ranks), (1 + self.options.recall) / 2, method="higher")
        return min(_round_up(max(int(wanted) + 1, k)), len(self))

    def audit(self, queries: Float[np.ndarray, "Q E"], k: int) -> Audit:
        """The recall that these queries get, one at a time, against exact search."""
        return audit(self, self.exact, queries, k)

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows, as DenseIndex.add does; the mean that codes are relative to stays.

        So does what was calibrated for a k that was asked before, until the index has doubled: for results that do not
        depend on earlier searches, build the index of all rows.
        """
        self.exact.add(vectors)
        bits, factors = self._coded(vectors)
        self._bits.append(bits)
        self._factors.append(factors)

    def _coded(self, vectors: np.ndarray) -> tuple[UInt32[np.ndarray, "W n"], Float32[np.ndarray, "n"]]:
        padded = refine.padded(vectors, _round_up(len(vectors)))
        bits, factors = jax.device_get(_code(padded, self._centre, self._rotation))
        return np.array(bits[:, : len(vectors)]), np.array(factors[: len(vectors)])


@jax.jit
def _code(
    vectors: Float32[Array, "n E"], centre: Float32[Array, "E"], rotation: Float32[Array, "E E"]
) -> tuple[UInt32[Array, "W n"], Float32[Array, "n"]]:
    """The signs of the rotated differences, and |y|^2 / |y|_1 of each; a difference of zero has the factor 0."""
    rotated = jnp.matmul(vectors - centre, rotation, precision="highest")
    total = jnp.abs(rotated).sum(axis=1)
    factors = jnp.square(rotated).sum(axis=1) / jnp.where(total > 0, total, 1.0)
    return jax.vmap(_words, out_axes=1)(rotated > 0), factors


def _words(bits: Array) -> UInt32[Array, "W"]:
    """E truth values packed into words, zeros behind them."""
    wide = jnp.pad(bits, (0, -len(bits) % _WORD)).astype(jnp.uint32).reshape(-1, _WORD)
    return (wide << jnp.arange(_WORD, dtype=jnp.uint32)).sum(axis=1, dtype=jnp.uint32)


def _estimates(
    bits: UInt32[Array, "W N"],
    factors: Float32[Array, "N"],
    query: Float32[Array, "E"],
    rotation: Float32[Array, "E E"],
) -> Float32[Array, "N"]:
    """<q, x> of every row x but for what all have in common, the product with the mean."""
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
def _search(vectors, coded, queries, rotation, live, *, k: int, candidates: int):
    def one(query: Float32[Array, "1 E"]) -> tuple[Float32[Array, "1 k"], Int[Array, "1 k"]]:
        estimates = _estimates(*coded, query[0], rotation)[None]
        *found, _ = refine.best_of_estimates(vectors, query, estimates, live, k=k, candidates=candidates)
        return tuple(found)

    return refine.in_blocks(one, 1, queries)


@jax.jit
def _ranks(
    coded: tuple[UInt32[Array, "W N"], Float32[Array, "N"]],
    query: Float32[Array, "E"],
    rotation: Float32[Array, "E E"],
    ids: Int[Array, "k"],
    live: Int[Array, ""],
) -> Int[Array, "k"]:
    """How many live rows have a higher estimate than each of these."""
    estimates = _estimates(*coded, query, rotation)
    counted = jnp.where(jnp.arange(len(estimates)) < live, estimates, -jnp.inf)
    return jax.lax.map(lambda row: (counted > estimates[row]).sum(), ids)
