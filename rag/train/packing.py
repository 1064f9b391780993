"""Pack token sequences into rows of one length, so that hardly any token is padding and shared beginnings are run once.

Letters: B rows of a batch, T tokens of a row, n targets of a batch.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float32, Int32


class Continuation(NamedTuple):
    """The rest of a sequence. Its tokens from index `answer_start` >= 1 on are what the model learns to predict."""

    tokens: tuple[int, ...]
    answer_start: int


class SequenceGroup(NamedTuple):
    """Sequences that begin with the same tokens, such as prompts that ask different questions on the same passages."""

    prefix: tuple[int, ...]
    continuations: tuple[Continuation, ...]

    @property
    def tokens(self) -> int:
        return len(self.prefix) + sum(len(c.tokens) for c in self.continuations)


class PackedBatch(NamedTuple):
    """B rows of sequence groups, and their targets, padded with weight 0.

    Every answer has the same total weight, 1, whatever its length.
    """

    tokens: Int32[Array, "B T"]
    positions: Int32[Array, "B T"]  # in the sequence
    segments: Int32[Array, "B T"]  # as rag.models.llama.model.Packing has them
    prefixes: Int32[Array, "B T"]
    target_at: Int32[Array, "n"]  # flat index, row * T + column, of the token before the target
    target: Int32[Array, "n"]
    weight: Float32[Array, "n"]


def pack_rows(lengths: Sequence[int], row_tokens: int, window: int = 256) -> list[list[int]]:
    """Return the groups (by index) of each row, by best-fit decreasing within `window` consecutive groups.

    Raises ValueError for a group longer than a row.
    """
    rows: list[list[int]] = []
    for start in range(0, len(lengths), window):
        some = sorted(range(start, min(start + window, len(lengths))), key=lambda i: (-lengths[i], i))
        opened: list[tuple[int, list[int]]] = []  # (free tokens, groups)
        for i in some:
            if lengths[i] > row_tokens:
                raise ValueError(
                    f"a sequence group of {lengths[i]} tokens does not fit a row of {row_tokens}"
                )
            fitting = [(free, at) for at, (free, _) in enumerate(opened) if free >= lengths[i]]
            if fitting:
                free, at = min(fitting)
                opened[at] = (free - lengths[i], [*opened[at][1], i])
            else:
                opened.append((row_tokens - lengths[i], [i]))
        rows += [members for _, members in opened]
    return rows


def count_targets(rows: Sequence[Sequence[SequenceGroup]]) -> int:
    """Return how many tokens of these rows are targets."""
    return sum(len(c.tokens) - c.answer_start for row in rows for group in row for c in group.continuations)


def make_batch(rows: Sequence[Sequence[SequenceGroup]], row_tokens: int, targets: int) -> PackedBatch:
    """Return the batch of these rows, with its targets padded to `targets`."""
    shape = (len(rows), row_tokens)
    tokens, positions, segments, prefixes = (np.full(shape, value, np.int32) for value in (0, 0, -1, -1))
    at: list[int] = []
    wanted: list[int] = []
    weights: list[float] = []

    def put(b: int, start: int, some: Sequence[int], position: int, segment: int, prefix: int) -> int:
        end = start + len(some)
        tokens[b, start:end], segments[b, start:end], prefixes[b, start:end] = some, segment, prefix
        positions[b, start:end] = np.arange(position, position + len(some))
        return end

    for b, row in enumerate(rows):
        end, segment = 0, 0
        for group in row:
            shared = segment
            end = put(b, end, group.prefix, 0, shared, -1)
            for continuation in group.continuations:
                segment += 1
                start, answer = end, continuation.tokens[continuation.answer_start :]
                end = put(b, start, continuation.tokens, len(group.prefix), segment, shared)
                at += range(b * row_tokens + end - len(answer) - 1, b * row_tokens + end - 1)
                wanted += answer
                weights += [1 / len(answer)] * len(answer)
            segment += 1
    padding = (0, targets - len(at))
    arrays = (
        *(tokens, positions, segments, prefixes),
        np.pad(np.array(at, np.int32), padding),
        np.pad(np.array(wanted, np.int32), padding),
        np.pad(np.array(weights, np.float32), padding),
    )
    return PackedBatch(*map(jnp.asarray, arrays))
