"""Sliding windows of sentences."""

from bisect import bisect_right
from dataclasses import dataclass

from rag.ingest.chunk.tokens import (
    Encode,
    Span,
    Tokens,
    TokenSpans,
    fitting,
    pack,
)
from rag.ingest.sentences import sentences
from rag.runtime.options import Count, check_fields
from rag.types import UserError


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
