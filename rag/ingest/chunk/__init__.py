"""Chunkers: each divides the text of a document into the spans of its chunks.

A new chunker is one file with a class of this protocol. Sizes and overlaps are in tokens of the embedder
(rag.ingest.chunk.tokens). rag.ingest.chunk.split applies a chunker to a document.
"""

from typing import Protocol, runtime_checkable

from rag.ingest.chunk.tokens import Encode, Span, TokenSpans


@runtime_checkable  # the run-time type check of the tests needs it
class Chunker(Protocol):
    """The protocol of a chunker."""

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        """Return the spans of the chunks of `text`, with starts and ends that strictly increase.

        Every character that is not white space lies in a chunk, and no chunk has more than `size` tokens (except
        where a single character has more tokens than that). Neighbours share at most `overlap` tokens, where the
        chunker has such an option. A chunk neither begins nor ends with white space.

        Args:
            text: the text of a document, or a block of it.
            token_spans: returns the character spans of a text's tokens.
            encode: returns the vectors of texts; only chunkers that compare the content of sentences need it.
        """
        ...
