"""Chunks of whole sentences."""

from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, check_overlap, fitting, pack
from rag.ingest.sentences import sentences
from rag.runtime.options import Count, Whole, check_fields


@dataclass(frozen=True)
class SentenceChunker:
    """Divide a text into chunks of as many whole sentences as fit into `size` tokens; overlaps are whole sentences too.

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
