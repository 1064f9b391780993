"""Documents to chunks: whole, by fixed numbers of tokens, by sentences, by separators, by sliding windows.

Others, of the same protocol: rag.ingest.markdown (by headings) and rag.ingest.semantic (by what is told). Sizes
and overlaps are in tokens of the embedder, as rag.ingest.packing counts them.
"""

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from rag.embed import Embedder
from rag.ingest.packing import (
    Encode,
    Span,
    Tokens,
    TokenSpans,
    check_overlap,
    divide,
    fitting,
    pack,
    trim_all,
)
from rag.ingest.sentences import sentences
from rag.types import Chunk, Document, UserError, chunk_at
from rag.values import Count, Filled, Whole, check_fields

_BLOCK = 1 << 20  # characters divided at once: their tokens and pieces take some hundred times the memory
_BLOCK_ENDS = ("\n\n", "\n", ". ", "。", " ")  # the first that is there


@runtime_checkable  # the run-time type check of the tests asks for it
class Chunker(Protocol):
    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        """Return the spans of the chunks of `text`, with starts and ends that strictly increase.

        Every character that is not white space lies in a chunk, and no chunk has more than `size` tokens (but
        where a single character is more tokens than that). Neighbours share at most `overlap` tokens, where the
        chunker has such an option. A chunk neither begins nor ends with white space. `encode` is for those that
        compare meanings; the others have no use for it.
        """
        ...


def chunks_of(document: Document, chunker: Chunker, embedder: Embedder | TokenSpans) -> list[Chunk]:
    """Return the chunks of a document in reading order; none when it has no text.

    Tokens are those of `embedder`; its token_spans alone will do for a chunker that embeds nothing. A text of more
    than 2^20 characters is divided block by block, none longer than that, so that memory stays bounded; but where
    the chunker is a WholeChunker.
    """
    chunks: list[Chunk] = []
    for begin, end in (
        [(0, len(document.text))] if isinstance(chunker, WholeChunker) else _blocks(document.text)
    ):
        text = document.text[begin:end]
        if isinstance(embedder, Embedder):
            spans = chunker.split(text, embedder.token_spans, lambda texts: _encode(embedder, texts))
        else:
            spans = chunker.split(text, embedder)
        chunks += [chunk_at(document, begin + start, begin + end) for start, end in spans]
    return chunks


def _blocks(text: str) -> Iterator[Span]:
    """The text in stretches of at most _BLOCK characters, which end where a paragraph, a line or a word does."""
    begin = 0
    while len(text) - begin > _BLOCK:
        middle, limit = begin + _BLOCK // 2, begin + _BLOCK
        ends = (text.rfind(mark, middle, limit) + len(mark) for mark in _BLOCK_ENDS)
        end = next((end for end in ends if end > middle), limit)
        yield begin, end
        begin = end
    yield begin, len(text)


def _encode(embedder: Embedder, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
    """Vectors of pieces of one document; an embedder that learns from a corpus learns from these alone."""
    return embedder.fit(texts).encode(texts)


@dataclass(frozen=True)
class WholeChunker:
    """The document as one chunk, whatever its length: for datasets whose documents are passages already."""

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        return trim_all(text, [0, len(text)])


@dataclass(frozen=True)
class FixedChunker:
    """`size` tokens a chunk (fewer in the last), of which `overlap` are also in the chunk before."""

    size: Count
    overlap: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_overlap(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        tokens = Tokens(text, token_spans)
        return pack(tokens.units((0, len(text))), tokens, self.size, self.overlap)


@dataclass(frozen=True)
class SentenceChunker:
    """As many whole sentences as fit; the overlap is whole sentences too.

    A sentence longer than `size` is divided at line breaks, then at spaces, then between tokens.
    """

    size: Count
    overlap: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_overlap(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        tokens = Tokens(text, token_spans)
        units = [unit for span in sentences(text) for unit in fitting(span, tokens, self.size)]
        return pack(units, tokens, self.size, self.overlap)


@dataclass(frozen=True)
class RecursiveChunker:
    """Divide at the first separator, then what is longer than `size` at the next, in the end between tokens.

    Neighbouring pieces of one level that fit together become one chunk (LangChain's
    RecursiveCharacterTextSplitter, counted in tokens). A separator stays with the text before it, but one
    that begins with a line break, such as "\\n## ", leaves the rest of itself to the text after.
    """

    size: Count
    overlap: Whole = 0
    separators: Sequence[Filled] = ("\n\n", "\n", ". ", "? ", "! ", "。", " ")

    def __post_init__(self) -> None:
        check_fields(self)
        check_overlap(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        return self._split((0, len(text)), self.separators, Tokens(text, token_spans))

    def _split(self, span: Span, separators: Sequence[str], tokens: Tokens) -> list[Span]:
        if not separators:
            return pack(tokens.units(span), tokens, self.size, self.overlap)
        chunks: list[Span] = []
        pieces = divide(tokens.text, span, separators[0])
        for fits, run in groupby(pieces, key=lambda piece: tokens.count(piece) <= self.size):
            if fits:
                chunks += pack(list(run), tokens, self.size, self.overlap)
            else:
                chunks += (chunk for piece in run for chunk in self._split(piece, separators[1:], tokens))
        return chunks


@dataclass(frozen=True)
class SlidingWindowChunker:
    """Windows of `sentences` whole sentences, one beginning at every `stride`-th, of at most `size` tokens each.

    Every sentence stands in about sentences / stride chunks, with different neighbours, however long it is: where
    FixedChunker slides over tokens and cuts sentences, and SentenceChunker fills each chunk up to its size. A
    window that is longer than `size` ends earlier, and the next one begins no later than there. A sentence longer
    than `size` is divided as by SentenceChunker, and its chunks count as sentences.
    """

    sentences: Count = 5
    stride: Count = 2
    size: Count = 256

    def __post_init__(self) -> None:
        check_fields(self)
        if self.stride > self.sentences:
            raise UserError(
                f"The chunker's stride must be a whole number from 1 to its sentences {self.sentences}, "
                f"not {self.stride}: a longer one would leave text out."
            )

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        tokens = Tokens(text, token_spans)
        units = [
            part
            for span in sentences(text)
            for part in pack(fitting(span, tokens, self.size), tokens, self.size, 0)
        ]
        firsts = [tokens.first(unit) for unit in units]
        lasts = [tokens.last(unit) for unit in units]
        chunks: list[Span] = []
        begin = end = 0
        while end < len(units):
            fit = max(begin + 1, bisect_right(lasts, firsts[begin] + self.size, lo=begin))
            window = min(begin + self.sentences, fit)
            if window <= end:  # nothing new beside what did not fit before: begin one later
                begin += 1
                continue
            chunks.append((units[begin][0], units[window - 1][1]))
            end = window
            begin = min(begin + self.stride, end)
        return chunks
