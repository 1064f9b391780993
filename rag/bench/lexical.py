"""Compare our BM25 with bm25s on NumPy, over the documentation that is on this machine.

Both are given texts and questions, so tokenising is timed too. bm25s computes the weights of all words once, when it
builds the index, for one k1 and b; ours computes them when a word is first searched for: the case `new k1` shows what
that costs. With JAX installed bm25s selects the best passages with JAX by default, so it has two columns. Before
anything is timed, the scores of the five variants must agree with those of bm25s to 1e-5. Recall, which must be 1, is
computed against sums in float64: of the k returned, how many score at least as high as the true k-th.

Letters: N passages, Q questions.
"""

import gzip
import logging
import re
import sys
import sysconfig
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count, islice
from pathlib import Path
from typing import Any, get_args

import numpy as np
from jaxtyping import Float64

from rag.bench.peers import print_left_out
from rag.bench.timing import Row, alternate, ratio
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights, Variant
from rag.runtime.machine.measurement import Timing
from rag.runtime.options import Count, Counts, Filled, check_fields
from rag.types import UserError

Find = Callable[[Sequence[str]], Sequence[np.ndarray]]  # questions -> the rows of each one's best passages
MakePeer = Callable[[Sequence[str], str], "_BM25S"]  # texts, variant of BM25

_QUOTED = re.compile(r'"""(.*?)"""|\'\'\'(.*?)\'\'\'', re.S)  # a Python file's docstrings, nearly
_TEXT = {".md", ".rst", ".txt"}
_QUESTION_WORDS = 10
_CHECKED = 5_000  # passages on which all variants are compared
_DIFFERENCE = 1e-5  # relative, of a score
_TIE = 1e-6


@dataclass(frozen=True)
class LexicalBenchmark:
    """Measure milliseconds per question, one at a time and all in one call; defaults: conf/bench/lexical.yaml."""

    documents: Sequence[Filled]
    passages: Count
    words: Count
    queries: Count
    k: Counts
    stemmer: Filled | None
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return rows of score agreement, search and building. Raises RuntimeError for wrong scores or results."""
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

    def _agreement(
        self, texts: list[str], questions: list[str], analyzer: Analyzer, theirs: "MakePeer"
    ) -> list[Row]:
        """Return each variant's largest difference of scores from bm25s. Raises RuntimeError beyond 1e-5."""
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

    def _build(
        self, texts: list[str], analyzer: Analyzer, theirs: "MakePeer | None"
    ) -> tuple[LexicalIndex, "_BM25S | None", Row]:
        """Build both indexes and return them with the row of what that took."""
        ours: list[LexicalIndex] = []
        peers: list[_BM25S] = []
        calls = {"ours": lambda: ours.append(LexicalIndex.build(texts, analyzer))}
        if theirs:
            calls["bm25s"] = lambda: peers.append(theirs(texts, "lucene"))
        timings = alternate(calls, repeats=2, warmup=0)
        nbytes = {"ours": ours[-1].nbytes} | ({"bm25s": peers[-1].nbytes} if peers else {})
        figures = {
            name: {"ms": 1000 * timing.median, "MB": nbytes[name] / 1e6} for name, timing in timings.items()
        }
        mine = figures.pop("ours")
        ratios = {name: ratio(timings["ours"], timings[name]) for name in figures}
        row = Row(f"build N={len(texts)}", mine, figures, ratios)
        return ours[-1], peers[-1] if peers else None, row

    def _search(
        self,
        ours: LexicalIndex,
        peer: "_BM25S | None",
        questions: list[str],
        k: int,
        exact: Float64[np.ndarray, "Q N"],
    ) -> list[Row]:
        weights, fresh = BM25Weights(), (BM25Weights(k1=1.5 + step / 1024) for step in count(1))
        batch: dict[str, Find] = {"ours": lambda asked: [rows for _, rows in ours.search(asked, k, weights)]}
        if peer:
            batch["bm25s"] = lambda asked: peer.search(asked, k, "numpy")
            batch["bm25s+jax"] = lambda asked: peer.search(asked, k, "jax")
        one = {name: _one_at_a_time(find) for name, find in batch.items()}
        case = f"N={len(ours)} k={k}"
        # alone, since ours caches word weights for the latest k1 and b only
        first = alternate({"ours": lambda: ours.search(questions, k, next(fresh))}, repeats=self.repeats)[
            "ours"
        ]
        return [
            self._row(f"{case} one at a time", one, questions, k, exact),
            self._row(f"{case} all at once", batch, questions, k, exact),
            Row(f"{case} all at once, new k1", {"ms": self._ms(first)}),
        ]

    def _row(
        self,
        case: str,
        find: dict[str, Find],
        questions: list[str],
        k: int,
        exact: Float64[np.ndarray, "Q N"],
    ) -> Row:
        calls = {name: partial(call, questions) for name, call in find.items()}
        timings = alternate(calls, repeats=self.repeats)
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


def _one_at_a_time(find: Find) -> Find:
    return lambda questions: [find([question])[0] for question in questions]


# --- passages and questions


def _passages(folders: Sequence[Path], words: int) -> Iterator[str]:
    """Yield consecutive passages of `words` words from every text file below the folders, equal files once."""
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
    """Return the prose of a file; empty where its suffix is of another kind."""
    if path.suffix == ".gz":
        return gzip.decompress(path.read_bytes()).decode(errors="replace")
    if path.suffix in _TEXT:
        return path.read_text(errors="replace")
    if path.suffix == ".py":
        return "\n".join(one or other for one, other in _QUOTED.findall(path.read_text(errors="replace")))
    return ""


def _questions(texts: Sequence[str], number: int) -> list[str]:
    """Return `number` questions, each of consecutive words of a random passage."""
    rng = np.random.default_rng(0)
    questions = []
    for row in rng.integers(len(texts), size=number):
        words = texts[row].split()
        start = rng.integers(max(len(words) - _QUESTION_WORDS, 1))
        questions.append(" ".join(words[start : start + _QUESTION_WORDS]))
    return questions


# --- exact results


def _exact(texts: Sequence[str], questions: Sequence[str], analyzer: Analyzer) -> Float64[np.ndarray, "Q N"]:
    """Compute Lucene's BM25 in float64 by brute force."""
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
    """Return the recall of the k best, or of all passages that share a word where these are fewer."""
    right = wanted = 0
    for scores, rows in zip(exact, found, strict=True):
        kth = max(np.partition(scores, -k)[-k] * (1 - _TIE), np.finfo(float).tiny)
        right += int(np.count_nonzero(scores[rows] >= kth))
        wanted += min(k, int(np.count_nonzero(scores)))
    return right / wanted


def _difference(scores: np.ndarray, rows: np.ndarray, theirs: np.ndarray) -> float:
    """Return the largest relative difference of scores, passage by passage and rank by rank."""
    best = np.sort(theirs)[::-1][: len(scores)]
    return float(
        max(np.max(np.abs(other - scores) / np.maximum(best, 1e-30)) for other in (theirs[rows], best))
    )


# --- the peer


class _BM25S:
    """An index of bm25s, which tokenises by itself: with the same pattern and stop words as ours."""

    def __init__(self, texts: Sequence[str], variant: str, stemmer: str | None):
        import bm25s

        self._stemmer = stemmer
        logging.getLogger("bm25s").setLevel(logging.WARNING)  # it logs everything by default
        self._tokenize = bm25s.tokenize
        self._index = bm25s.BM25(method=variant, backend="numpy")
        self._index.index(self._tokens(texts, return_ids=True), show_progress=False)

    def _tokens(self, texts: Sequence[str], return_ids: bool = False) -> Any:
        import Stemmer

        stemmer = Stemmer.Stemmer(self._stemmer) if self._stemmer else None
        return self._tokenize(
            list(texts), stopwords="en", stemmer=stemmer, return_ids=return_ids, show_progress=False
        )

    @property
    def nbytes(self) -> int:
        return sum(self._index.scores[name].nbytes for name in ("data", "indices", "indptr"))

    def search(self, questions: Sequence[str], k: int, selection: str) -> Sequence[np.ndarray]:
        """Return the rows of the k best passages of each question."""
        tokens = self._tokens(questions)
        return self._index.retrieve(tokens, k=k, show_progress=False, backend_selection=selection).documents

    def scores(self, question: str) -> np.ndarray:
        """Return the scores of all passages."""
        return self._index.get_scores(self._tokens([question])[0])


def _peer(stemmer: str | None) -> "MakePeer | None":
    """Return what builds an index of bm25s; None, and a line on stderr, where it is not installed."""
    try:
        import bm25s  # noqa: F401
    except ImportError:
        print_left_out("bm25s", "it is not installed (make bench-setup)")
        return None
    return partial(_BM25S, stemmer=stemmer)
