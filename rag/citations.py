"""Citations: which sources an answer cites, and where a user finds a source."""

import re
from dataclasses import replace

from rag.ingest.chunk.markdown import headings
from rag.types import Context, Source

CITATION = re.compile(r"\[\s*\d{1,4}(?:\s*[,;]\s*\d{1,4})*\s*\]")
# With the spaces before it, or at the beginning of a line also those after it; x[4] is code.
_CITATION_AND_SPACES = re.compile(rf"^[^\S\n]*{CITATION.pattern}[^\S\n]*|[^\S\n]*(?<!\w){CITATION.pattern}")
_OPEN_CITATION = re.compile(r"[^\S\n]*(?:\[[\s\d,;]*)?\Z")  # the end of a text that may become one
_HEADING_REACH = 100_000  # characters above a passage in which its heading is looked for


def cited(answer: str, context: Context) -> tuple[int, ...]:
    """Return the numbers cited in `answer` as [1], [1][2] or [1, 3], each once, in order of first mention.

    Numbers that no source of `context` has are left out.
    """
    known = {source.n for source in context.sources}
    numbers = (number for mark in CITATION.findall(answer) for number in _numbers(mark))
    return tuple(dict.fromkeys(number for number in numbers if number in known))


class KnownCitations:
    """Leaves out of a streamed text the numbers cited that no source has: of [1, 7] stays [1], of [7] nothing.

    A line with unknown marks alone is left out, and so are blank lines after it. Code between backticks stays as it is.
    The text does not depend on the pieces in which it arrives.
    """

    def __init__(self, context: Context):
        self._known = {source.n for source in context.sources}
        self._line = ""  # the newest, as it arrived
        self._shown = 0  # how many of its characters were returned, without unknown marks
        self._in_code = False
        self._dropped = False  # whether the line before was left out

    def push(self, new: str) -> str:
        """Return the text that is certain now."""
        *complete, self._line = (self._line + new).split("\n")
        certain = "".join(map(self._complete, complete))
        return certain + self._rest(_OPEN_CITATION.sub("", self._line))

    def finish(self) -> str:
        """Return the text that was held back."""
        return self._rest(self._line)

    def _complete(self, line: str) -> str:
        """Return the rest of a complete line; nothing of one with unknown marks alone, nor of blank lines after it."""
        kept, rest = self._keep(line), self._rest(line)
        self._dropped = not kept.strip() and (self._dropped or bool(line.strip()))
        self._shown = 0
        self._in_code ^= line.count("```") % 2 == 1
        return "" if self._dropped else f"{rest}\n"

    def _rest(self, line: str) -> str:
        """Return what was not returned yet of a line."""
        kept = self._keep(line)
        shown, self._shown = self._shown, len(kept)
        return kept[shown:]

    def _keep(self, line: str) -> str:
        """Return a line without unknown marks."""
        return line if self._in_code else _CITATION_AND_SPACES.sub(self._keep_known, line)

    def _keep_known(self, match: re.Match) -> str:
        """Return a mark and the spaces around it, without its unknown numbers."""
        if match.string[: match.start()].count("`") % 2:  # it is code
            return match[0]
        numbers = _numbers(match[0])
        known = [number for number in numbers if number in self._known]
        if len(known) == len(numbers):
            return match[0]
        return CITATION.sub(str(known), match[0]) if known else ""


def _numbers(mark: str) -> list[int]:
    return [int(number) for number in re.findall(r"\d+", mark)]


def locate(source: Source, text: str) -> Source:
    """Return a source with its first line and its heading in `text`, the text of its document.

    Headings are those of Markdown; the loader writes HTML's so. One more than 100,000 characters above is not found.
    """
    begin = text.rfind("\n", 0, max(0, source.start - _HEADING_REACH)) + 1
    above = [title for at, title in headings(text[begin : source.end]) if begin + at <= source.start]
    first_line = 1 + text.count("\n", 0, source.start)
    return replace(source, first_line=first_line, heading=above[-1] if above else "")


def excerpt(source: Source, width: int = 100) -> str:
    """Return the beginning of a passage, without the heading that it may begin with, in one line.

    Args:
        source: the passage.
        width: the most characters of the line.
    """
    lines = source.text.split("\n")
    if len(lines) > 1 and source.heading and lines[0].strip("# \t") == source.heading:
        lines = lines[2:] if set(lines[1].strip()) in ({"="}, {"-"}) else lines[1:]
    line = " ".join(" ".join(lines).split())
    if len(line) <= width:
        return line
    return line[: width - 1].rsplit(" ", 1)[0] + "\N{HORIZONTAL ELLIPSIS}"
