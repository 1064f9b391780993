"""Exact search: ours beside FAISS IndexFlatIP, as it comes and with its threshold tuned, on the same vectors.

FAISS multiplies matrices only where queries x dimensions reach faiss.cvar.distance_compute_blas_threshold, by
default 128,000; `faiss tuned` has that at 1. Recall is counted against float64: of the k returned, how many
score no less than the true k-th.

Letters: N vectors, Q queries, E embedding dim.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Float64

from rag.index.dense import DenseIndex
from rag.index.store import Index
from rag.measure import Row, alternate, cores, ratio

Find = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, E], k -> ids [Q, k]

_TIE = 1e-6  # the rounding of float32 may swap scores this close
_BLOCK = 1 << 14  # rows scored in float64 at once


@dataclass(frozen=True)
class Search:
    """bench=search: milliseconds a batch, for every number of queries and every k."""

    vectors: int = 200_000  # random unit vectors
    dim: int = 384
    index: str | None = None  # a folder: the vectors of a real index instead
    queries: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 64, 128, 256)
    k: tuple[int, ...] = (10, 100)
    repeats: int = 7

    def run(self) -> list[Row]:
        vectors = (
            Index.open(Path(self.index)).vectors if self.index else _units(self.vectors, self.dim, seed=0)
        )
        questions = _questions(vectors, max(self.queries))
        best = _kth_scores(vectors, questions, max(self.k))
        ours = DenseIndex(vectors)
        finders: dict[str, Find] = {"ours": lambda queries, k: ours.search(queries, k)[1], **_faiss(vectors)}
        cases = [(k, count) for k in self.k for count in self.queries]
        return [self._row(vectors, questions[:count], k, best[:count, k - 1], finders) for k, count in cases]

    def _row(self, vectors, questions, k: int, kth, finders: dict[str, Find]) -> Row:
        calls = {name: (lambda find=find: find(questions, k)) for name, find in finders.items()}
        timings = alternate(calls, repeats=self.repeats)
        figures = {
            name: {"ms": 1000 * timings[name].median, "recall": _recall(vectors, questions, kth, call())}
            for name, call in calls.items()
        }
        mine = figures.pop("ours")
        ratios = {name: ratio(timings["ours"], timings[name]) for name in figures}
        return Row(
            f"N={len(vectors)} E={vectors.shape[1]} k={k} queries={len(questions)}", mine, figures, ratios
        )


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
        best = np.sort(np.concatenate([best, scores], axis=1), axis=1)[:, ::-1][:, :k]
    return best


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
