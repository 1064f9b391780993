"""Building blocks of chunkers: count the tokens of a span, divide a span into pieces, join pieces up to a size.

Sizes and overlaps are in tokens of the embedder. A text is tokenised once, and the tokens of a span are those
of the whole text that overlap it (a token across a border counts on both sides), so counting costs two bisections
and chunking takes linear time. The same characters tokenised alone can have one or two tokens more or fewer, for
example where a chunk begins inside a word.
Letters: n tokens of a text, N texts, E embedding dim.
"""

from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np
from jaxtyping import Float32, Int

from rag.ingest.sentences import trimmed
from rag.types import UserError

Span = tuple[int, int]  # start and end in characters, end exclusive
TokenSpans = Callable[[str], Int[np.ndarray, "n 2"]]  # returns the spans of the tokens of a text, in order
Encode = Callable[[Sequence[str]], Float32[np.ndarray, "N E"]]  # returns the unit vectors of texts


class Tokens:
    """A text and the sorted starts and ends of its tokens."""

    def __init__(self, text: str, token_spans: TokenSpans) -> None:
        spans = np.asarray(token_spans(text), np.int64).reshape(-1, 2)
        self.text = text
        # Bisection needs sorted lists, but a few tokenizers give an empty token a span further back.
        self.starts: list[int] = np.maximum.accumulate(spans[:, 0]).tolist()
        self.ends: list[int] = np.maximum.accumulate(spans[:, 1]).tolist()

    def first(self, span: Span) -> int:
        """Return the index of the first token that ends after the span begins."""
        return bisect_right(self.ends, span[0])

    def last(self, span: Span) -> int:
        """Return the index after that of the last token that begins before the span ends."""
        return bisect_left(self.starts, span[1])

    def count(self, span: Span) -> int:
        """Return how many tokens overlap the span."""
        return self.last(span) - self.first(span)

    def units(self, span: Span) -> list[Span]:
        """Divide a span before each token and trim white space; the bytes of one character stay together."""
        start, end = span
        inside = self.starts[bisect_right(self.starts, start) : bisect_left(self.starts, end)]
        return trim_all(self.text, [start, *dict.fromkeys(inside), end])


def pack(units: Sequence[Span], tokens: Tokens, size: int, overlap: int) -> list[Span]:
    """Join consecutive units greedily into the spans of chunks.

    Args:
        units: spans that are not divided, in order.
        tokens: those of the text.
        size: the most tokens of a chunk; a single unit may have more.
        overlap: the most tokens that a chunk repeats of the one before.
    """
    firsts = [tokens.first(unit) for unit in units]
    lasts = [tokens.last(unit) for unit in units]
    chunks: list[Span] = []
    begin = 0
    while begin < len(units):
        end = max(begin + 1, bisect_right(lasts, firsts[begin] + size, lo=begin))
        chunks.append((units[begin][0], units[end - 1][1]))
        if end == len(units):
            break
        # The next chunk repeats whole units, as many as the overlap allows and as leave room for unit `end`.
        earliest = max(lasts[end - 1] - overlap, lasts[end] - size)
        begin = min(end, bisect_left(firsts, earliest, lo=begin + 1))
    return chunks


def fitting(span: Span, tokens: Tokens, size: int, separators: Sequence[str] = ("\n", " ")) -> list[Span]:
    """Divide a span into spans that fit into a chunk.

    Args:
        span: returned as it is if it fits.
        tokens: those of the text.
        size: the most tokens of a chunk.
        separators: tried in turn on what does not fit; after the last one, text is divided between tokens.
    """
    if tokens.count(span) <= size:
        return [span]
    if not separators:
        return tokens.units(span)
    pieces = divide(tokens.text, span, separators[0])
    return [unit for piece in pieces for unit in fitting(piece, tokens, size, separators[1:])]


def divide(text: str, span: Span, separator: str) -> list[Span]:
    """Return the pieces of a span, cut after each separator and trimmed, without the empty ones."""
    # How many characters of the separator are in the piece before it.
    before_cut = 1 if separator[0] == "\n" else len(separator)
    cuts, end = [span[0]], span[1]
    at = text.find(separator, span[0], end)
    while at >= 0:
        cuts.append(at + before_cut)
        at = text.find(separator, at + len(separator), end)
    return trim_all(text, [*cuts, end])


def trim_all(text: str, cuts: Sequence[int]) -> list[Span]:
    """Return the spans between neighbouring cuts, trimmed, without the empty ones."""
    spans = (trimmed(text, start, end) for start, end in pairwise(cuts))
    return [(start, end) for start, end in spans if start < end]


def check_overlap(size: int, overlap: int) -> None:
    """Raise UserError for an overlap that leaves no room for new text in a chunk."""
    if overlap >= size:
        raise UserError(
            f"The chunker's overlap must be a whole number from 0 to below its size {size}, not {overlap}."
        )
