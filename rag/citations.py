"""Citations: which sources an answer cites, and where a user finds a source."""

import re
from dataclasses import replace

from rag.ingest.chunk.markdown import headings
from rag.types import Context, Source

_CITATION = re.compile(r"\[\s*(\d{1,4}(?:\s*[,;]\s*\d{1,4})*)\s*\]")
_HEADING_REACH = 100_000  # characters above a passage in which its heading is looked for


def cited(answer: str, context: Context) -> tuple[int, ...]:
    """Return the numbers cited in `answer` as [1], [1][2] or [1, 3], each once, in order of first mention.

    Numbers that no source of `context` has are left out.
    """
    known = {source.n for source in context.sources}
    numbers = (int(number) for group in _CITATION.findall(answer) for number in re.findall(r"\d+", group))
    return tuple(dict.fromkeys(number for number in numbers if number in known))


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
