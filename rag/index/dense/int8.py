"""Nearest neighbours by a scan of 8-bit vectors that proves its results exact, and says for which queries.

    N vectors, Q queries, E embedding dim, k results, n vectors of a block; groups: of consecutive rows

Every vector is stored a second time in 8 bits, with the length of its rounding error. For a query q and a row x,
rounded to q' (a sum of two int8 terms, rag.ops.linear) and x', Cauchy and Schwarz give
q.x <= q'.x' + |q| |x - x'| + |q - q'| |x'|: a bound on the exact score for a quarter of the memory to read. The groups
with the highest bounds are scored exactly; where the k-th best exact score is above the highest bound left out, nothing
can have been missed. The other queries are searched again, exactly: the results are always those of DenseIndex.

So only the speed depends on the scan. How often a proof succeeds, and from how many rows, is calibrated on queries
mixed of the index's own vectors, and counted on those that are asked; batches for which a scan is not expected to pay
are searched exactly at once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int8

from rag import native
from rag.index.dense import cost, refine
from rag.index.dense.audit import mixed_queries, sample_pairs
from rag.index.dense.exact import DenseIndex
from rag.ops.linear import by_digits, quantize
from rag.runtime.machine.measurement import Work
from rag.runtime.options import Count, check_fields
from rag.runtime.shapes import next_power_of_two

_GROUP = 16  # rows of a group
_BLOCK = 1 << 14  # rows that are converted at once
# The largest rounding error of an entry of a two-digit query, as a fraction of the query's largest entry.
_DIGITS_ERROR = 1 / (127 * 254 * 2)
_SAMPLE = 32  # queries of the calibration
_TIMES = (1, 2, 4, 8)  # multiples of the option's candidates that the calibration tries
# The cost of scoring a group's rows exactly, in rows of exact search for one query (rag.index.dense.cost).
_GROUP_COST = 60


@dataclass(frozen=True)
class Int8Scan:
    """The options of an Int8Index.

    k + `candidates` groups of 16 rows are scored exactly, or up to 8 times as many candidates where that proves more.
    """

    candidates: Count = 32

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "Int8Index":
        return Int8Index(vectors, self)


def most_queries(dim: int) -> int:
    """Return the largest batch of queries for which a scan can be faster than exact search.

    Above it, 8-bit products cost as much more for each further query as float products do.
    """
    return 16 if native.has_tiles(dim) else 8


def _scan_cost(dim: int, queries: int) -> float:
    """Return the cost of the bounds of a row, in rows of exact search for one query (rag.index.dense.cost)."""
    count = next_power_of_two(queries)
    if native.has_tiles(dim):
        return 0.25 + 0.035 * count + 24 / dim
    return 0.6 + 0.02 * count + 12 / dim


class Codes(NamedTuple):
    """Vectors in 8 bits."""

    values: Int8[Array, "N E"]
    scales: Float32[Array, "N"]  # values * scales are the rounded vectors
    errors: Float32[Array, "N"]  # the lengths of the rounding errors


class Queries(NamedTuple):
    """Query vectors with their lengths and the error bounds of their scores."""

    vectors: Float32[Array, "Q E"]
    lengths: Float32[Array, "Q"]
    slack: Float32[Array, "Q"]  # largest error of a score, from digits and float32, for the longest row


@dataclass
class Proofs:
    """For one k: the number of groups scored exactly, and for how many queries so far the results were proven."""

    groups: int
    proven: int
    asked: int

    @property
    def share(self) -> float:
        return self.proven / self.asked


class Int8Index:
    """A DenseIndex and its vectors in 8 bits: the same results, faster for small batches of queries.

    Attributes:
        options: how many groups are scored exactly.
        exact: the index of the float32 vectors.
        work: the work of the latest search, without padding.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Int8Scan | None = None):
        self.options = options or Int8Scan()
        self.exact = DenseIndex(vectors)
        starts = range(0, len(vectors), _BLOCK) or [0]
        parts = [_coded(vectors[start : start + _BLOCK]) for start in starts]
        codes, scales, errors, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._codes = Codes(jnp.asarray(codes), jnp.asarray(scales), jnp.asarray(errors))
        self._longest = max(refine.longest(vectors), float(lengths.max(initial=0)))
        self.work = Work()
        self._proofs: dict[int, Proofs] = {}  # by k

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the vectors and their codes, both of which a search reads."""
        return self.exact.nbytes + len(self) * (self.exact.dim + 8)

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """Return the min(k, len) best rows of each query, exactly. Raises UserError as DenseIndex.search."""
        scores, ids, _ = self.search_with_proof(queries, k)
        return scores, ids

    def search_with_proof(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"], Bool[np.ndarray, "Q"]]:
        """Return what `search` returns, and which queries the scan proved; the others were searched again, exactly.

        Where `path` is "exact" no query is scanned.
        """
        refine.check_queries(queries, self.exact.dim, k)
        if self.path(len(queries), k) == "exact":
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return *found, np.zeros(len(queries), bool)
        proofs = self.proofs(k)
        scores, ids, proven = self._scan(queries, k, proofs.groups)
        proofs.proven, proofs.asked = proofs.proven + int(proven.sum()), proofs.asked + len(proven)
        if not proven.all():
            scores[~proven], ids[~proven] = self.exact.search(queries[~proven], k)
            self.work += self.exact.work
        return scores, ids, proven

    def path(self, queries: int, k: int) -> Literal["scan", "exact"]:
        """Return whether a batch of so many queries is scanned first, or searched exactly at once.

        It is searched exactly where a scan, and searching again what it does not prove, is not expected to be faster.
        The results are the same.
        """
        if not 0 < queries <= most_queries(self.exact.dim) or k >= len(self):
            return "exact"
        if not self._pays(Proofs(k + self.options.candidates, 1, 1), queries):
            return "exact"  # even if it proved everything
        return "scan" if self._pays(self.proofs(k), queries) else "exact"

    def _pays(self, proofs: Proofs, queries: int) -> bool:
        rows = len(self)
        again = (1 - proofs.share**queries) * cost.exact(rows, queries)
        scan = rows * _scan_cost(self.exact.dim, queries)
        exact_scores = _GROUP_COST * next_power_of_two(queries) * proofs.groups
        return cost.pays(scan + exact_scores + again, rows, queries)

    def proofs(self, k: int) -> Proofs:
        """Return the Proofs of k, calibrated when k is first asked for."""
        if k not in self._proofs:
            self._proofs[k] = self._calibrate(k)
        return self._proofs[k]

    def _calibrate(self, k: int) -> Proofs:
        """Return the number of groups that makes searching for one query cheapest, and the share that it proves."""
        queries = mixed_queries(self.exact, sample_pairs(len(self), _SAMPLE, seed=0))
        best, _ = self.exact.search(queries, k + 1)  # one more: the best is the row that a query was made of
        batch = most_queries(self.exact.dim)
        needed = np.concatenate(
            [
                _needed(
                    self._codes,
                    self._queries(queries[start : start + batch]),
                    best[start : start + batch, -1],
                    by_native=self._by_native,
                )
                for start in range(0, len(queries), batch)
            ]
        )
        groups = [k + times * self.options.candidates for times in _TIMES]
        options = [Proofs(count, int(np.sum(needed <= count)), len(needed)) for count in groups]
        return min(options, key=lambda proofs: _GROUP_COST * proofs.groups + (1 - proofs.share) * len(self))

    def _scan(self, queries: np.ndarray, k: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        padded, dim, by_native = refine.padded(queries), self.exact.dim, self._by_native
        options = {"k": k, "groups": groups, "by_native": by_native}
        found = _search(self.exact.rows, self._codes, self._queries(padded), **options)
        read, scan = self.nbytes - self.exact.nbytes, 2 * len(self) * dim * len(queries)
        digits = not by_native or native.int8_digits(len(padded), dim)  # two products
        self.work = Work(read, read, int8=2 * scan) if digits else Work(read, read, float32=scan)
        self.work += refine.work(dim, _GROUP * groups, len(queries))
        scores, ids, proven = (np.array(part[: len(queries)]) for part in jax.device_get(found))
        return scores, ids, proven

    @property
    def _by_native(self) -> bool:
        return native.has_tiles(self.exact.dim)

    def _queries(self, queries: Float32[np.ndarray, "Q E"]) -> Queries:
        lengths = refine.lengths(queries)
        slack = (_rounding_error(queries) + lengths * refine.rounding(self.exact.dim)) * self._longest
        return Queries(*jax.device_put((queries, lengths.astype(np.float32), slack.astype(np.float32))))


def _coded(
    vectors: Float32[np.ndarray, "n E"],
) -> tuple[
    Int8[np.ndarray, "n E"],
    Float32[np.ndarray, "n"],
    Float32[np.ndarray, "n"],
    Float32[np.ndarray, "n"],
]:
    """Return 8-bit values, the scale of each row, the length of its rounding error, and its length when rounded."""
    coded = jax.device_get(_code(refine.padded(vectors, refine.LEAST)))
    values, scales, errors, lengths = (part[: len(vectors)] for part in coded)
    return values, scales, errors, lengths


@jax.jit
def _code(
    vectors: Float32[Array, "n E"],
) -> tuple[Int8[Array, "n E"], Float32[Array, "n"], Float32[Array, "n"], Float32[Array, "n"]]:
    values, scales = quantize(vectors)
    rounded = values * scales[:, None]
    return values, scales, jnp.linalg.norm(vectors - rounded, axis=1), jnp.linalg.norm(rounded, axis=1)


def _rounding_error(queries: Float32[np.ndarray, "Q E"]) -> Float64[np.ndarray, "Q"]:
    """Return an upper bound on the length of the error that two digits leave in each query."""
    return np.abs(queries).max(axis=1).astype(np.float64) * _DIGITS_ERROR * queries.shape[1] ** 0.5


@partial(jax.jit, static_argnames=("k", "groups", "by_native"))
def _search(
    vectors: Float32[Array, "N E"], codes: Codes, queries: Queries, *, k: int, groups: int, by_native: bool
) -> tuple[Float32[Array, "Q k"], Int[Array, "Q k"], Bool[Array, "Q"]]:
    bounds = _bounds(codes, queries, by_native)
    return refine.best_of_groups(
        vectors, queries.vectors, bounds, queries.slack, k=k, group=_GROUP, groups=groups
    )


@partial(jax.jit, static_argnames="by_native")
def _needed(
    codes: Codes, queries: Queries, least: Float32[Array, "Q"], *, by_native: bool
) -> Int[Array, "Q"]:
    """Return how many whole groups may hold a row that scores `least`: a proof must score these exactly."""
    highest = _bounds(codes, queries, by_native) + queries.slack[:, None]
    return (highest >= least[:, None]).sum(axis=1)


def _bounds(codes: Codes, queries: Queries, by_native: bool) -> Float32[Array, "Q groups"]:
    """Return what no score in a whole group exceeds by more than the query's slack."""
    with jax.named_scope("bounds"):
        if by_native:
            product = native.linear(queries.vectors, codes.values, codes.scales)
        else:
            product = by_digits(queries.vectors, codes.values) * codes.scales
        bounds = product + queries.lengths[:, None] * codes.errors
        whole = len(codes.values) // _GROUP * _GROUP
        return bounds[:, :whole].reshape(len(queries.vectors), -1, _GROUP).max(axis=2)
