"""Text to terms, the words that a lexical index counts: lower-cased, split, stop words out, stemmed.

The steps and their order are those of bm25s and scikit-learn, so that scores can be compared: lower-case, find
words by a regular expression, drop stop words, stem what is left.

    P tokens of all texts in a row, N texts
"""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Literal

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
_STOP = -1  # the id of a word that counts for nothing
_BATCH = 1 << 20  # tokens that wait as Python objects


@dataclass(frozen=True)
class Analyzer:
    """How a text becomes terms. Two indexes with equal analyzers count the same words.

    `pattern` finds the words in the lower-cased text. `stemmer` is a Snowball language ("english", "german",
    ...; needs PyStemmer) or None. `stop_words` is "english" (ENGLISH_STOP_WORDS), words of your own, or None.
    `cjk` splits Han and kana into overlapping pieces of so many characters (Lucene's CJKAnalyzer: 2; a lone
    character stays one); at 0 a run of them is one word. UserError for a value that none of this fits.
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
        """The terms of a text, in its order, each as often as it occurs."""
        words = [word for word in self._words(text) if word not in self._stops]
        return words if self.stemmer is None else _stemmer(self.stemmer).stemWords(words)

    def encode(
        self, texts: Iterable[str], vocabulary: dict[str, int]
    ) -> tuple[Int32[np.ndarray, "P"], Int32[np.ndarray, "N"]]:
        """The term ids of all texts in a row, and how many each text has; new terms join `vocabulary`.

        The same terms as `tokens` finds. A distinct word is looked at once, however often it occurs.
        """
        lookup = _Ids(self._stops, self.stemmer, vocabulary).__getitem__
        blocks, block, ends, done = [np.zeros(0, np.int32)], [], [0], 0
        for text in texts:
            block.extend(map(lookup, self._words(text)))
            ends.append(done + len(block))
            if len(block) >= _BATCH:
                blocks.append(np.array(block, np.int32))
                done += len(block)
                block = []
        ids = np.concatenate([*blocks, np.array(block, np.int32)])
        kept = np.concatenate([[0], np.cumsum(ids != _STOP)])[ends]
        return ids[ids != _STOP], np.diff(kept).astype(np.int32)

    def _words(self, text: str) -> list[str]:
        text = text.lower()
        return self._find(_CJK_RUN.sub(self._pieces, text) if self.cjk else text)

    def _pieces(self, run: re.Match) -> str:
        """A run of characters as its overlapping pieces, set off by spaces."""
        size, text = min(self.cjk, len(run[0])), run[0]
        return " ".join(["", *(text[i : i + size] for i in range(len(text) - size + 1)), ""])

    @cached_property
    def _find(self) -> Callable[[str], list[str]]:
        pattern = self.pattern
        if (
            pattern == WORDS
        ):  # a greedy run ends at a word boundary anyway: without asking it is 1.4 times faster
            pattern = r"\w\w+"
        return re.compile(f"{pattern}|[{_CJK}]" if self.cjk else pattern).findall

    @cached_property
    def _stops(self) -> frozenset[str]:
        words = ENGLISH_STOP_WORDS if self.stop_words == "english" else self.stop_words or ()
        return frozenset(word.lower() for word in words)


class _Ids(dict):
    """Word -> id of its term, worked out when the word is first seen."""

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
def _stemmer(language: str):
    """The Snowball stemmer of a language. UserError when there is none, or no PyStemmer."""
    try:
        import Stemmer
    except ImportError as error:
        raise UserError(
            f"stemmer={language} needs PyStemmer: pip install PyStemmer, or stemmer=null."
        ) from error
    if language not in Stemmer.algorithms():
        raise UserError(f"There is no stemmer {language!r}: choose one of {', '.join(Stemmer.algorithms())}.")
    return Stemmer.Stemmer(language, 0)  # without its cache: words come once
