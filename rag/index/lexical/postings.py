"""Search by words: an inverted index that holds counts, so that how words are weighted is chosen by each search.

    N passages (rows), V terms, P postings (a term in a passage), T terms of a question, C candidates
    G rows of a group, M groups

For every term the passages that have it, in order, and how often. A score is a sum over the terms of the question
(rag/index/weighting.py); a term's share is worked out when it is first asked for and kept for as long as the
searches use the same weights. Summing is a scatter, which numpy does in 1.4 ns a posting and XLA on CPU in 8.5,
and the best of a row of scores are found in 20 us where lax.top_k takes 200 (100,000 passages), so nothing here
runs through JAX.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt

from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights, TfIdfWeights, Weights, mean_length
from rag.types import UserError

__all__ = ["BM25Weights", "LexicalIndex", "Postings", "TfIdfWeights"]

FORMAT = 1  # of the folder's contents
_META = "lexical.json"
_DENSE = 8  # a term in more than one of so many passages is kept as a whole row: 10 us to add, not 17 or more
_REPORTED = 4096  # texts between two calls of `progress`
_LEAST = np.finfo(np.float32).smallest_subnormal  # of the scores above zero

Found = tuple[Float32[np.ndarray, "_"], Int32[np.ndarray, "_"]]
Impact = tuple[Int32[np.ndarray, "_"] | None, Float32[np.ndarray, "_"]]


@dataclass(frozen=True, eq=False)
class Postings:
    """For term v, its passages and frequencies stand at offsets[v]:offsets[v + 1], by ascending row."""

    offsets: Int64[np.ndarray, "_"]
    rows: Int32[np.ndarray, "P"]
    frequencies: UInt[np.ndarray, "P"]  # of the smallest type that holds the largest
    lengths: Int32[np.ndarray, "N"]  # terms of each passage

    @staticmethod
    def count(ids: Int32[np.ndarray, "_"], lengths: Int32[np.ndarray, "N"], terms: int) -> "Postings":
        """From the term ids of all passages in a row, each below `terms`."""
        n = max(len(lengths), 1)
        keys = np.sort(ids.astype(np.int64) * n + np.repeat(np.arange(len(lengths)), lengths))
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        term, rows = np.divmod(keys[starts], n)
        frequencies = _smallest(np.diff(starts, append=len(keys)))
        return Postings(
            _offsets(np.bincount(term, minlength=terms)), rows.astype(np.int32), frequencies, lengths
        )

    def followed_by(self, more: "Postings") -> "Postings":
        """These passages and then those of `more`, whose terms may be more too."""
        df = np.zeros(len(more.offsets) - 1, np.int64)
        df[: len(self.offsets) - 1] = np.diff(self.offsets)
        offsets = _offsets(df + np.diff(more.offsets))
        old = np.arange(len(self.rows)) + np.repeat(offsets[:-1] - _offsets(df)[:-1], df)
        new = np.arange(len(more.rows)) + np.repeat(
            offsets[:-1] + df - more.offsets[:-1], np.diff(more.offsets)
        )
        rows = np.empty(offsets[-1], np.int32)
        rows[old], rows[new] = self.rows, more.rows + np.int32(len(self.lengths))
        frequencies = np.empty(len(rows), np.result_type(self.frequencies, more.frequencies))
        frequencies[old], frequencies[new] = self.frequencies, more.frequencies
        return Postings(offsets, rows, frequencies, np.concatenate([self.lengths, more.lengths]))

    def of(self, term: int) -> tuple[Int32[np.ndarray, "_"], UInt[np.ndarray, "_"]]:
        """The term's passages and its frequencies there."""
        place = slice(self.offsets[term], self.offsets[term + 1])
        return self.rows[place], self.frequencies[place]


def _offsets(df: Int[np.ndarray, "V"]) -> Int64[np.ndarray, "_"]:
    return np.concatenate([[0], np.cumsum(df)]).astype(np.int64)


def _smallest(frequencies: Int[np.ndarray, "P"]) -> UInt[np.ndarray, "P"]:
    return frequencies.astype(np.min_scalar_type(int(frequencies.max(initial=1))))


class LexicalIndex:
    """Passages by their words; see `build`, `load`. Searches may run in several threads, `add` not beside them."""

    def __init__(self, analyzer: Analyzer, terms: Iterable[str], postings: Postings):
        """`terms[v]` is the term that `postings` has under v."""
        self.analyzer, self.postings = analyzer, postings
        self._vocabulary = {term: number for number, term in enumerate(terms)}
        self._scorer: _Scorer | None = None  # of the latest weights

    @staticmethod
    def build(
        texts: Iterable[str], analyzer: Analyzer, progress: Callable[[int], object] = lambda done: None
    ) -> "LexicalIndex":
        """The index of the texts, one passage each, empty ones too. `progress` hears how many are done."""
        nothing = Postings.count(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
        index = LexicalIndex(analyzer, [], nothing)
        index.add(texts, progress)
        return index

    def add(self, texts: Iterable[str], progress: Callable[[int], object] = lambda done: None) -> None:
        """Append passages: the same index as one built of all texts at once. Copies the postings once."""
        ids, lengths = self.analyzer.encode(_watched(texts, progress), self._vocabulary)
        self.postings = self.postings.followed_by(Postings.count(ids, lengths, len(self._vocabulary)))
        self._scorer = None

    def __len__(self) -> int:
        return len(self.postings.lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of the arrays, as in memory so on disk; the words, and what searches keep, come on top."""
        return sum(getattr(self.postings, field.name).nbytes for field in fields(Postings))

    @property
    def average_length(self) -> float:
        """Terms of an average passage; 1 where none has any."""
        return mean_length(self.postings.lengths)

    def save(self, folder: Path) -> None:
        """Write into an existing folder; for one that appears whole or not at all, rag.runtime.files.atomic_folder."""
        for field in fields(Postings):
            np.save(folder / f"{field.name}.npy", getattr(self.postings, field.name))
        meta = {"format": FORMAT, "analyzer": asdict(self.analyzer), "terms": list(self._vocabulary)}
        (folder / _META).write_text(json.dumps(meta))

    @staticmethod
    def load(folder: Path) -> "LexicalIndex":
        """The index that `save` wrote, its arrays mapped into memory. UserError where there is none."""
        try:
            meta = json.loads((folder / _META).read_text())
            # np.asarray: a plain view of the map, which costs nothing to slice
            arrays = [
                np.asarray(np.load(folder / f"{field.name}.npy", mmap_mode="r")) for field in fields(Postings)
            ]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} holds no whole lexical index ({error}): build it again.") from error
        if meta.get("format") != FORMAT:
            raise UserError(f"{folder} holds a lexical index of another format: build it again.")
        return LexicalIndex(Analyzer(**meta["analyzer"]), meta["terms"], Postings(*arrays))

    def search(self, questions: Sequence[str], k: int, weights: Weights) -> list[Found]:
        """For each question its k best passages: scores, best first, and rows; the lower row wins a tie.

        Exact, and only passages that share a term with the question, so there may be fewer than k, or none. A
        term that the question repeats counts each time. Where a variant gives something for absent terms too,
        it is in the scores, but passages with nothing but absent terms are not: they would all tie. UserError
        for k < 1.
        """
        if k < 1:
            raise UserError(f"Cannot return {k} results: ask for k of 1 or more.")
        scorer = self._scorer
        if scorer is None or scorer.weights != weights:
            self._scorer = scorer = _Scorer(self.postings, weights)
        return [scorer.search(Counter(self._ids(question)), k) for question in questions]

    def features(
        self, question: str, rows: Int[np.ndarray, "C"]
    ) -> tuple[Int32[np.ndarray, "T C"], Int32[np.ndarray, "T"], Int32[np.ndarray, "C"]]:
        """What weighting.bm25_scores needs of the passages `rows`: frequencies, document frequencies, lengths.

        T runs over the known terms of the question, repeated where they are.
        """
        ids = self._ids(question)
        tf = np.zeros((len(ids), len(rows)), np.int32)
        for one, term in zip(tf, ids, strict=True):
            owners, frequencies = self.postings.of(term)
            places = np.minimum(np.searchsorted(owners, rows), len(owners) - 1)
            one[:] = np.where(owners[places] == rows, frequencies[places], 0)
        df = np.diff(self.postings.offsets)[ids].astype(np.int32)
        return tf, df, self.postings.lengths[rows]

    def _ids(self, question: str) -> list[int]:
        known = self._vocabulary
        return [known[term] for term in self.analyzer.tokens(question) if term in known]


def _watched(texts: Iterable[str], progress: Callable[[int], object]) -> Iterator[str]:
    done = 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % _REPORTED == 0:
            progress(done)
    progress(done)


class _Scorer:
    """Searches with one choice of weights; keeps what the terms so far are worth, 4 bytes a posting."""

    def __init__(self, postings: Postings, weights: Weights):
        self.weights, self._postings = weights, postings
        self._df = np.diff(postings.offsets)
        self._norm = weights.normaliser(self._df, postings.rows, postings.frequencies, postings.lengths)
        self._impacts: dict[int, Impact] = {}

    def search(self, counts: dict[int, int], k: int) -> Found:
        """The k best passages for a question that has the term v counts[v] times."""
        if not counts:
            return np.zeros(0, np.float32), np.zeros(0, np.int32)
        n, terms = len(self._norm), np.fromiter(counts, np.int64, len(counts))
        numbers = np.fromiter(counts.values(), np.int64, len(counts))
        factors, constant = self.weights.question(numbers, self._df[terms], n)
        group = _group(n, k)
        scores = np.zeros(-(-n // group) * group, np.float32)
        for term, factor in zip(counts, factors.tolist(), strict=True):
            if factor:
                self._sum(scores, term, factor)
        found, rows = _best(scores, group, k, np.float32(constant))
        if len(rows) < min(k, n):
            rows = np.concatenate([rows, self._worthless(counts, rows)])[:k]
            found = np.pad(found, (0, len(rows) - len(found)), constant_values=constant)
        return found, rows

    def _sum(self, scores: Float32[np.ndarray, "_"], term: int, factor: float) -> None:
        if term not in self._impacts:
            self._impacts[term] = self._impact(term)
        rows, impact = self._impacts[term]
        if factor != 1:
            impact = impact * factor
        if rows is None:
            scores[: len(impact)] += impact
        else:
            np.add.at(scores, rows, impact)

    def _impact(self, term: int) -> Impact:
        """Passages and what the term adds to each; None with a whole row for a term that many have."""
        rows, frequencies = self._postings.of(term)
        n = len(self._norm)
        impact = self.weights.impact(frequencies, self._norm[rows], len(rows), n)
        if _DENSE * len(rows) <= n:
            return rows, impact
        whole = np.zeros(n, np.float32)
        whole[rows] = impact
        return None, whole

    def _worthless(self, terms: Iterable[int], found: Int32[np.ndarray, "_"]) -> Int32[np.ndarray, "_"]:
        """Passages that share only terms of no weight, such as Robertson gives those of every second passage."""
        return np.setdiff1d(np.concatenate([self._postings.of(term)[0] for term in terms]), found)


def _group(n: int, k: int) -> int:
    """About the square root of n / k, so that there are as many maxima as members to choose from."""
    return 1 << ((n // k).bit_length() // 2)


def _best(scores: Float32[np.ndarray, "_"], group: int, k: int, constant: np.float32) -> Found:
    """The k highest scores above zero, each with the constant added, and their rows; the lower row wins a tie.

    A group is a column of the scores written as a table of `group` lines, so that maxima are found by whole
    lines. At least k scores reach the k-th highest maximum, and only groups with such a maximum hold them.
    """
    table = scores.reshape(group, -1)
    maxima = table.max(axis=0)
    width, least = len(maxima), _LEAST
    if k < width:
        kth = np.partition(maxima, width - k)[width - k]
        least = max(least, kth - np.spacing(kth + constant))  # what the sum's rounding could make a tie
    columns = np.flatnonzero(maxima >= least)
    lines, places = np.nonzero(table[:, columns] >= least)
    rows = lines * width + columns[places]
    found = scores[rows] + constant
    best = np.lexsort((rows, -found))[:k]
    return found[best], rows[best].astype(np.int32)
