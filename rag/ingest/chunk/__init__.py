"""Documents to chunks: whole, by fixed numbers of tokens, by sentences, by separators, by sliding windows.

Others, of the same protocol: rag.ingest.chunk.markdown (by headings) and rag.ingest.chunk.semantic (by what is told). Sizes
and overlaps are in tokens of the embedder, as rag.ingest.chunk.tokens counts them.
"""

from typing import Protocol, runtime_checkable

from rag.ingest.chunk.tokens import (
    Encode,
    Span,
    TokenSpans,
)


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
