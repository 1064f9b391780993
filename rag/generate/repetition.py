"""End an answer where it begins to repeat itself: small models write the same sentence again and again.

Only whole sentences and lines are compared, so the items of a list may begin alike. Nothing is compared inside fenced
code, whose lines occur twice for good reasons.
"""

import re

from rag.citations import CITATION
from rag.ingest.sentences import sentences

_MIN_LETTERS = 10  # letters and digits of a sentence; a shorter one may occur twice
_OPEN_MARK = r"\[[\s\d,;]*\Z"  # the end of a text that may become a citation mark
# Citation marks, and the bullet or number of a list item, also where they are not complete yet.
_IGNORED = re.compile(
    rf"\s*(?:{CITATION.pattern}|{_OPEN_MARK})|^\s*(?:(?:[-*+•]|\d{{1,3}}[.)])(?!\S)|\d{{1,3}}\Z)"
)
_MARKS = re.compile(rf"(?:{CITATION.pattern}\s*)*")
# A full stop that ends a sentence or not, which the word after it decides.
_UNDECIDED = re.compile(rf"[.!?…؟۔।॥።։。！？｡](?:{CITATION.pattern}|\W)*(?:\w*\Z|{_OPEN_MARK})")
_DECIDED = re.compile(rf"(?!{_OPEN_MARK})\W*\w+\W")
_FENCE = "```"


class UnrepeatedText:
    """Ends a streamed text before a sentence that it already has; holds back what may become such a sentence.

    Sentences are those of `rag.ingest.sentences` in each line. Space, case, citation marks, and the bullet or number of
    a list item make no difference. So the text does not depend on the pieces in which it arrives.
    """

    def __init__(self) -> None:
        self._known: set[str] = set()  # the normalised sentences of the text
        self._open = ""  # the sentence that is not complete
        self._shown = 0  # how many of its characters were returned
        self._in_code = False
        self.stopped = False

    def push(self, new: str) -> str:
        """Return the text that is certain now; it is empty once stopped."""
        if self.stopped:
            return ""
        self._open += new
        certain = ""
        while end := self._end():
            certain += self._complete(end)
            if self.stopped:
                return certain
        undecided = _UNDECIDED.search(self._open)
        decided = undecided.start() + 1 if undecided else len(self._open)
        if not self._may_repeat(self._open[:decided]):
            certain += self._open[self._shown : decided]
            self._shown = max(self._shown, decided)
        return certain

    def finish(self) -> str:
        """Return the text that was held back, unless it is a sentence that the text already has."""
        rest = self.push("\n")  # completes the last sentence
        return rest if self.stopped else rest[:-1]

    def _end(self) -> int:
        """Return where the open sentence and the citation marks after it certainly end; 0 where they do not yet."""
        line, newline, _ = self._open.partition("\n")
        for start, _ in sentences(line)[1:2]:
            following = _MARKS.sub("", line[start:], count=1)
            if following if newline else _DECIDED.match(following):
                return len(line) - len(following)
        return len(line) + 1 if newline else 0

    def _complete(self, end: int) -> str:
        """Return the rest of the open sentence, which ends there, or stop before it."""
        sentence, shown = self._open[:end], self._shown
        self._open, self._shown = self._open[end:], 0
        if sentence.count(_FENCE) % 2:
            self._in_code = not self._in_code
        elif not self._in_code:
            normalised = _normalise(sentence)
            self.stopped = normalised in self._known
            if sum(map(str.isalnum, normalised)) >= _MIN_LETTERS:
                self._known.add(normalised)
        return "" if self.stopped else sentence[shown:]

    def _may_repeat(self, beginning: str) -> bool:
        """Return whether a sentence with this beginning may be one that the text already has."""
        normalised = _normalise(beginning)
        return not self._in_code and any(known.startswith(normalised) for known in self._known)


def _normalise(sentence: str) -> str:
    return " ".join(_IGNORED.sub("", sentence).casefold().split())
