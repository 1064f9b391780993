"""BM25: ours beside bm25s with numpy, on the same words of documentation that this machine has.

Both are given texts and questions, so splitting them into words counts. bm25s weights its words once, while
building, for one k1 and b; ours when a word is first searched for: the case `new k1` is the price of that. With
JAX installed bm25s picks the best passages by JAX unless told otherwise, so it has two columns. Before anything
is timed, the five variants' scores must agree with those of bm25s to 1e-5. Recall, which must be 1, is counted
against sums in float64 over the words in a row: of the k returned, how many score no less than the true k-th.

Letters: N passages, Q questions.
"""

import gzip
import logging
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from typing import get_args

import numpy as np
from jaxtyping import Float64

from rag.bench.timing import Row, alternate, ratio
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights, Variant
from rag.runtime.measurement import Timing
from rag.runtime.options import Count, Counts, Filled, check_fields
from rag.types import UserError

_QUOTED = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.S)  # a Python file's docstrings, nearly
_TEXT = {".md", ".rst", ".txt"}
_QUESTION_WORDS = 10
_CHECKED = 5_000  # passages on which all variants are compared
_DIFFERENCE = 1e-5  # relative, of a score
_TIE = 1e-6


@dataclass(frozen=True)
class LexicalBenchmark:
    """bench=lexical: milliseconds a question, one at a time and all in one call."""

    documents: Sequence[Filled] = ()  # folders; none: this Python's library and its packages
    passages: Count = 100_000
    words: Count = 80
    queries: Count = 64
    k: Counts = (10, 100)
    stemmer: Filled | None = None
    repeats: Count = 7

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        texts = self._texts()
        questions = _questions(texts, self.queries)
        analyzer = Analyzer(stemmer=self.stemmer)
        theirs = _peer(self.stemmer)
        rows = self._agreement(texts[:_CHECKED], questions, analyzer, theirs) if theirs else []
        ours, peer, built = self._build(texts, analyzer, theirs)
        exact = _exact(texts, questions, analyzer)
        for k in self.k:
            rows += self._search(ours, peer, questions, k, exact)
        return [*rows, built]

    def _texts(self) -> list[str]:
        folders = self.documents or [sysconfig.get_path("stdlib"), sysconfig.get_path("purelib")]
        texts = list(islice(_passages([Path(folder) for folder in folders], self.words), self.passages))
        if len(texts) < max(self.k):
            raise UserError(
                f"bench.documents has {len(texts)} passages of {self.words} words: name folders with more text."
            )
        if len(texts) < self.passages:
            print(f"there are only {len(texts)} passages: name more folders in documents", file=sys.stderr)
        return texts

    def _agreement(self, texts, questions, analyzer: Analyzer, theirs: "type[_BM25S]") -> list[Row]:
        """How far scores are from those of bm25s, for each variant. RuntimeError beyond 1e-5."""
        index = LexicalIndex.build(texts, analyzer)
        rows = []
        for variant in get_args(Variant):
            peer = theirs(texts, variant)
            found = index.search(questions, max(self.k), BM25Weights(variant))
            worst = max(
                _difference(scores, passages, peer.scores(question))
                for question, (scores, passages) in zip(questions, found, strict=True)
                if len(passages)
            )
            if not worst <= _DIFFERENCE:
                raise RuntimeError(f"{variant}: scores differ from those of bm25s by {worst:.2g}")
            rows.append(Row(f"{variant} N={len(texts)}", {"difference": worst}))
        return rows

    def _build(self, texts, analyzer: Analyzer, theirs: "type[_BM25S] | None"):
        """Both indexes, and the row of what building them took."""
        made: dict[str, object] = {}
        calls = {"ours": lambda: made.update(ours=LexicalIndex.build(texts, analyzer))}
        if theirs:
            calls["bm25s"] = lambda: made.update(bm25s=theirs(texts, "lucene"))
        timings = alternate(calls, repeats=2, warmup=0)
        figures = {
            name: {"ms": 1000 * timings[name].median, "MB": made[name].nbytes / 1e6} for name in timings
        }
        mine = figures.pop("ours")
        ratios = {name: ratio(timings["ours"], timings[name]) for name in figures}
        return made["ours"], made.get("bm25s"), Row(f"build N={len(texts)}", mine, figures, ratios)

    def _search(self, ours: LexicalIndex, peer: "_BM25S | None", questions, k: int, exact) -> list[Row]:
        weights, fresh = BM25Weights(), (BM25Weights(k1=1.5 + step / 1024) for step in count(1))
        batch: dict[str, Callable] = {
            "ours": lambda asked: [rows for _, rows in ours.search(asked, k, weights)]
        }
        if peer:
            batch["bm25s"] = lambda asked: peer.search(asked, k, "numpy")
            batch["bm25s+jax"] = lambda asked: peer.search(asked, k, "jax")
        one = {name: _one_at_a_time(find) for name, find in batch.items()}
        case = f"N={len(ours)} k={k}"
        # by itself, since ours keeps what words are worth for the latest weights only
        first = alternate({"ours": lambda: ours.search(questions, k, next(fresh))}, repeats=self.repeats)[
            "ours"
        ]
        return [
            self._row(f"{case} one at a time", one, questions, k, exact),
            self._row(f"{case} all at once", batch, questions, k, exact),
            Row(f"{case} all at once, new k1", {"ms": self._ms(first)}),
        ]

    def _row(self, case: str, find: dict[str, Callable], questions, k: int, exact) -> Row:
        timings = alternate(
            {name: lambda f=f: f(questions) for name, f in find.items()}, repeats=self.repeats
        )
        figures = {
            name: {"ms": self._ms(timing), "recall": _recall(exact, find[name](questions), k)}
            for name, timing in timings.items()
        }
        mine = figures.pop("ours")
        if mine["recall"] < 1:
            raise RuntimeError(f"{case}: ours misses some of the best passages, recall {mine['recall']:.4f}")
        return Row(case, mine, figures, {name: ratio(timings["ours"], timings[name]) for name in figures})

    def _ms(self, timing: Timing) -> float:
        return 1000 * timing.median / self.queries


def _one_at_a_time(find: Callable) -> Callable:
    return lambda questions: [find([question])[0] for question in questions]


# --- passages and questions


def _passages(folders: Sequence[Path], words: int) -> Iterator[str]:
    """Consecutive runs of so many words of every text file below the folders, each file's text once."""
    seen = set()
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if not path.is_file() or (text := _text(path)) in seen:
                continue
            seen.add(text)
            split = text.split()
            for start in range(0, len(split) - words + 1, words):
                yield " ".join(split[start : start + words])


def _text(path: Path) -> str:
    """The prose of a file, as far as its name promises any."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode(errors="replace")
    if path.suffix in _TEXT:
        return path.read_text(errors="replace")
    if path.suffix == ".py":
        return "\n".join(one or other for one, other in _QUOTED.findall(path.read_text(errors="replace")))
    return ""


def _questions(texts: Sequence[str], number: int) -> list[str]:
    """Words that stand in a row in one of the passages."""
    rng = np.random.default_rng(0)
    questions = []
    for row in rng.integers(len(texts), size=number):
        words = texts[row].split()
        start = rng.integers(max(len(words) - _QUESTION_WORDS, 1))
        questions.append(" ".join(words[start : start + _QUESTION_WORDS]))
    return questions


# --- what is right


def _exact(texts, questions: Sequence[str], analyzer: Analyzer) -> Float64[np.ndarray, "Q N"]:
    """Lucene's BM25 in float64, counting a word by looking at all words."""
    vocabulary: dict[str, int] = {}
    ids, lengths = analyzer.encode(texts, vocabulary)
    owner = np.repeat(np.arange(len(texts), dtype=np.int32), lengths)  # of each word
    norm = 1.5 * (0.25 + 0.75 * lengths / lengths.mean())
    scores = np.zeros((len(questions), len(texts)))
    for total, question in zip(scores, questions, strict=True):
        for term in analyzer.tokens(question):
            if term in vocabulary:
                tf = np.bincount(owner[ids == vocabulary[term]], minlength=len(texts))
                df = np.count_nonzero(tf)
                total += np.log(1 + (len(texts) - df + 0.5) / (df + 0.5)) * tf / (tf + norm)
    return scores


def _recall(exact: Float64[np.ndarray, "Q N"], found: Sequence[np.ndarray], k: int) -> float:
    """Of the k best, or of all that share a word where these are fewer."""
    right = wanted = 0
    for scores, rows in zip(exact, found, strict=True):
        kth = max(np.partition(scores, -k)[-k] * (1 - _TIE), np.finfo(float).tiny)
        right += np.count_nonzero(scores[rows] >= kth)
        wanted += min(k, np.count_nonzero(scores))
    return float(right / wanted)


def _difference(scores: np.ndarray, rows: np.ndarray, theirs: np.ndarray) -> float:
    """The largest relative difference, of the same passages' scores and of the same places' in the ranking."""
    best = np.sort(theirs)[::-1][: len(scores)]
    return float(
        max(np.max(np.abs(other - scores) / np.maximum(best, 1e-30)) for other in (theirs[rows], best))
    )


# --- the peer


class _BM25S:
    """bm25s over texts, with its own words: the same pattern and stop words as ours."""

    stemmer: str | None = None

    def __init__(self, texts: Sequence[str], variant: str):
        import bm25s

        logging.getLogger("bm25s").setLevel(logging.WARNING)  # which it sets to everything on import
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25(method=variant, backend="numpy")
        self._index.index(self._tokens(texts, return_ids=True), show_progress=False)

    def _tokens(self, texts: Sequence[str], return_ids: bool = False):
        import Stemmer

        stemmer = Stemmer.Stemmer(self.stemmer) if self.stemmer else None
        return self._tokenize(
            list(texts), stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=False
        )

    @property
    def nbytes(self) -> int:
        return sum(self._index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def search(self, questions: Sequence[str], k: int, selection: str) -> Sequence[np.ndarray]:
        """The rows of each question."""
        tokens = self._tokens(questions)
        return self._index.retrieve(tokens, k=k, show_progress=False, backend_selection=selection).documents

    def scores(self, question: str) -> np.ndarray:
        """Of all passages."""
        return self._index.get_scores(self._tokens([question])[0])


def _peer(stemmer: str | None) -> type[_BM25S] | None:
    try:
        import bm25s  # noqa: F401
    except ImportError:
        print("bm25s is not installed: its columns are left out (make bench-setup)", file=sys.stderr)
        return None
    return type("_BM25S", (_BM25S,), {"stemmer": stemmer})
