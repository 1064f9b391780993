"""Chunks that end where the text turns to something else, as an embedder sees it.

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
    """Whole sentences up to `size` tokens, and an end wherever the meaning changes more than it mostly does.

    Each sentence is embedded together with `window` sentences on both sides; where the cosine distance from one
    to the next is above the `percentile` of the document's distances, a chunk ends (Kamradt, "5 Levels of Text
    Splitting", 2024, which has percentile 95, window 1 and no largest size). What is longer than `size` between
    two such ends is divided as by SentenceChunker. There is no overlap. The embedder must be given.
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
        """The numbers of the sentences before which a chunk ends."""
        if len(found) < 2:
            return []
        last = len(found) - 1
        around = [(max(0, i - self.window), min(last, i + self.window)) for i in range(len(found))]
        distances = neighbour_distances(encode([text[found[a][0] : found[b][1]] for a, b in around]))
        threshold = np.percentile(distances, self.percentile)
        return (np.flatnonzero(distances > threshold) + 1).tolist()


def neighbour_distances(vectors: Float32[np.ndarray, "N E"]) -> Float64[np.ndarray, "M"]:
    """The cosine distance of each vector from the next, M = N - 1; the vectors have unit length (or none)."""
    return 1.0 - np.einsum("ne,ne->n", vectors[:-1], vectors[1:], dtype=np.float64)
