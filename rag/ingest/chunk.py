"""Documents to chunks: by fixed numbers of tokens, by sentences, or recursively by separators.

Sizes and overlaps are in tokens of the embedder. A document is tokenised once, and the tokens of a span are
those of the whole document that touch it (a token across a border counts on both sides), so counting costs
two bisections and chunking is linear. The same characters tokenised alone can give a token or two more or
fewer, for example where a chunk begins inside a word.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Int

from rag.ingest.sentences import sentences, trimmed
from rag.types import Chunk, Document, UserError

Span = tuple[int, int]  # characters, end exclusive
TokenSpans = Callable[[str], Int[np.ndarray, "n 2"]]  # a text to the spans of its tokens, in order


@runtime_checkable  # the run-time type check of the tests asks for it
@runtime_checkable
class Chunker(Protocol):
    def split(self, text: str, token_spans: TokenSpans) -> list[Span]:
        """Return the spans of the chunks of `text`, with starts and ends that strictly increase.

        Every character that is not white space lies in a chunk, and no chunk has more than `size` tokens (but
        where a single character is more tokens than that). Neighbours share at most `overlap` tokens. A chunk
        neither begins nor ends with white space.
        """
        ...


def chunks_of(document: Document, chunker: Chunker, token_spans: TokenSpans) -> list[Chunk]:
    """Return the chunks of a document in reading order; none when it has no text."""
    return [
        Chunk(
            id=f"{document.id}:{start}-{end}",
            document_id=document.id,
            path=document.path,
            start=start,
            end=end,
            text=document.text[start:end],
        )
        for start, end in chunker.split(document.text, token_spans)
    ]


@dataclass(frozen=True)
class WholeChunker:
    """The document as one chunk, whatever its length: for datasets whose documents are passages already."""

    def split(self, text: str, token_spans: TokenSpans) -> list[Span]:
        return _trim_all(text, [0, len(text)])


@dataclass(frozen=True)
class FixedChunker:
    """`size` tokens a chunk (fewer in the last), of which `overlap` are also in the chunk before."""

    size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans) -> list[Span]:
        tokens = _Tokens(text, token_spans)
        return _pack(tokens.units((0, len(text))), tokens, self.size, self.overlap)


@dataclass(frozen=True)
class SentenceChunker:
    """As many whole sentences as fit; the overlap is whole sentences too.

    A sentence longer than `size` is divided at line breaks, then at spaces, then between tokens.
    """

    size: int
    overlap: int = 0

    def __post_init__(self) -> None:
        _check_sizes(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans) -> list[Span]:
        tokens = _Tokens(text, token_spans)
        units = [unit for span in sentences(text) for unit in self._fitting(span, ("\n", " "), tokens)]
        return _pack(units, tokens, self.size, self.overlap)

    def _fitting(self, span: Span, separators: Sequence[str], tokens: "_Tokens") -> list[Span]:
        if tokens.count(span) <= self.size:
            return [span]
        if not separators:
            return tokens.units(span)
        pieces = _divide(tokens.text, span, separators[0])
        return [unit for piece in pieces for unit in self._fitting(piece, separators[1:], tokens)]


@dataclass(frozen=True)
class RecursiveChunker:
    """Divide at the first separator, then what is longer than `size` at the next, in the end between tokens.

    Neighbouring pieces of one level that fit together become one chunk (LangChain's
    RecursiveCharacterTextSplitter, counted in tokens). A separator stays with the text before it, but one
    that begins with a line break, such as "\\n## ", leaves the rest of itself to the text after.
    """

    size: int
    overlap: int = 0
    separators: Sequence[str] = ("\n\n", "\n", ". ", "? ", "! ", "。", " ")

    def __post_init__(self) -> None:
        _check_sizes(self.size, self.overlap)
        if isinstance(self.separators, str) or not all(isinstance(s, str) and s for s in self.separators):
            raise UserError(
                f"The chunker's separators must be a list of non-empty strings, not {self.separators!r} "
                "(dividing between tokens always comes last and needs no entry)."
            )
        object.__setattr__(self, "separators", tuple(self.separators))  # a YAML list must become hashable

    def split(self, text: str, token_spans: TokenSpans) -> list[Span]:
        return self._split((0, len(text)), self.separators, _Tokens(text, token_spans))

    def _split(self, span: Span, separators: Sequence[str], tokens: "_Tokens") -> list[Span]:
        if not separators:
            return _pack(tokens.units(span), tokens, self.size, self.overlap)
        chunks: list[Span] = []
        pieces = _divide(tokens.text, span, separators[0])
        for fits, run in groupby(pieces, key=lambda piece: tokens.count(piece) <= self.size):
            if fits:
                chunks += _pack(list(run), tokens, self.size, self.overlap)
            else:
                chunks += (chunk for piece in run for chunk in self._split(piece, separators[1:], tokens))
        return chunks


class _Tokens:
    """A text with the sorted starts and ends of its tokens."""

    def __init__(self, text: str, token_spans: TokenSpans) -> None:
        spans = np.asarray(token_spans(text), np.int64).reshape(-1, 2)
        self.text = text
        # Bisection needs sorted lists, and a few tokenizers give an empty token a span further back.
        self.starts: list[int] = np.maximum.accumulate(spans[:, 0]).tolist()
        self.ends: list[int] = np.maximum.accumulate(spans[:, 1]).tolist()

    def first(self, span: Span) -> int:
        """The number of the first token that touches the span, or would."""
        return bisect_right(self.ends, span[0])

    def last(self, span: Span) -> int:
        """One past the number of the last token that touches the span."""
        return bisect_left(self.starts, span[1])

    def count(self, span: Span) -> int:
        return self.last(span) - self.first(span)

    def units(self, span: Span) -> list[Span]:
        """The span divided before each token, without white space; bytes of one character stay together."""
        start, end = span
        inside = self.starts[bisect_right(self.starts, start) : bisect_left(self.starts, end)]
        return _trim_all(self.text, [start, *dict.fromkeys(inside), end])


def _pack(units: Sequence[Span], tokens: _Tokens, size: int, overlap: int) -> list[Span]:
    """Join consecutive units greedily into spans of at most `size` tokens that share at most `overlap`."""
    firsts = [tokens.first(unit) for unit in units]
    lasts = [tokens.last(unit) for unit in units]
    chunks: list[Span] = []
    begin = 0
    while begin < len(units):
        end = max(begin + 1, bisect_right(lasts, firsts[begin] + size, lo=begin))
        chunks.append((units[begin][0], units[end - 1][1]))
        if end == len(units):
            break
        # The next chunk goes back over whole units, as far as the overlap allows and unit `end` still fits.
        earliest = max(lasts[end - 1] - overlap, lasts[end] - size)
        begin = min(end, bisect_left(firsts, earliest, lo=begin + 1))
    return chunks


def _divide(text: str, span: Span, separator: str) -> list[Span]:
    """The pieces of a span, cut after each separator, trimmed, without the empty ones."""
    keep = 1 if separator[0] == "\n" else len(separator)
    cuts, end = [span[0]], span[1]
    at = text.find(separator, span[0], end)
    while at >= 0:
        cuts.append(at + keep)
        at = text.find(separator, at + len(separator), end)
    return _trim_all(text, [*cuts, end])


def _trim_all(text: str, cuts: Sequence[int]) -> list[Span]:
    spans = (trimmed(text, start, end) for start, end in pairwise(cuts))
    return [(start, end) for start, end in spans if start < end]


def _check_sizes(size: int, overlap: int) -> None:
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise UserError(f"The chunker's size must be a whole number of tokens above 0, not {size!r}.")
    if isinstance(overlap, bool) or not isinstance(overlap, int) or not 0 <= overlap < size:
        raise UserError(
            f"The chunker's overlap must be a whole number from 0 to below its size {size}, not {overlap!r}."
        )
