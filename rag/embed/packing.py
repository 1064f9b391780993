"""Packing of tokenised texts into batches with hardly any padding."""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rag.runtime.shapes import next_power_of_two, round_up_text

_NARROWEST, _WIDEST = 16, 256  # tokens of a row that holds several texts
_SPARSE = 16  # tokens a text that a row of several has at least, on average


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens that run together, and the texts in them: their numbers and lengths, -1 and 0 for none."""

    texts: Int[np.ndarray, "B S"]
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B S"]


def pack_texts(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Which texts share a row, each text once: the longest left opens one, then the longest that fits goes in.

    A row has the next power of two of its first text's tokens as room, between 16 and 256, and no more than
    `longest`; a text beyond 256 tokens stands alone. Best-fit decreasing (Johnson et al. 1974).
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes, rows = [-lengths[i] for i in order], []  # ascending, as bisect wants them
    while order:
        first = -sizes.pop(0)
        row, room = [order.pop(0)], min(max(_NARROWEST, next_power_of_two(first)), longest, _WIDEST) - first
        while len(row) < max_texts(first) and (place := bisect_left(sizes, -room)) < len(sizes):
            room += sizes.pop(place)
            row.append(order.pop(place))
        rows.append(row)
    return rows


def max_texts(width: int) -> int:
    """How many texts a row may hold that is padded to so many tokens."""
    return max(1, min(next_power_of_two(width), _WIDEST) // _SPARSE)


def plan_batches(
    lengths: Int[np.ndarray, "N"], tokens_per_batch: int, longest: int
) -> Iterator[tuple[Int[np.ndarray, "n"], int, int]]:
    """Which rows run together: (rows, B, T) with n <= B, the longest first, each row once.

    B T <= tokens_per_batch unless one row alone is longer. The shapes are few: T is as `padded_length` says,
    and B follows from it, or is the next power of two in the last batch.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = round_up_text(int(lengths[order[start]]), longest)
        size = max(1, tokens_per_batch // width)
        rows = order[start : start + size]
        yield rows, min(size, next_power_of_two(len(rows))), width
        start += size


def _batch(
    ids: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shape: tuple[int, int], start: int = 0
) -> Batch:
    """The rows' texts, of which ids[i] is text start + i, and rows of filling up to the shape (B, T)."""
    most = max_texts(shape[1]) if max(map(len, rows)) > 1 else 1
    tokens = np.zeros(shape, np.int32)
    texts, lengths = np.full((shape[0], most), -1), np.zeros((shape[0], most), np.int32)
    for b, row in enumerate(rows):
        texts[b, : len(row)] = np.array(row) + start
        lengths[b, : len(row)] = [len(ids[i]) for i in row]
        tokens[b, : lengths[b].sum()] = np.concatenate([ids[i] for i in row])
    return Batch(texts, tokens, lengths)
