"""Nearest neighbours by a scan of 8-bit vectors that proves its results exact, and says which ones.

    N vectors, Q queries, E embedding dim, k results, G groups of consecutive rows

Every vector is kept a second time in 8 bits with the length of what that leaves out. For a query q and a row x,
written in 8 bits as q' (two digits, rag.ops.linear) and x', Cauchy and Schwarz give
q.x <= q'.x' + |q| |x - x'| + |q - q'| |x'|: a bound on the exact score that takes a quarter of the reading. The
rows of highest bound are scored exactly; where the k-th of them beats the highest bound left out, nothing can have
been missed. The other queries are searched again, exactly: what is returned is always what DenseIndex returns.

So only speed depends on what is scanned. How often a proof succeeds, and from how many rows, is found on queries
mixed of the index's own vectors, and on those that are asked; batches for which a scan is not expected to pay are
searched exactly at once.
"""

from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Float64, Int, Int8

from rag import native
from rag.index.dense import cost, refine
from rag.index.dense.calibration import Calibrated, mixed_queries
from rag.index.dense.exact import DenseIndex
from rag.index.dense.growing import Growing, _round_up
from rag.ops.linear import by_digits, quantize
from rag.runtime.measurement import Work
from rag.runtime.options import Count, check_fields

_GROUP = 16  # rows of a group
_BLOCK = 1 << 14  # rows that are converted at once
# The most that two digits leave out of an entry, as a part of the row's largest.
_DIGITS_ERROR = 1 / (127 * 254 * 2)
_SAMPLE = 32  # queries on which it is found how much is proven
_TIMES = (1, 2, 4, 8)  # the candidates that are asked for, as multiples of the option's
# What scoring a group's rows exactly costs a query, in rows of exact search for one (rag.index.dense.cost).
_GROUP_COST = 60


@dataclass(frozen=True)
class Int8Scan:
    """Options of an Int8Index: `candidates` groups of 16 rows beyond the k best are scored exactly, or up to 8 times
    as many where that proves more."""

    candidates: Count = 32

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "Int8Index":
        return Int8Index(vectors, self)


def most_queries(dim: int) -> int:
    """Those of one search up to which a scan can be faster than the exact search, where the processor's products
    of 8 bits, or XLA's, grow as fast as those in more."""
    return 16 if native.has_tiles(dim) else 8


def _scan_cost(dim: int, queries: int) -> float:
    """What the bounds of a row cost, in rows of exact search for one query (rag.index.dense.cost)."""
    count = _round_up(queries, 1)
    if native.has_tiles(dim):
        return 0.25 + 0.035 * count + 24 / dim
    return 0.6 + 0.02 * count + 12 / dim


@dataclass
class Proofs:
    """For some k: the groups that are scored exactly, and how many queries that proved of those it was tried on."""

    groups: int
    proven: int
    asked: int

    @property
    def share(self) -> float:
        return self.proven / self.asked


class Int8Index:
    """A DenseIndex and its vectors in 8 bits: the same results, for few queries in a part of the time.

    `work` is what the latest search did, padding left out.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Int8Scan | None = None):
        self.options = options or Int8Scan()
        self.exact = DenseIndex(vectors)
        parts = [_coded(vectors[start : start + _BLOCK]) for start in range(0, len(vectors), _BLOCK)]
        parts = parts or [_coded(vectors)]
        codes, scales, errors, lengths = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._codes, self._scales, self._errors = (Growing(jnp.asarray(x)) for x in (codes, scales, errors))
        self._longest = max(refine.longest(vectors), float(lengths.max(initial=0)))
        self.work = Work()
        self._proofs = Calibrated[Proofs]()

    def __len__(self) -> int:
        return len(self.exact)

    @property
    def nbytes(self) -> int:
        """Of the vectors and their codes, both of which a search reads."""
        return self.exact.nbytes + len(self) * (self.exact.dim + 8)

    def search(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"]]:
        """The min(k, len) best rows of each query, exactly; UserError as DenseIndex.search."""
        scores, ids, _ = self.search_with_proof(queries, k)
        return scores, ids

    def search_with_proof(
        self, queries: Float[np.ndarray, "Q E"], k: int
    ) -> tuple[Float32[np.ndarray, "Q k"], Int[np.ndarray, "Q k"], Bool[np.ndarray, "Q"]]:
        """What `search` returns, and which queries the scan proved; the others were searched again, exactly.

        Where `path` says so all go to the exact search unscanned.
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
        """Whether a batch of so many queries is scanned first, or searched exactly at once because a scan, and
        searching again what it does not prove, is not expected to be faster. The results are the same."""
        if not 0 < queries <= most_queries(self.exact.dim) or k >= len(self):
            return "exact"
        if not self._pays(Proofs(k + self.options.candidates, 1, 1), queries):
            return "exact"  # even if it proved everything
        return "scan" if self._pays(self.proofs(k), queries) else "exact"

    def _pays(self, proofs: Proofs, queries: int) -> bool:
        rows = len(self)
        again = (1 - proofs.share**queries) * cost.exact(rows, queries)
        scan = (
            rows * _scan_cost(self.exact.dim, queries) + _GROUP_COST * _round_up(queries, 1) * proofs.groups
        )
        return cost.pays(scan + again, rows, queries)

    def proofs(self, k: int) -> Proofs:
        """What scans for k results prove: found when first asked for, and again when the index has doubled."""
        return self._proofs.of(k, len(self), self._calibrate)

    def _calibrate(self, k: int) -> Proofs:
        """The number of groups that makes searching for one query cheapest, and the share that it proves."""
        queries, step = mixed_queries(self.exact, _SAMPLE, seed=0), most_queries(self.exact.dim)
        least = self.exact.search(queries, k + 1)[0][:, -1]  # without the row that the query was made of
        batches = [slice(start, start + step) for start in range(0, len(queries), step)]
        live, by_native = np.int32(len(self)), native.has_tiles(self.exact.dim)
        needed = np.concatenate(
            [_needed(*self._written(queries[b]), least[b], live, by_native=by_native) for b in batches]
        )
        groups = [k + times * self.options.candidates for times in _TIMES]
        options = [Proofs(count, int(np.sum(needed <= count)), len(needed)) for count in groups]
        return min(options, key=lambda proofs: _GROUP_COST * proofs.groups + (1 - proofs.share) * len(self))

    def _scan(self, queries: np.ndarray, k: int, groups: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        padded = refine.padded(queries, _round_up(len(queries), 1))
        dim, by_native = self.exact.dim, native.has_tiles(self.exact.dim)
        options = {"k": k, "groups": groups, "by_native": by_native}
        found = _search(self.exact.rows, *self._written(padded), np.int32(len(self)), **options)
        read, scan = self.nbytes - self.exact.nbytes, 2 * len(self) * dim * len(queries)
        digits = not by_native or native.int8_digits(len(padded), dim)  # two products
        self.work = Work(read, read, int8=2 * scan) if digits else Work(read, read, float32=scan)
        self.work += refine.work(dim, _GROUP * groups, len(queries))
        return tuple(np.array(part[: len(queries)]) for part in jax.device_get(found))

    def _written(self, queries: np.ndarray) -> tuple[tuple[Array, ...], np.ndarray, tuple[np.ndarray, ...]]:
        """The vectors in 8 bits, the queries, and how much that may leave out."""
        codes = self._codes.values, self._scales.values, self._errors.values
        return codes, queries, _slack(queries, self._longest)

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows, as DenseIndex.add does."""
        self.exact.add(vectors)
        *coded, lengths = _coded(vectors)
        for part, new in zip((self._codes, self._scales, self._errors), coded, strict=True):
            part.append(new)
        self._longest = max(self._longest, refine.longest(vectors), float(lengths.max(initial=0)))


def _coded(
    vectors: Float32[np.ndarray, "n E"],
) -> tuple[
    Int8[np.ndarray, "n E"],
    Float32[np.ndarray, "n"],
    Float32[np.ndarray, "n"],
    Float32[np.ndarray, "n"],
]:
    """8-bit values, the scale of each row, and the lengths of what they leave out and of what they keep."""
    padded = refine.padded(vectors, _round_up(len(vectors)))
    return tuple(np.array(part[: len(vectors)]) for part in jax.device_get(_code(padded)))


@jax.jit
def _code(
    vectors: Float32[Array, "n E"],
) -> tuple[Int8[Array, "n E"], Float32[Array, "n"], Float32[Array, "n"], Float32[Array, "n"]]:
    values, scales = quantize(vectors)
    kept = values * scales[:, None]
    return values, scales, jnp.linalg.norm(vectors - kept, axis=1), jnp.linalg.norm(kept, axis=1)


def _left_out(queries: Float32[np.ndarray, "Q E"]) -> Float64[np.ndarray, "Q"]:
    """No less than the length of what two digits leave out of each query."""
    return np.abs(queries).max(axis=1).astype(np.float64) * _DIGITS_ERROR * queries.shape[1] ** 0.5


def _slack(
    queries: Float32[np.ndarray, "Q E"], longest: float
) -> tuple[Float32[np.ndarray, "Q"], Float32[np.ndarray, "Q"]]:
    """The queries' lengths, and what their digits and rounding leave out of a product with the longest row."""
    lengths = refine.lengths(queries)
    slack = (_left_out(queries) + lengths * refine.rounding(queries.shape[1])) * longest
    return lengths.astype(np.float32), slack.astype(np.float32)


@partial(jax.jit, static_argnames=("k", "groups", "by_native"))
def _search(vectors, codes, queries, written, live, *, k: int, groups: int, by_native: bool):
    lengths, slack = written
    bounds = _bounds(*codes, queries, lengths, by_native)
    return refine.best_of_groups(vectors, queries, bounds, slack, live, k=k, group=_GROUP, groups=groups)


@partial(jax.jit, static_argnames="by_native")
def _needed(codes, queries, written, least, live, *, by_native: bool) -> Int[Array, "Q"]:
    """How many whole groups may hold a row that scores `least`: so many must be scored to prove that none does."""
    lengths, slack = written
    highest = _bounds(*codes, queries, lengths, by_native) + slack[:, None]
    return ((highest >= least[:, None]) & (jnp.arange(highest.shape[1]) < live // _GROUP)).sum(axis=1)


def _bounds(
    codes: Int8[Array, "N E"],
    scales: Float32[Array, "N"],
    errors: Float32[Array, "N"],
    queries: Float32[Array, "Q E"],
    lengths: Float32[Array, "Q"],
    by_native: bool,
) -> Float32[Array, "Q G"]:
    """What no score in a whole group exceeds, but for what the product leaves out of the queries."""
    with jax.named_scope("bounds"):
        product = native.linear(queries, codes, scales) if by_native else by_digits(queries, codes) * scales
        bounds = product + lengths[:, None] * errors
        whole = len(codes) // _GROUP * _GROUP
        return bounds[:, :whole].reshape(len(queries), -1, _GROUP).max(axis=2)
