"""Chunks of Markdown that never go beyond a section.

Source: CommonMark 0.31, for headings and fenced code.
"""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, check_overlap, fitting, pack
from rag.ingest.sentences import sentences, trimmed
from rag.runtime.options import Count, Whole, check_fields

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})", re.MULTILINE)
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|\r?$)", re.MULTILINE)
_MARKS = re.compile(r"^#{1,6}(?:[ \t]+|$)|(?:^|[ \t]+)#*[ \t]*$")  # before and after a title
_UNDERLINE = re.compile(r" {0,3}(?:={3,}|-{3,})[ \t]*\r?$", re.MULTILINE)
# Lines that an underline does not make a heading.
_NO_TITLE = re.compile(r" {4}|\s*(?:$|[-*+>|]|\d{1,9}[.)]\s)", re.MULTILINE)


@dataclass(frozen=True)
class MarkdownChunker:
    """Divide each section into chunks of whole sentences, of at most `size` tokens.

    A heading stays with the text below it; a heading without text stays with the next heading. Fenced code has no
    headings; it is one piece if it fits into a chunk, and is divided at its lines otherwise. A text without headings is
    one section. The headings above a section are not copied into its chunks: a chunk is a span of the document's text.
    """

    size: Count
    overlap: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_overlap(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        tokens = Tokens(text, token_spans)
        return [
            chunk
            for section in _sections(text)
            for chunk in pack(
                [unit for piece in section for unit in fitting(piece, tokens, self.size)],
                tokens,
                self.size,
                self.overlap,
            )
        ]


def sections(text: str) -> list[Span]:
    """Return the spans of the sections of a Markdown text, in order; every visible character is in one of them."""
    return [(section[0][0], section[-1][1]) for section in _sections(text)]


def headings(text: str) -> list[tuple[int, str]]:
    """Return (first character, title without marks) of each heading of a Markdown text that has a title, in order."""
    found = [(start, text[start:end].strip()) for kind, start, end in _blocks(text) if kind == "heading"]
    titles = [(start, _MARKS.sub("", heading.split("\n")[0])) for start, heading in found]
    return [(start, title) for start, title in titles if title]


def _sections(text: str) -> list[list[Span]]:
    """Return each section as its pieces: headings, sentences, whole blocks of fenced code."""
    found: list[list[Span]] = [[]]
    has_text = False  # whether the section has text below its headings
    for kind, start, end in _blocks(text):
        start, end = trimmed(text, start, end)
        if start >= end:  # white space
            continue
        if kind == "heading" and has_text:
            found.append([])
        has_text = kind != "heading"
        if kind == "text":
            found[-1] += [(start + a, start + b) for a, b in sentences(text[start:end])]
        else:
            found[-1].append((start, end))
    return [section for section in found if section]


def _blocks(text: str) -> Iterator[tuple[str, int, int]]:
    """Yield (kind, start, end) of blocks of whole lines that cover the text; kind is "heading", "fence" or "text"."""
    lines = [match.span() for match in _LINE.finditer(text)]
    begin = 0  # of the text that was not yielded yet
    fence = ""  # the mark that opened the current block of fenced code
    for i, (start, end) in enumerate(lines):
        if fence:
            if _closes(text[start:end], fence):
                yield "fence", begin, end
                begin, fence = end, ""
        elif opening := _FENCE.match(text, start, end):
            yield "text", begin, start
            begin, fence = start, opening[1]
        elif _HEADING.match(text, start, end):
            yield "text", begin, start
            yield "heading", start, end
            begin = end
        elif _UNDERLINE.match(text, start, end) and _is_title(text, lines[max(0, i - 2) : i], begin):
            title = lines[i - 1][0]
            yield "text", begin, title
            yield "heading", title, end
            begin = end
    yield ("fence" if fence else "text"), begin, len(text)


def _closes(line: str, fence: str) -> bool:
    """Return whether a line ends the fenced code that the mark `fence` opened."""
    mark = line.strip()
    return len(mark) >= len(fence) and set(mark) == {fence[0]} and len(line) - len(line.lstrip(" ")) <= 3


def _is_title(text: str, above: Sequence[Span], begin: int) -> bool:
    """Return whether the last line above an underline is a heading: a paragraph of one line, from `begin` on."""
    *other, (start, end) = [line for line in above if line[0] >= begin] or [(0, 0)]
    alone = all(not text[slice(*line)].strip() for line in other)
    return start < end and alone and not _NO_TITLE.match(text, start, end)
