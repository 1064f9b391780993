"""Chunks that end where the subject of the text changes, which is measured by the vectors of its sentences.

Source: G. Kamradt, "5 Levels of Text Splitting", 2024 (percentile 95, window 1, no maximum size).
Letters: N sentences, E embedding dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64

from rag.ingest.chunk.tokens import Encode, Span, Tokens, TokenSpans, fitting, pack
from rag.ingest.sentences import sentences
from rag.runtime.options import Count, Whole, check_fields


@dataclass(frozen=True)
class SemanticChunker:
    """Divide a text into chunks of whole sentences, of at most `size` tokens, that end where the subject changes.

    Each sentence is embedded together with `window` sentences on both sides. A chunk ends where the cosine distance
    between neighbouring sentences is above the `percentile` of the document's distances. Between two such ends, text
    longer than `size` is divided as by SentenceChunker. There is no overlap. `split` requires `encode`.
    """

    size: Count
    percentile: Annotated[float | int, Ge(0), Le(100)] = 95
    window: Whole = 1

    def __post_init__(self) -> None:
        check_fields(self)

    def split(self, text: str, token_spans: TokenSpans, encode: Encode | None = None) -> list[Span]:
        if encode is None:
            raise ValueError("a SemanticChunker compares meanings: give chunks_of the embedder")
        tokens, found = Tokens(text, token_spans), sentences(text)
        chunks: list[Span] = []
        begin = 0
        for end in [*self._ends(text, found, encode), len(found)]:
            units = [unit for span in found[begin:end] for unit in fitting(span, tokens, self.size)]
            chunks += pack(units, tokens, self.size, 0)
            begin = end
        return chunks

    def _ends(self, text: str, found: Sequence[Span], encode: Encode) -> list[int]:
        """Return the indices of the sentences before which a chunk ends."""
        if len(found) < 2:
            return []
        last = len(found) - 1
        around = [(max(0, i - self.window), min(last, i + self.window)) for i in range(len(found))]
        distances = neighbour_distances(encode([text[found[a][0] : found[b][1]] for a, b in around]))
        threshold = np.percentile(distances, self.percentile)
        return (np.flatnonzero(distances > threshold) + 1).tolist()


def neighbour_distances(vectors: Float32[np.ndarray, "N E"]) -> Float64[np.ndarray, "N-1"]:
    """Return the cosine distance of each vector from the next; the vectors have unit length or are zero."""
    return 1.0 - np.einsum("ne,ne->n", vectors[:-1], vectors[1:], dtype=np.float64)
