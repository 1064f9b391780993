"""Sliding windows of sentences."""

from bisect import bisect_right
from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, fitting, pack
from rag.ingest.sentences import sentences
from rag.runtime.options import Count, check_fields
from rag.types import UserError


@dataclass(frozen=True)
class SlidingWindowChunker:
    """Return windows of `sentences` whole sentences, one at every `stride`-th sentence, of at most `size` tokens each.

    Every sentence is in about sentences / stride chunks, each time with other neighbours, however long it is. (The
    windows of FixedChunker are of tokens and cut sentences; SentenceChunker fills each chunk up to its size.) A window
    that is longer than `size` ends earlier, and the next one begins no later than that end. A sentence longer than
    `size` is divided as by SentenceChunker, and its parts count as sentences.
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
            if window <= end:  # the window has no new sentence: begin one sentence later
                begin += 1
                continue
            chunks.append((units[begin][0], units[window - 1][1]))
            end = window
            begin = min(begin + self.stride, end)
        return chunks
