"""Each document as one chunk."""

from dataclasses import dataclass

from rag.ingest.chunk.tokens import Encode, Span, TokenSpans, trim_all


@dataclass(frozen=True)
class WholeChunker:
    """Return the whole text as one chunk, whatever its length: for datasets whose documents are passages already."""

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        return trim_all(text, [0, len(text)])
