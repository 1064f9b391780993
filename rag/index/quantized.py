"""Nearest neighbours by a scan of 8-bit vectors that proves its results exact, and says which ones.

    N vectors, Q queries, E embedding dim, k results, G groups of consecutive rows

Every vector is kept a second time in 8 bits with the length of what that leaves out. For a query q and a row x,
written in 8 bits as q' (two digits, rag.ops.linear) and x', Cauchy and Schwarz give
q.x <= q'.x' + |q| |x - x'| + |q - q'| |x'|: a bound on the exact score that takes a quarter of the reading. The
rows of highest bound are scored exactly; where the k-th of them beats the highest bound left out, nothing can have
been missed. The other queries are searched again, exactly: what is returned is always what DenseIndex returns.
"""

from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Float32, Int, Int8

from rag.index import rescore
from rag.index.dense import DenseIndex
from rag.index.growing import Growing, bucket
from rag.measure import Work
from rag.ops import native
from rag.ops.linear import by_digits, quantize
from rag.values import Count, check_fields

_GROUP = 16  # rows of a group
_BLOCK = 1 << 14  # rows that are converted at once
# Largest of an entry in two digits, as a part of the row's largest entry.
_DIGITS_ERROR = 1.001 / (127 * 254 * 2)


@dataclass(frozen=True)
class Int8Scan:
    """Options of an Int8Index: `candidates` groups of 16 rows beyond the k best are scored exactly."""

    candidates: Count = 32

    def __post_init__(self):
        check_fields(self)

    def build(self, vectors: Float32[np.ndarray, "N E"]) -> "Int8Index":
        return Int8Index(vectors, self)


def most_queries(dim: int) -> int:
    """Those of one search up to which a scan is faster than the exact search; past 16 XLA's int8 product is slow."""
    return 32 if native.has_tiles(dim) else 16


class Int8Index:
    """A DenseIndex and its vectors in 8 bits: the same results, for few queries in a part of the time.

    `work` is what the latest search did, padding left out.
    """

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Int8Scan | None = None):
        self.options = options or Int8Scan()
        self.exact = DenseIndex(vectors)
        parts = [_coded(vectors[start : start + _BLOCK]) for start in range(0, len(vectors), _BLOCK)]
        parts = parts or [_coded(vectors)]
        codes, scales, errors = (np.concatenate(part) for part in zip(*parts, strict=True))
        self._codes, self._scales, self._errors = (Growing(jnp.asarray(x)) for x in (codes, scales, errors))
        self._length = _longest(vectors)
        self.work = Work()

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

        More queries than `most_queries`, and k of a good part of all rows, go to the exact search unscanned.
        """
        rescore.check_queries(queries, self.exact.dim, k)
        few = 0 < len(queries) <= most_queries(self.exact.dim)
        if not few or len(self) < 4 * _GROUP * (k + self.options.candidates):
            found = self.exact.search(queries, k)
            self.work = self.exact.work
            return *found, np.zeros(len(queries), bool)
        scores, ids, proven = self._scan(queries, k)
        if not proven.all():
            scores[~proven], ids[~proven] = self.exact.search(queries[~proven], k)
            self.work += self.exact.work
        return scores, ids, proven

    def _scan(self, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        padded = rescore.padded(queries, bucket(len(queries), 1))
        lengths, slack = _slack(padded, self._length)
        by_native = native.has_tiles(self.exact.dim)
        found = _search(
            self.exact.rows,
            (self._codes.values, self._scales.values, self._errors.values),
            padded,
            (lengths, slack),
            np.int32(len(self)),
            k=k,
            groups=k + self.options.candidates,
            by_native=by_native,
        )
        dim, read = self.exact.dim, self.nbytes - self.exact.nbytes
        scan = 2 * len(self) * dim * len(queries)
        digits = not by_native or native.digits(len(padded), dim)  # two products
        self.work = Work(read, read, int8=2 * scan) if digits else Work(read, read, float32=scan)
        self.work += rescore.work(dim, _GROUP * (k + self.options.candidates), len(queries))
        return tuple(np.array(part[: len(queries)]) for part in jax.device_get(found))

    def add(self, vectors: Float32[np.ndarray, "n E"]) -> None:
        """Append rows, as DenseIndex.add does."""
        self.exact.add(vectors)
        for part, new in zip((self._codes, self._scales, self._errors), _coded(vectors), strict=True):
            part.append(new)
        self._length = max(self._length, _longest(vectors))


def _coded(
    vectors: Float32[np.ndarray, "n E"],
) -> tuple[Int8[np.ndarray, "n E"], Float32[np.ndarray, "n"], Float32[np.ndarray, "n"]]:
    """8-bit values, the scale of each row, and the length of what they leave out (no less than the true one)."""
    padded = rescore.padded(vectors, bucket(len(vectors)))
    return tuple(np.array(part[: len(vectors)]) for part in jax.device_get(_code(padded)))


@jax.jit
def _code(
    vectors: Float32[Array, "n E"],
) -> tuple[Int8[Array, "n E"], Float32[Array, "n"], Float32[Array, "n"]]:
    values, scales = quantize(vectors)
    return values, scales, 1.001 * jnp.linalg.norm(vectors - values * scales[:, None], axis=1)


def _slack(
    queries: Float32[np.ndarray, "Q E"], longest: float
) -> tuple[Float32[np.ndarray, "Q"], Float32[np.ndarray, "Q"]]:
    """The queries' lengths, and what their digits and rounding leave out of a product with the longest row."""
    lengths, dim = rescore.lengths(queries), queries.shape[1]
    left_out = np.abs(queries).max(axis=1) * _DIGITS_ERROR * dim**0.5
    slack = (left_out + lengths * rescore.rounding(dim)) * longest
    return lengths.astype(np.float32), slack.astype(np.float32)


@partial(jax.jit, static_argnames=("k", "groups", "by_native"))
def _search(vectors, codes, queries, written, live, *, k: int, groups: int, by_native: bool):
    lengths, slack = written
    bounds = _bounds(*codes, queries, lengths, by_native)
    return rescore.best_of_groups(vectors, queries, bounds, slack, live, k=k, group=_GROUP, groups=groups)


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


def _longest(vectors: Float32[np.ndarray, "N E"]) -> float:
    """No less than the length of any of the vectors, or of one of them in 8 bits."""
    blocks = [vectors[start : start + _BLOCK] for start in range(0, len(vectors), _BLOCK)]
    longest = max((float(np.linalg.norm(block, axis=1).max()) for block in blocks), default=0.0)
    return longest * (1 + vectors.shape[1] ** 0.5 / 254 + 1e-3)  # half a step of each entry
