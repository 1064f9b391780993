"""Analyze text into terms, the words that a lexical index counts.

The steps and their order are those of bm25s and scikit-learn, so that scores can be compared: lower-case, find words
by a regular expression, drop stop words, stem the rest.

    N texts; terms: those of all texts, one text after another
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any, Literal

import numpy as np
from jaxtyping import Int32

from rag.runtime.options import Filled, Whole, check_fields
from rag.types import UserError

WORDS = r"(?u)\b\w\w+\b"  # runs of two or more letters, digits and underscores, as scikit-learn finds them

# The 33 words that Lucene's EnglishAnalyzer drops, and bm25s with it.
ENGLISH_STOP_WORDS = tuple(
    "a an and are as at be but by for if in into is it no not of on or such that the their then there these they "
    "this to was will with".split()
)

# Scripts that write no spaces between words: kana, and Han with its extensions.
_CJK = (
    "\u3005-\u3007\u3041-\u309f\u30a1-\u30fa\u30fc-\u30ff\u31f0-\u31ff\uff66-\uff9f"
    "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U000323af"
)
_CJK_RUN = re.compile(f"[{_CJK}]+")
_STOP = -1  # the id of a stop word
_BATCH = 1 << 20  # terms that are in memory as Python objects


@dataclass(frozen=True)
class Analyzer:
    """The options of the analysis. Two indexes with equal analyzers count the same words.

    Args:
        pattern: the regular expression of a word in the lower-cased text.
        stemmer: a Snowball language ("english", "german", ...; needs PyStemmer), or None.
        stop_words: "english" (ENGLISH_STOP_WORDS), words of your own, or None.
        cjk: splits Han and kana into overlapping n-grams of so many characters (2 in Lucene's CJKAnalyzer; a single
            character stays one); at 0 a run of them is one word.

    Raises:
        UserError: for other values.
    """

    pattern: Filled = WORDS
    stemmer: Filled | None = None
    stop_words: Literal["english"] | Sequence[Filled] | None = "english"
    cjk: Whole = 0

    def __post_init__(self):
        check_fields(self)
        _check_pattern(self.pattern)
        if self.stemmer is not None:
            _stemmer(self.stemmer)

    def tokens(self, text: str) -> list[str]:
        """Return the terms of a text, in its order, each as often as it occurs."""
        words = [word for word in self._words(text) if word not in self._stops]
        return words if self.stemmer is None else _stemmer(self.stemmer).stemWords(words)

    def encode(
        self, texts: Iterable[str], vocabulary: dict[str, int]
    ) -> tuple[Int32[np.ndarray, "terms"], Int32[np.ndarray, "N"]]:
        """Return the term ids of all texts, one text after another, and how many terms each text has.

        They are the terms of `tokens`. New terms are added to `vocabulary`. Each distinct word is analyzed once.
        """
        lookup = _TermIds(self._stops, self.stemmer, vocabulary).__getitem__
        blocks, ends, done = [np.zeros(0, np.int32)], [0], 0
        block: list[int] = []
        for text in texts:
            block.extend(map(lookup, self._words(text)))
            ends.append(done + len(block))
            if len(block) >= _BATCH:
                blocks.append(np.array(block, np.int32))
                done += len(block)
                block = []
        ids = np.concatenate([*blocks, np.array(block, np.int32)])
        term_ends = np.concatenate([[0], np.cumsum(ids != _STOP)])[ends]
        return ids[ids != _STOP], np.diff(term_ends).astype(np.int32)

    def _words(self, text: str) -> list[str]:
        text = text.lower()
        return self._find(_CJK_RUN.sub(self._n_grams, text) if self.cjk else text)

    def _n_grams(self, run: re.Match) -> str:
        """Return the overlapping n-grams of a run of characters, with spaces around them."""
        size, text = min(self.cjk, len(run[0])), run[0]
        return " ".join(["", *(text[i : i + size] for i in range(len(text) - size + 1)), ""])

    @cached_property
    def _find(self) -> Callable[[str], list[str]]:
        # A greedy run ends at a word boundary anyway: without \b it is 1.4 times faster.
        pattern = r"\w\w+" if self.pattern == WORDS else self.pattern
        return re.compile(f"{pattern}|[{_CJK}]" if self.cjk else pattern).findall

    @cached_property
    def _stops(self) -> frozenset[str]:
        words = ENGLISH_STOP_WORDS if self.stop_words == "english" else self.stop_words or ()
        return frozenset(word.lower() for word in words)


class _TermIds(dict):
    """The id of each word's term, computed when the word is first looked up."""

    def __init__(self, stops: frozenset[str], stemmer: str | None, vocabulary: dict[str, int]):
        super().__init__(dict.fromkeys(stops, _STOP))
        self._stem = _stemmer(stemmer).stemWord if stemmer else None
        self._vocabulary = vocabulary

    def __missing__(self, word: str) -> int:
        term = self._stem(word) if self._stem else word
        self[word] = number = self._vocabulary.setdefault(term, len(self._vocabulary))
        return number


def _check_pattern(pattern: str) -> None:
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise UserError(f"The pattern {pattern!r} is no regular expression ({error}): correct it.") from error
    if compiled.groups:
        raise UserError(
            f"The pattern {pattern!r} has a group, which would stand for the word: write (?:...)."
        )
    if compiled.fullmatch(""):
        raise UserError(
            f"The pattern {pattern!r} matches nothing at all, which is no word: ask for a character."
        )


@lru_cache
def _stemmer(language: str) -> Any:
    """Return the Snowball stemmer of a language. Raises UserError when there is none, or no PyStemmer."""
    try:
        import Stemmer
    except ImportError as error:
        raise UserError(
            f"stemmer={language} needs PyStemmer: pip install PyStemmer, or stemmer=null."
        ) from error
    if language not in Stemmer.algorithms():
        raise UserError(f"There is no stemmer {language!r}: choose one of {', '.join(Stemmer.algorithms())}.")
    return Stemmer.Stemmer(language, 0)  # without its cache: each word is stemmed once
