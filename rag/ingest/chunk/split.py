"""Divide a document into chunks with any chunker, in bounded memory."""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from numbers import Integral

import numpy as np
from jaxtyping import Float32

from rag.embed import Embedder
from rag.embed.encode import encode_passages
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.tokens import Span, TokenSpans
from rag.ingest.chunk.whole import WholeChunker
from rag.runtime.stages import wrong_result
from rag.types import Chunk, Document, chunk_at

_BLOCK = 1 << 20  # characters that are divided at once: their tokens and pieces take 100 times the memory
_BLOCK_ENDS = ("\n\n", "\n", ". ", "。", " ")  # a block ends at the first of these that is found


def chunks_of(document: Document, chunker: Chunker, embedder: Embedder | TokenSpans) -> list[Chunk]:
    """Return the chunks of a document in reading order; none when it has no text.

    A text of more than 2^20 characters is divided in blocks of at most that length, so that memory stays bounded;
    only a WholeChunker gets the whole text.

    Args:
        document: the document.
        chunker: the chunker.
        embedder: the embedder, whose tokens are counted; for a chunker that embeds nothing its `token_spans` is enough.
    """
    chunks: list[Chunk] = []
    for begin, end in (
        [(0, len(document.text))] if isinstance(chunker, WholeChunker) else _blocks(document.text)
    ):
        text = document.text[begin:end]
        if isinstance(embedder, Embedder):
            spans = chunker.split(text, embedder.token_spans, lambda texts: _encode(embedder, texts))
        else:
            spans = chunker.split(text, embedder)
        if not _are_spans(spans, len(text)):
            wanted = "a list of (start, end) within the text, whose starts and ends increase"
            raise wrong_result(chunker, "split", spans, wanted)
        chunks += [chunk_at(document, begin + int(start), begin + int(end)) for start, end in spans]
    return chunks


def _are_spans(spans: object, length: int) -> bool:
    """Return whether a chunker returned what its protocol says."""
    if not isinstance(spans, list | tuple) or not all(isinstance(one, list | tuple) for one in spans):
        return False
    whole = all(len(one) == 2 and all(isinstance(place, Integral) for place in one) for one in spans)
    inside = whole and all(0 <= start < end <= length for start, end in spans)
    return inside and all(a[0] < b[0] and a[1] < b[1] for a, b in pairwise(spans))


def _blocks(text: str) -> Iterator[Span]:
    """Yield the spans of blocks of at most _BLOCK characters that end where a paragraph, a line or a word ends."""
    begin = 0
    while len(text) - begin > _BLOCK:
        middle, limit = begin + _BLOCK // 2, begin + _BLOCK
        ends = (text.rfind(mark, middle, limit) + len(mark) for mark in _BLOCK_ENDS)
        end = next((end for end in ends if end > middle), limit)
        yield begin, end
        begin = end
    yield begin, len(text)


def _encode(embedder: Embedder, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
    """Return the vectors of pieces of one document; an embedder that learns from a corpus is fitted to them alone."""
    return encode_passages(embedder.fit(texts), texts)
