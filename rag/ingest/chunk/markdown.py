"""Markdown to chunks that keep to its sections, as its headings tell them (CommonMark 0.31, headings and fences)."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, check_overlap, fitting, pack
from rag.ingest.sentences import sentences, trimmed
from rag.runtime.options import Count, Whole, check_fields

_LINE = re.compile(r"[^\n]*\n|[^\n]+")
_FENCE = re.compile(r" {0,3}(`{3,}(?=[^`]*$)|~{3,})", re.MULTILINE)
_HEADING = re.compile(r" {0,3}#{1,6}(?:[ \t]|\r?$)", re.MULTILINE)
_UNDERLINE = re.compile(r" {0,3}(?:={3,}|-{3,})[ \t]*\r?$", re.MULTILINE)
_NO_TITLE = re.compile(r" {4}|\s*(?:$|[-*+>|]|\d{1,9}[.)]\s)", re.MULTILINE)  # what a rule cannot underline


@dataclass(frozen=True)
class MarkdownChunker:
    """Sections divided into whole sentences, `size` tokens at most; no chunk goes on across a heading.

    A heading stays with the text below it, and one without text of its own with the next heading. Fenced code is
    no place for headings; it stays in one piece where it fits, else it is divided at its lines. Text without
    headings is one section. The headings above are not written into a chunk: it is the document's own text.
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
    """The spans of the sections of a Markdown text, in order, from heading to heading; all visible text is in one."""
    return [(section[0][0], section[-1][1]) for section in _sections(text)]


def _sections(text: str) -> list[list[Span]]:
    """Each section as its pieces: headings, sentences, and fences whole."""
    found: list[list[Span]] = [[]]
    below = False  # whether the section has text below its headings
    for kind, start, end in _blocks(text):
        start, end = trimmed(text, start, end)
        if start >= end:  # white space
            continue
        if kind == "heading" and below:
            found.append([])
        below = kind != "heading"
        if kind == "text":
            found[-1] += [(start + a, start + b) for a, b in sentences(text[start:end])]
        else:
            found[-1].append((start, end))
    return [section for section in found if section]


def _blocks(text: str) -> Iterator[tuple[str, int, int]]:
    """(kind, start, end) of stretches of whole lines: "heading", "fence" or "text". They follow on one another."""
    lines = [match.span() for match in _LINE.finditer(text)]
    begin = 0  # of the text not yet handed out
    fence = ""  # what opened the fence that we are in
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
    mark = line.strip()
    return len(mark) >= len(fence) and set(mark) == {fence[0]} and len(line) - len(line.lstrip(" ")) <= 3


def _is_title(text: str, above: Sequence[Span], begin: int) -> bool:
    """Whether the last of the lines above a rule is its heading: a paragraph of one line, from `begin` on."""
    *other, (start, end) = [line for line in above if line[0] >= begin] or [(0, 0)]
    alone = all(not text[slice(*line)].strip() for line in other)
    return start < end and alone and not _NO_TITLE.match(text, start, end)
