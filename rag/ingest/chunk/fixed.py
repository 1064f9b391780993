"""Chunks of a fixed number of tokens."""

from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, check_overlap, pack
from rag.runtime.options import Count, Whole, check_fields


@dataclass(frozen=True)
class FixedChunker:
    """Divide a text into chunks of `size` tokens (the last may have fewer) that repeat the last `overlap` tokens."""

    size: Count
    overlap: Whole = 0

    def __post_init__(self) -> None:
        check_fields(self)
        check_overlap(self.size, self.overlap)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        tokens = Tokens(text, token_spans)
        return pack(tokens.units((0, len(text))), tokens, self.size, self.overlap)
