"""Search, exact, proven and approximate, beside FAISS IndexFlatIP, as it comes and with its threshold tuned.

FAISS multiplies matrices only where queries x dimensions reach faiss.cvar.distance_compute_blas_threshold, by
default 128,000; `faiss tuned` has that at 1. Recall is counted against float64, on as many of the queries as
`checked` says: of the k returned, how many score no less than the true k-th. Of ours the operations and the bytes
read are what the index says that it did: codes and what was scored exactly after them, products in the type that
they were computed in. FAISS's are 2 N Q E operations in float32 on N E floats read once, the least that it can do.

Letters: N vectors, Q queries, E embedding dim.
"""

import contextlib
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Gt, Lt
from jaxtyping import Float32, Float64

from rag.bench.timing import Row, alternate, ratio
from rag.index.dense.binary import Binary, BinaryIndex
from rag.index.dense.exact import DenseIndex
from rag.index.dense.int8 import Int8Index
from rag.index.store import Index
from rag.runtime.machine import cores
from rag.runtime.measurement import Work
from rag.runtime.options import Count, Counts, Filled, check_fields

Find = Callable[[np.ndarray, int], np.ndarray]  # queries [Q, E], k -> ids [Q, k]

_TIE = 1e-6  # the rounding of float32 may swap scores this close
_BLOCK = 1 << 14  # rows scored in float64 at once
_FEW = 31  # queries up to which the indexes that scan codes do so


@dataclass(frozen=True)
class SearchBenchmark:
    """bench=search: milliseconds a batch, for every number of vectors, of queries and every k."""

    vectors: Counts = (200_000, 1_000_000)  # random unit vectors
    dim: Count = 384
    index: Filled | None = None  # the vectors of a real index, a folder, or of a .npy file instead
    questions: Filled | None = None  # a .npy file of query vectors; none: each near one of the vectors
    queries: Counts = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
    k: Counts = (10, 100)
    recall: Annotated[float, Gt(0), Lt(1)] = 0.99  # asked of the approximate index
    checked: Count = 64  # queries whose recall is counted
    repeats: Count = 5

    def __post_init__(self) -> None:
        check_fields(self)

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
    """The indexes of ours over the same vectors."""

    def __init__(self, vectors: Float32[np.ndarray, "N E"], options: Binary):
        self.exact, self.int8, self.binary = (
            DenseIndex(vectors),
            Int8Index(vectors),
            BinaryIndex(vectors, options),
        )

    def _ways(self, queries: int) -> dict[str, DenseIndex | Int8Index | BinaryIndex]:
        """Those that search so many queries in ways of their own."""
        exact = {"exact": self.exact}
        return exact | {"int8": self.int8, "1 bit": self.binary} if queries <= _FEW else exact

    def finders(self, queries: int) -> dict[str, Find]:
        return {
            name: (lambda asked, k, index=index: index.search(asked, k)[1])
            for name, index in self._ways(queries).items()
        }

    def work(self, queries: int) -> dict[str, Work]:
        """What the latest search did by each of the ways for so many queries."""
        return {name: index.work for name, index in self._ways(queries).items()}

    def extra(self, way: str, questions: np.ndarray, k: int) -> dict[str, float | int]:
        """What there is to say of one way beside its speed; `scanned` is 0 where it searched exactly instead."""
        if way == "exact":
            return {}
        index = self.int8 if way == "int8" else self.binary
        scanned = {"scanned": int(index.path(len(questions), k) == "scan")}
        if way == "int8":
            return scanned | {"proven": float(self.int8.search_with_proof(questions, k)[2].mean())}
        return scanned | {"candidates": self.binary.candidates(k)}


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
