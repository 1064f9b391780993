"""Recursive chunking by a list of separators."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, check_overlap, divide, pack
from rag.runtime.options import Count, Filled, Whole, check_fields


@dataclass(frozen=True)
class RecursiveChunker:
    """Divide a text at the first separator, longer pieces than `size` at the next one, and at last between tokens.

    Neighbouring pieces of one level are joined into a chunk as long as they fit (LangChain's
    RecursiveCharacterTextSplitter, but counted in tokens). A separator belongs to the text before it; of a separator
    that begins with a line break, such as "\\n## ", only the line break does; the rest belongs to the text after.
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
