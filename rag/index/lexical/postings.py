"""Search by words: an inverted index of counts, weighted when it is searched.

    N passages (rows), V terms, T terms of a question, C candidates; a posting is a term in a passage

For every term it has the passages that contain it, in order, and the frequencies. A score is a sum over the terms of a
question (rag.index.lexical.weighting); a term's summand for each passage is computed when it is first needed and cached
while the searches use the same weights. Summing is a scatter, which takes 1.4 ns a posting in numpy and 8.5 in XLA on
CPU, and the best of a row of scores are found in 20 us where lax.top_k takes 200 (100,000 passages), so nothing here
runs in JAX.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32, Int, Int32, Int64, UInt

from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import Weights, mean_length
from rag.runtime.records import Record, read_record
from rag.runtime.shapes import power_of_two_near_sqrt, round_up
from rag.types import UserError

FORMAT = 1  # of the folder's contents
_META = "lexical.json"
_DENSE = 8  # a term in more than one of so many passages gets a dense row: 10 us to add, not 17 or more
_REPORTED = 4096  # texts between two calls of `progress`
_SMALLEST = np.finfo(np.float32).smallest_subnormal  # score above zero

Found = tuple[Float32[np.ndarray, "_"], Int32[np.ndarray, "_"]]
Impact = tuple[Int32[np.ndarray, "_"] | None, Float32[np.ndarray, "_"]]


class _Meta(Record):
    """The JSON file beside the arrays of an index."""

    format: int
    analyzer: dict[str, Any]
    terms: list[str]


@dataclass(frozen=True, eq=False)
class Postings:
    """The passages and frequencies of every term; those of term v are at offsets[v]:offsets[v + 1], rows ascending."""

    offsets: Int64[np.ndarray, "_"]
    rows: Int32[np.ndarray, "postings"]
    frequencies: UInt[np.ndarray, "postings"]  # of the smallest dtype that holds the largest
    lengths: Int32[np.ndarray, "N"]  # terms of each passage

    @staticmethod
    def count(ids: Int32[np.ndarray, "_"], lengths: Int32[np.ndarray, "N"], terms: int) -> "Postings":
        """Count the term ids of all passages, one passage after another, each id below `terms`."""
        n = max(len(lengths), 1)
        keys = np.sort(ids.astype(np.int64) * n + np.repeat(np.arange(len(lengths)), lengths))
        starts = np.flatnonzero(np.diff(keys, prepend=-1))
        term, rows = np.divmod(keys[starts], n)
        frequencies = _smallest(np.diff(starts, append=len(keys)))
        return Postings(
            _offsets(np.bincount(term, minlength=terms)), rows.astype(np.int32), frequencies, lengths
        )

    def followed_by(self, more: "Postings") -> "Postings":
        """Return the postings of these passages and then those of `more`, which may have further terms."""
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
        """Return the term's passages and its frequencies there."""
        part = slice(self.offsets[term], self.offsets[term + 1])
        return self.rows[part], self.frequencies[part]


def _offsets(df: Int[np.ndarray, "V"]) -> Int64[np.ndarray, "_"]:
    return np.concatenate([[0], np.cumsum(df)]).astype(np.int64)


def _smallest(frequencies: Int[np.ndarray, "postings"]) -> UInt[np.ndarray, "postings"]:
    return frequencies.astype(np.min_scalar_type(int(frequencies.max(initial=1))))


class LexicalIndex:
    """An inverted index of passages, made by `build` or `load`.

    Searches may run in several threads, but not while `add` runs.

    Args:
        analyzer: makes the terms of passages and questions.
        terms: terms[v] is the term v of the postings.
        postings: of all passages.
    """

    def __init__(self, analyzer: Analyzer, terms: Iterable[str], postings: Postings):
        self.analyzer, self.postings = analyzer, postings
        self._vocabulary = {term: number for number, term in enumerate(terms)}
        self._weighted: _WeightedPostings | None = None  # of the latest weights

    @staticmethod
    def build(
        texts: Iterable[str], analyzer: Analyzer, progress: Callable[[int], object] = lambda done: None
    ) -> "LexicalIndex":
        """Return the index of the texts, one passage each, also empty ones; `progress` gets the number done so far."""
        nothing = Postings.count(np.zeros(0, np.int32), np.zeros(0, np.int32), 0)
        index = LexicalIndex(analyzer, [], nothing)
        index.add(texts, progress)
        return index

    def add(self, texts: Iterable[str], progress: Callable[[int], object] = lambda done: None) -> None:
        """Append passages; the index is then the same as one built of all texts at once. Copies the postings."""
        ids, lengths = self.analyzer.encode(_watched(texts, progress), self._vocabulary)
        self.postings = self.postings.followed_by(Postings.count(ids, lengths, len(self._vocabulary)))
        self._weighted = None

    def __len__(self) -> int:
        return len(self.postings.lengths)

    @property
    def nbytes(self) -> int:
        """Return the bytes of the arrays, in memory and on disk, without the words and what searches cache."""
        return sum(getattr(self.postings, field.name).nbytes for field in fields(Postings))

    @property
    def average_length(self) -> float:
        """Return the terms of an average passage; 1 where none has any."""
        return mean_length(self.postings.lengths)

    def save(self, folder: Path) -> None:
        """Write the index into an existing folder (rag.runtime.files.atomic_folder makes one that is never partial)."""
        for field in fields(Postings):
            np.save(folder / f"{field.name}.npy", getattr(self.postings, field.name))
        meta = _Meta(format=FORMAT, analyzer=asdict(self.analyzer), terms=list(self._vocabulary))
        (folder / _META).write_text(meta.model_dump_json())

    @staticmethod
    def load(folder: Path) -> "LexicalIndex":
        """Return the index that `save` wrote, its arrays memory-mapped. Raises UserError where there is none."""
        try:
            meta = read_record(folder / _META, _Meta, "build the index again")
            # np.asarray: a plain array over the memory map, which is faster to slice
            arrays = [
                np.asarray(np.load(folder / f"{field.name}.npy", mmap_mode="r")) for field in fields(Postings)
            ]
        except (OSError, ValueError, EOFError) as error:
            raise UserError(f"{folder} holds no whole lexical index ({error}): build it again.") from error
        if meta.format != FORMAT:
            raise UserError(f"{folder} holds a lexical index of another format: build it again.")
        return LexicalIndex(Analyzer(**meta.analyzer), meta.terms, Postings(*arrays))

    def search(self, questions: Sequence[str], k: int, weights: Weights) -> list[Found]:
        """Return the k best passages of each question: scores, best first, and rows; the lower row wins a tie.

        The search is exact. Only passages that share a term with the question are found, so there may be fewer than k,
        or none. A term that the question repeats counts each time. What a variant gives for absent terms is in the
        scores, but passages with none of the terms are not found: they would all tie. Raises UserError for k < 1.
        """
        if k < 1:
            raise UserError(f"Cannot return {k} results: ask for k of 1 or more.")
        weighted = self._weighted
        if weighted is None or weighted.weights != weights:
            self._weighted = weighted = _WeightedPostings(self.postings, weights)
        return [weighted.search(Counter(self._ids(question)), k) for question in questions]

    def features(
        self, question: str, rows: Int[np.ndarray, "C"]
    ) -> tuple[Int32[np.ndarray, "T C"], Int32[np.ndarray, "T"], Int32[np.ndarray, "C"]]:
        """Return the arguments of weighting.bm25_scores for the passages `rows`.

        They are the frequencies, the document frequencies and the lengths. T runs over the known terms of the question,
        repeated where the question repeats them.
        """
        ids = self._ids(question)
        tf = np.zeros((len(ids), len(rows)), np.int32)
        for one, term in zip(tf, ids, strict=True):
            owners, frequencies = self.postings.of(term)
            positions = np.minimum(np.searchsorted(owners, rows), len(owners) - 1)
            one[:] = np.where(owners[positions] == rows, frequencies[positions], 0)
        df = np.diff(self.postings.offsets)[ids].astype(np.int32)
        return tf, df, self.postings.lengths[rows]

    def _ids(self, question: str) -> list[int]:
        known = self._vocabulary
        return [known[term] for term in self.analyzer.tokens(question) if term in known]


def _watched(texts: Iterable[str], progress: Callable[[int], object]) -> Iterator[str]:
    """Yield the texts and report how many were yielded."""
    done = 0
    for done, text in enumerate(texts, 1):
        yield text
        if done % _REPORTED == 0:
            progress(done)
    progress(done)


class _WeightedPostings:
    """Search with one choice of weights; caches the impacts of the terms asked so far, 4 bytes a posting."""

    def __init__(self, postings: Postings, weights: Weights):
        self.weights, self._postings = weights, postings
        self._df = np.diff(postings.offsets)
        self._norm = weights.normaliser(self._df, postings.rows, postings.frequencies, postings.lengths)
        self._impacts: dict[int, Impact] = {}

    def search(self, counts: dict[int, int], k: int) -> Found:
        """Return the k best passages for a question that contains the term v counts[v] times."""
        if not counts:
            return np.zeros(0, np.float32), np.zeros(0, np.int32)
        n, terms = len(self._norm), np.fromiter(counts, np.int64, len(counts))
        numbers = np.fromiter(counts.values(), np.int64, len(counts))
        factors, constant = self.weights.question(numbers, self._df[terms], n)
        group = power_of_two_near_sqrt(n // k)  # so that there are as many maxima as members to choose from
        scores = np.zeros(round_up(n, group), np.float32)
        for term, factor in zip(counts, factors.tolist(), strict=True):
            if factor:
                self._sum(scores, term, factor)
        found, rows = _best(scores, group, k, np.float32(constant))
        if len(rows) < min(k, n):
            rows = np.concatenate([rows, self._zero_scored(counts, rows)])[:k]
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
        """Return the term's passages and what it adds to each; (None, an array of all passages) where many have it."""
        rows, frequencies = self._postings.of(term)
        n = len(self._norm)
        impact = self.weights.impact(frequencies, self._norm[rows], len(rows), n)
        if _DENSE * len(rows) <= n:
            return rows, impact
        dense = np.zeros(n, np.float32)
        dense[rows] = impact
        return None, dense

    def _zero_scored(self, terms: Iterable[int], found: Int32[np.ndarray, "_"]) -> Int32[np.ndarray, "_"]:
        """Return the passages that share only terms of weight 0: Robertson's idf of a term in half of the passages."""
        return np.setdiff1d(np.concatenate([self._postings.of(term)[0] for term in terms]), found)


def _best(scores: Float32[np.ndarray, "_"], group: int, k: int, constant: np.float32) -> Found:
    """Return the k highest scores above zero, each with the constant added, and their rows; the lower row wins a tie.

    A group is a column of the scores in a table of `group` lines, so that maxima are taken over whole lines. At least k
    scores reach the k-th highest maximum, and only groups with such a maximum contain them.
    """
    table = scores.reshape(group, -1)
    maxima = table.max(axis=0)
    width, least = len(maxima), _SMALLEST
    if k < width:
        kth = np.partition(maxima, width - k)[width - k]
        least = max(least, kth - np.spacing(kth + constant))  # what the sum's rounding could make a tie
    columns = np.flatnonzero(maxima >= least)
    lines, positions = np.nonzero(table[:, columns] >= least)
    rows = lines * width + columns[positions]
    found = scores[rows] + constant
    best = np.lexsort((rows, -found))[:k]
    return found[best], rows[best].astype(np.int32)
