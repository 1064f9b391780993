"""Compare exact, proven and approximate search with FAISS IndexFlatIP, by default and with a tuned threshold.

FAISS multiplies matrices only where queries x dimensions reach faiss.cvar.distance_compute_blas_threshold, by default
128,000; `faiss tuned` sets it to 1. Recall is computed against float64 on the first `checked` queries: of the k
returned, how many score at least as high as the true k-th. The operations and bytes of our indexes are those that they
count themselves: the scan of the codes and the exact scores after it, in the type that they were computed in. FAISS's
are 2 N Q E operations in float32 on N E floats read once, the least that it can do.

Letters: N vectors, Q queries, E embedding dim.
"""

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Float32, Float64, Integer

from rag.bench.peers import print_left_out
from rag.bench.timing import Row, alternate, ratio
from rag.index.dense.binary import Binary, BinaryIndex
from rag.index.dense.exact import DenseIndex
from rag.index.dense.int8 import Int8Index
from rag.index.store import Index
from rag.runtime.machine.hardware import cores
from rag.runtime.machine.measurement import Work
from rag.runtime.options import Count, Counts, Filled, check_fields

Find = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, E], k -> ids [Q, k]

_TIE = 1e-6  # the rounding of float32 may swap scores this close
_BLOCK = 1 << 14  # rows that are scored in float64 together
_FEW = 31  # the most queries for which the int8 and the 1-bit index scan their codes


@dataclass(frozen=True)
class SearchBenchmark:
    """Measure milliseconds per batch for each number of vectors, queries and k; defaults: conf/bench/search.yaml."""

    vectors: Counts
    dim: Count
    index: Filled | None
    questions: Filled | None
    queries: Counts
    k: Counts
    recall: Annotated[float, Gt(0), Lt(1)]
    checked: Count
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each number of vectors, k, number of queries, and index."""
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

    def _case(
        self,
        vectors: Float32[np.ndarray, "N E"],
        questions: Float32[np.ndarray, "Q E"],
        k: int,
        kth: Float64[np.ndarray, "checked"],  # the k-th best score of the first questions
        ours: "_Ours",
        peers: dict[str, Find],
    ) -> list[Row]:
        finders = ours.finders(len(questions)) | peers
        calls = {name: partial(find, questions, k) for name, find in finders.items()}
        timings = alternate(calls, repeats=self.repeats)
        least = Work(vectors.nbytes, vectors.nbytes, float32=2 * vectors.size * len(questions))
        work = dict.fromkeys(peers, least) | ours.work(len(questions))
        few, case = questions[: self.checked], f"N={len(vectors)} E={vectors.shape[1]} k={k}"
        figures = {
            name: {"ms": timings[name].times(1000)}
            | work[name].rates(timings[name])
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
    """Our indexes over the same vectors."""

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Binary):
        self.exact, self.int8, self.binary = (
            DenseIndex(vectors),
            Int8Index(vectors),
            BinaryIndex(vectors, options),
        )

    def _ways(self, queries: int) -> dict[str, DenseIndex | Int8Index | BinaryIndex]:
        """Return the indexes to measure with so many queries: beyond `_FEW` the others search exactly too."""
        ways: dict[str, DenseIndex | Int8Index | BinaryIndex] = {"exact": self.exact}
        return ways | {"int8": self.int8, "1 bit": self.binary} if queries <= _FEW else ways

    def finders(self, queries: int) -> dict[str, Find]:
        """Return the search functions for so many queries, by index."""
        return {name: _finder(index) for name, index in self._ways(queries).items()}

    def work(self, queries: int) -> dict[str, Work]:
        """Return the work of each index in its latest search."""
        return {name: index.work for name, index in self._ways(queries).items()}

    def extra(self, way: str, questions: np.ndarray, k: int) -> dict[str, float | int]:
        """Return further figures of an index; `scanned` is 0 where it searched exactly instead."""
        if way == "exact":
            return {}
        index = self.int8 if way == "int8" else self.binary
        scanned: dict[str, float | int] = {"scanned": int(index.path(len(questions), k) == "scan")}
        if way == "int8":
            return scanned | {"proven": float(self.int8.search_with_proof(questions, k)[2].mean())}
        return scanned | {"candidates": self.binary.candidates(k)}


def _finder(index: DenseIndex | Int8Index | BinaryIndex) -> Find:
    return lambda questions, k: index.search(questions, k)[1]


def _stored(path: Path) -> Float32[np.ndarray, "N E"]:
    return np.load(path, mmap_mode="r") if path.suffix == ".npy" else Index.open(path).vectors


def _units(count: int, dim: int, seed: int) -> Float32[np.ndarray, "N E"]:
    vectors = np.random.default_rng(seed).standard_normal((count, dim), dtype=np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _questions(vectors: Float32[np.ndarray, "N E"], count: int) -> Float32[np.ndarray, "Q E"]:
    """Return unit vectors, each halfway between one of the vectors and a random direction."""
    near = vectors[np.random.default_rng(1).integers(len(vectors), size=count)]
    questions = near + _units(count, vectors.shape[1], seed=2)
    return questions / np.linalg.norm(questions, axis=1, keepdims=True)


def _kth_scores(
    vectors: Float32[np.ndarray, "N E"], questions: Float32[np.ndarray, "Q E"], k: int
) -> np.ndarray:
    """Return the k highest scores of each question, best first, by brute force in float64: [Q, k]."""
    best: Float64[np.ndarray, "Q k"] = np.full((len(questions), k), -np.inf)
    for start in range(0, len(vectors), _BLOCK):
        scores = questions.astype(np.float64) @ vectors[start : start + _BLOCK].astype(np.float64).T
        both = np.concatenate([best, scores], axis=1)
        best = np.partition(both, both.shape[1] - k, axis=1)[:, -k:]
    return np.sort(best, axis=1)[:, ::-1]


def _recall(
    vectors: Float32[np.ndarray, "N E"],
    questions: Float32[np.ndarray, "Q E"],
    kth: Float64[np.ndarray, "Q"],
    ids: Integer[np.ndarray, "Q k"],
) -> float:
    found = np.einsum("qe,qke->qk", questions.astype(np.float64), vectors[ids].astype(np.float64))
    return float(np.mean(found >= kth[:, None] - _TIE))


def _faiss(vectors: Float32[np.ndarray, "N E"]) -> dict[str, Find]:
    try:
        import faiss
    except ImportError:
        print_left_out("faiss", "it is not installed (make bench-setup)")
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
