"""Choose which prompts are prefilled together: batches of equal padded length, grouped by common prefixes."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

import numpy as np
from jaxtyping import Int

from rag.generate import Request
from rag.ops.sampling import Sampling
from rag.runtime.shapes import (
    next_power_of_two,
    previous_power_of_two,
    round_up_cache,
    round_up_prompt,
    round_up_suffix,
)

MAX_ROWS = 16  # at most; chosen, not measured
PREFILL_TOKENS = 1024  # padded tokens prefilled at once; chosen, not measured
PREFIX_STEP = 64  # prefixes are cut to a multiple of this, so that few programs are compiled
MAX_BOUNDARY_BUDGET = 160  # new tokens at most that `boundary_budgets` proposes


@dataclass(frozen=True, slots=True)
class TokenRequest:
    """A Request whose conversation has become token ids."""

    prompt: tuple[int, ...]
    max_new_tokens: int
    sampling: Sampling = Sampling()
    seed: int = 0

    @staticmethod
    def of(prompt: Sequence[int], request: Request) -> "TokenRequest":
        """Return the request with these ids as its prompt; its stop strings need text and are left out."""
        return TokenRequest(tuple(prompt), request.max_new_tokens, request.sampling, request.seed)


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Requests that are prefilled together, a power of two of them."""

    members: tuple[int, ...]  # indices into the list of all requests
    capacity: int  # cache slots that each row needs, its answer included
    prefix: int = 0  # tokens of the common prefix of its group


def common_prefix(a: Sequence[int] | Int[np.ndarray, "n"], b: Sequence[int] | Int[np.ndarray, "m"]) -> int:
    """Return the number of tokens that two sequences begin with in common."""
    size = min(len(a), len(b))
    differ = np.flatnonzero(np.asarray(a[:size]) != np.asarray(b[:size]))
    return int(differ[0]) if len(differ) else size


def prefix_groups(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """Group prompts by common prefixes so that the fewest tokens are prefilled.

    Returns:
        (length of the common prefix, indices of the prompts) of each group. The length is 0 or a multiple of
        PREFIX_STEP, and shorter than each prompt of the group.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shared = [_usable_prefix(prompts[a], prompts[b]) for a, b in pairwise(order)]
    # best[n], of the first n sorted prompts: (tokens saved, start of their last group, its prefix).
    best = [(0, 0, 0)]
    for stop in range(1, len(order) + 1):
        best.append((best[stop - 1][0], stop - 1, 0))
        prefix = len(prompts[order[stop - 1]])
        for start in range(stop - 2, -1, -1):  # neighbours' smallest prefix is that of all of them
            prefix = min(prefix, shared[start])
            if not prefix:
                break
            best[stop] = max(best[stop], (best[start][0] + prefix * (stop - start - 1), start, prefix))
    groups, stop = [], len(order)
    while stop:
        _, start, prefix = best[stop]
        groups.append((prefix, order[start:stop]))
        stop = start
    return groups[::-1]


def _usable_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Return a multiple of PREFIX_STEP that leaves each prompt at least one token of its own."""
    return min(common_prefix(a, b), len(a) - 1, len(b) - 1) // PREFIX_STEP * PREFIX_STEP


def max_rows(capacity: int, tokens_per_batch: int) -> int:
    """Return how many rows of that capacity a batch has: a power of two, at most MAX_ROWS."""
    return min(MAX_ROWS, previous_power_of_two(max(1, tokens_per_batch // capacity)))


def plan_prefill(requests: Sequence[TokenRequest], tokens_per_batch: int) -> list[PrefillBatch]:
    """Return the batches in the order in which they join: short prompts first, each prefix group in one run.

    No batch needs less capacity than the one before it, nor more rows than `max_rows` of its capacity.
    """
    prompts = [request.prompt for request in requests]
    keys = [(len(r.prompt), r.prompt, r.seed, r.max_new_tokens) for r in requests]
    rank = {i: at for at, i in enumerate(sorted(range(len(requests)), key=keys.__getitem__))}
    groups: list[tuple[int, list[int]]] = []
    alone: list[int] = []  # prompts without a common prefix
    for prefix, group in prefix_groups(prompts):
        if prefix:
            groups.append((prefix, group))
        else:
            alone += group
    alone.sort(key=rank.__getitem__)
    runs = [[batch] for batch in _batches(alone, requests, 0, tokens_per_batch)] + [
        _batches(sorted(group, key=rank.__getitem__), requests, prefix, tokens_per_batch)
        for prefix, group in groups
    ]
    runs.sort(key=lambda run: (run[-1].capacity, min(rank[i] for batch in run for i in batch.members)))
    return [batch for run in runs for batch in run]


def _batches(
    waiting: list[int], requests: Sequence[TokenRequest], prefix: int, tokens_per_batch: int
) -> list[PrefillBatch]:
    """Cut sorted requests into batches of prompts that are padded to the same length and fit."""
    widths = {i: prefill_width(len(requests[i].prompt), prefix) for i in waiting}
    # Cache slots of a prompt as it is prefilled, padding included, and of its answer.
    slots = {i: max(widths[i], len(requests[i].prompt) + requests[i].max_new_tokens) for i in waiting}
    # All of a prefix group have the same capacity, so that its batches stay one after another.
    shared = round_up_cache(max(slots.values())) if prefix else 0
    batches = []
    while waiting:
        width = widths[waiting[0]]
        most = max(1, PREFILL_TOKENS // (width - prefix))
        count = previous_power_of_two(sum(widths[i] == width for i in waiting[:most]))
        while True:  # fewer may need less capacity, and so fit
            capacity = shared or round_up_cache(max(slots[i] for i in waiting[:count]))
            if count <= max_rows(capacity, tokens_per_batch):
                break
            count //= 2
        batches.append(PrefillBatch(tuple(waiting[:count]), capacity, prefix))
        waiting = waiting[count:]
    return batches


def prefill_width(length: int, prefix: int) -> int:
    """Return the cache slots that a prompt of `length` tokens takes while it is prefilled after a prefix."""
    return prefix + round_up_suffix(length - prefix) if prefix else round_up_prompt(length)


def batch_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[tuple[slice, int]]:
    """Cut texts, given by their lengths in descending order, into batches of about equal lengths.

    Rows times the padded length stay within `tokens_per_batch` unless one row alone is longer. The number of rows
    is a power of two, so that few programs are compiled; it may exceed the number of texts.

    Yields:
        (slice of the texts, number of rows).
    """
    start = 0
    while start < len(lengths):
        most = previous_power_of_two(max(1, tokens_per_batch // round_up_prompt(lengths[start])))
        count = min(most, len(lengths) - start)
        yield slice(start, start + count), next_power_of_two(count)
        start += count


def boundary_budgets(lengths: Sequence[int], most: int) -> list[int]:
    """Return numbers of new tokens for which a cache has just enough room after the shortest of some prompts.

    The prompts are those of `lengths` tokens that are prefilled together. An engine that gave a cache of the shortest
    to the others too would overwrite their tokens, so these numbers test it.

    Returns:
        At most `most` numbers, none above MAX_BOUNDARY_BUDGET, those with the longest other prompts first.
    """
    together = [list(alike) for _, alike in groupby(sorted(lengths), round_up_prompt)]
    spans = [(alike[0], alike[-1]) for alike in together]
    found = {
        round_up_cache(b) - a: b - a for a, b in sorted(spans, key=lambda span: span[1] - span[0]) if b > a
    }
    return sorted((n for n in found if n <= MAX_BOUNDARY_BUDGET), key=lambda n: -found[n])[:most]
