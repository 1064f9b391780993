"""Pack tokenised texts into batches with hardly any padding.

Source: best-fit decreasing bin packing, Johnson et al. 1974.
Letters: B rows of a batch, T tokens of a row, N rows in all.
"""

from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rag.runtime.shapes import next_power_of_two, round_up_text

_MIN_WIDTH, _MAX_WIDTH = 16, 256  # tokens of a row of several texts
_TOKENS_PER_TEXT = 16  # the least mean number of tokens per text in a row of several texts


@dataclass(frozen=True, slots=True)
class Batch:
    """Rows of tokens that run together."""

    texts: Int[np.ndarray, "B texts"]  # the indices of the texts in each row, -1 for none
    tokens: Int[np.ndarray, "B T"]
    lengths: Int[np.ndarray, "B texts"]  # the tokens of each text, 0 for none


def pack_texts(lengths: Sequence[int], longest: int) -> list[list[int]]:
    """Return the indices of the texts in each row; each text is in one row.

    The longest remaining text opens a row, then the longest remaining text that fits is added, and so on. The width of
    a row is the tokens of its first text rounded up to a power of two, between 16 and 256, and at most `longest`. A
    text of more than 256 tokens has a row of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    sizes = [-lengths[i] for i in order]  # negative, so that they are ascending, as bisect needs them
    rows = []
    while order:
        first = -sizes.pop(0)
        row, room = (
            [order.pop(0)],
            min(next_power_of_two(first, _MIN_WIDTH), longest, _MAX_WIDTH) - first,
        )
        while len(row) < max_texts(first) and (i := bisect_left(sizes, -room)) < len(sizes):
            room += sizes.pop(i)
            row.append(order.pop(i))
        rows.append(row)
    return rows


def max_texts(width: int) -> int:
    """Return how many texts a row of `width` tokens may have."""
    return max(1, min(next_power_of_two(width), _MAX_WIDTH) // _TOKENS_PER_TEXT)


def plan_batches(
    lengths: Int[np.ndarray, "N"], tokens_per_batch: int, longest: int
) -> Iterator[tuple[Int[np.ndarray, "n"], int, int]]:
    """Yield the batches as (indices of n rows, B, T) with n <= B, the longest rows first; each row is in one batch.

    B T <= tokens_per_batch unless a single row is longer. There are few shapes: T is rounded up by
    rag.runtime.shapes.round_up_text, and B follows from T; in the last batch B may be a smaller power of two.
    """
    order = np.argsort(-lengths, kind="stable")
    start = 0
    while start < len(order):
        width = round_up_text(int(lengths[order[start]]), longest)
        size = max(1, tokens_per_batch // width)
        rows = order[start : start + size]
        yield rows, min(size, next_power_of_two(len(rows))), width
        start += size


def make_batch(
    ids: Sequence[Sequence[int]], rows: Sequence[Sequence[int]], shape: tuple[int, int], start: int = 0
) -> Batch:
    """Return the batch of these rows, padded to the shape (B, T).

    Args:
        ids: the tokens of texts.
        rows: the indices into `ids` of each row's texts.
        shape: (B, T).
        start: the index of the first text of `ids` among all texts.
    """
    most = max_texts(shape[1]) if max(map(len, rows)) > 1 else 1
    tokens = np.zeros(shape, np.int32)
    texts, lengths = np.full((shape[0], most), -1), np.zeros((shape[0], most), np.int32)
    for b, row in enumerate(rows):
        texts[b, : len(row)] = np.array(row) + start
        lengths[b, : len(row)] = [len(ids[i]) for i in row]
        tokens[b, : lengths[b].sum()] = np.concatenate([ids[i] for i in row])
    return Batch(texts, tokens, lengths)
