"""Search, exact, proven and approximate, beside FAISS IndexFlatIP, as it comes and with its threshold tuned.

FAISS multiplies matrices only where queries x dimensions reach faiss.cvar.distance_compute_blas_threshold, by
default 128,000; `faiss tuned` has that at 1. Recall is counted against float64, on as many of the queries as
`checked` says: of the k returned, how many score no less than the true k-th. GFLOP/s and GB/s are those of
exact scores, 2 N Q E operations on N E floats, whatever was computed in their place.

Letters: N vectors, Q queries, E embedding dim.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from rag.index.binary import Binary, BinaryIndex
from rag.index.dense import DenseIndex
from rag.index.quantized import Int8Index
from rag.index.store import Index
from rag.measure import Row, Timing, alternate, cores, ratio

Find = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, E], k -> ids [Q, k]

_TIE = 1e-6  # the rounding of float32 may swap scores this close
_BLOCK = 1 << 14  # rows scored in float64 at once
_FEW = 31  # queries up to which the indexes that scan codes do so


@dataclass(frozen=True)
class Search:
    """bench=search: milliseconds a batch, for every number of vectors, of queries and every k."""

    vectors: Sequence[int] = (200_000, 1_000_000)  # random unit vectors
    dim: int = 384
    index: str | None = (
        None  # the vectors of a real index, a folder, or of a .npy file instead, as many as there are
    )
    questions: str | None = None  # a .npy file of query vectors; none: each near one of the vectors
    queries: Sequence[int] = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    k: Sequence[int] = (10, 100)
    recall: float = 0.99  # asked of the approximate index
    checked: int = 64  # queries whose recall is counted
    repeats: int = 5

    def run(self) -> list[Row]:
        if self.index:
            return self._rows(_stored(Path(self.index)))
        return [row for count in self.vectors for row in self._rows(_units(count, self.dim, seed=0))]

    def _rows(self, vectors: Float32[np.ndarray, "N E"]) -> list[Row]:
        near = np.load(self.questions) if self.questions else _questions(vectors, max(self.queries))
        questions = np.resize(near, (max(self.queries), vectors.shape[1]))
        best = _kth_scores(vectors, questions[: self.checked], max(self.k))
        peers, ours = _faiss(vectors), _Ours(vectors, Binary(recall=self.recall))
        cases = [(k, count) for k in self.k for count in self.queries]
        return [
            row
            for k, count in cases
            for row in self._case(vectors, questions[:count], k, best[:, k - 1], ours, peers)
        ]

    def _case(self, vectors, questions, k: int, kth, ours: "_Ours", peers: dict[str, Find]) -> list[Row]:
        finders = ours.finders(len(questions)) | peers
        calls = {name: (lambda find=find: find(questions, k)) for name, find in finders.items()}
        timings = alternate(calls, repeats=self.repeats)
        few, case = questions[: self.checked], f"N={len(vectors)} E={vectors.shape[1]} k={k}"
        figures = {
            name: _figures(timings[name], vectors, len(questions))
            | {"recall": _recall(vectors, few, kth[: len(few)], find(few, k))}
            for name, find in finders.items()
        }
        rows = []
        for way in ours.finders(len(questions)):
            others = {name: figures[name] for name in ("exact", *peers) if name != way}
            ratios = {name: ratio(timings[way], timings[name]) for name in others}
            mine = figures[way] | ours.extra(way, questions, k)
            rows.append(Row(f"{case} queries={len(questions)} {way}", mine, others, ratios))
        return rows


class _Ours:
    """The indexes of ours over the same vectors."""

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Binary):
        self.exact, self.int8, self.binary = (
            DenseIndex(vectors),
            Int8Index(vectors),
            BinaryIndex(vectors, options),
        )

    def finders(self, queries: int) -> dict[str, Find]:
        """Those that search so many queries in ways of their own."""
        ways = {"exact": self.exact, "int8": self.int8, "1 bit": self.binary}
        return {
            name: (lambda asked, k, index=index: index.search(asked, k)[1])
            for name, index in ways.items()
            if name == "exact" or queries <= _FEW
        }

    def extra(self, way: str, questions: np.ndarray, k: int) -> dict[str, float | int]:
        """What there is to say of one way beside its speed; `scanned` is 0 where it searched exactly instead."""
        if way == "exact":
            return {}
        index = self.int8 if way == "int8" else self.binary
        scanned = {"scanned": int(index.path(len(questions), k) == "scan")}
        if way == "int8":
            return scanned | {"proven": float(self.int8.search_with_proof(questions, k)[2].mean())}
        return scanned | {"candidates": self.binary.candidates(k)}


def _figures(timing: Timing, vectors: np.ndarray, queries: int) -> dict[str, object]:
    return {
        "ms": timing.times(1000),
        "GFLOP/s": timing.rate(2 * vectors.size * queries / 1e9),
        "GB/s": timing.rate(vectors.nbytes / 1e9),
    }


def _stored(path: Path) -> Float32[np.ndarray, "N E"]:
    return np.load(path, mmap_mode="r") if path.suffix == ".npy" else Index.open(path).vectors


def _units(count: int, dim: int, seed: int) -> Float32[np.ndarray, "N E"]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _questions(vectors: Float32[np.ndarray, "N E"], count: int) -> Float32[np.ndarray, "Q E"]:
    """Unit vectors each halfway between one of the vectors and a random direction."""
    near = vectors[np.random.default_rng(1).integers(len(vectors), size=count)]
    questions = near + _units(count, vectors.shape[1], seed=2)
    return questions / np.linalg.norm(questions, axis=1, keepdims=True)


def _kth_scores(
    vectors: Float32[np.ndarray, "N E"], questions: Float32[np.ndarray, "Q E"], k: int
) -> np.ndarray:
    """The k highest scores of each question, best first, by brute force in float64: [Q, k]."""
    best: Float64[np.ndarray, "Q k"] = np.full((len(questions), k), -np.inf)
    for start in range(0, len(vectors), _BLOCK):
        scores = questions.astype(np.float64) @ vectors[start : start + _BLOCK].astype(np.float64).T
        both = np.concatenate([best, scores], axis=1)
        best = np.partition(both, both.shape[1] - k, axis=1)[:, -k:]
    return np.sort(best, axis=1)[:, ::-1]


def _recall(vectors, questions, kth, ids) -> float:
    found = np.einsum("qe,qke->qk", questions.astype(np.float64), vectors[ids].astype(np.float64))
    return float(np.mean(found >= kth[:, None] - _TIE))


def _faiss(vectors: Float32[np.ndarray, "N E"]) -> dict[str, Find]:
    try:
        import faiss
    except ImportError:
        print("faiss is not installed: its columns are left out (make bench-setup)", file=sys.stderr)
        return {}
    faiss.omp_set_num_threads(cores())
    index = faiss.IndexFlatIP(vectors.shape[1])
    index.add(np.ascontiguousarray(vectors))

    @contextlib.contextmanager
    def threshold(value: int) -> Iterator[None]:
        before = faiss.cvar.distance_compute_blas_threshold
        faiss.cvar.distance_compute_blas_threshold = value
        try:
            yield
        finally:
            faiss.cvar.distance_compute_blas_threshold = before

    def tuned(queries: np.ndarray, k: int) -> np.ndarray:
        with threshold(1):
            return index.search(queries, k)[1]

    return {"faiss": lambda queries, k: index.search(queries, k)[1], "faiss tuned": tuned}
