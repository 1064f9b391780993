"""Which prompts are prefilled together: batches of equal padded length, grouped by common prefixes."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from rag.runtime.shapes import round_up_cache, round_up_prompt, round_up_suffix

MAX_ROWS = 16  # at most; chosen, not measured
PREFILL_TOKENS = 1024  # tokens read at once; chosen, not measured
PREFIX_STEP = 64  # prefixes are cut to a multiple of this, so that few programs are compiled
MAX_BOUNDARY_BUDGET = 160  # new tokens at most that `straddling_budgets` proposes

TokenRequest = tuple[tuple[int, ...], int]  # a prompt's token ids, and the seed of its draws


@dataclass(frozen=True, slots=True)
class PrefillBatch:
    """Requests that are read together, a power of two of them."""

    members: tuple[int, ...]  # their places in the list of all requests
    capacity: int  # slots of the cache that each row needs, its answer included
    prefix: int = 0  # tokens that all of its family begin with


def prefix_groups(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """(prefix length, members) of each family of prompts that begin alike, so that most reading is saved.

    A prefix is 0 or a multiple of SHARED, and shorter than each of its prompts.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shared = [_shared_prefix(prompts[a], prompts[b]) // PREFIX_STEP * PREFIX_STEP for a, b in pairwise(order)]
    best = [
        (0, 0, 0)
    ]  # of the first n sorted prompts: tokens saved, and where their last family starts, its prefix
    for stop in range(1, len(order) + 1):
        alone, prefix = (best[stop - 1][0], stop - 1, 0), None
        best.append(alone)
        for start in range(
            stop - 2, -1, -1
        ):  # a run of sorted prompts shares the smallest of its neighbours' parts
            prefix = shared[start] if prefix is None else min(prefix, shared[start])
            if not prefix:
                break
            best[stop] = max(best[stop], (best[start][0] + prefix * (stop - start - 1), start, prefix))
    found, stop = [], len(order)
    while stop:
        _, start, prefix = best[stop]
        found.append((prefix, order[start:stop]))
        stop = start
    return found[::-1]


def _shared_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with, leaving each at least one of its own."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


def max_rows(capacity: int, tokens_per_batch: int) -> int:
    """How many rows of that capacity a batch has: a power of two, up to ROWS."""
    return min(MAX_ROWS, 1 << (max(1, tokens_per_batch // capacity).bit_length() - 1))


def plan_batches(
    requests: Sequence[TokenRequest], new_tokens: int, tokens_per_batch: int, apart: bool = False
) -> list[PrefillBatch]:
    """The requests in the order in which they join: short ones first, those of a family after one another.

    `apart` reads each by itself. No group needs less capacity than the one before it, nor more rows than it allows.
    """
    prompts = [prompt for prompt, _ in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), requests[i]))
    if apart:
        return [PrefillBatch((i,), _capacity(prompts[i], 0, new_tokens)) for i in order]
    place = {i: at for at, i in enumerate(order)}
    joined: dict[int, list[list[int]]] = {}
    for prefix, family in prefix_groups(prompts):
        joined.setdefault(prefix, []).append(family)
    alone = sorted((i for family in joined.pop(0, []) for i in family), key=place.__getitem__)
    found = [[group] for group in _batches(alone, prompts, 0, new_tokens, tokens_per_batch)] + [
        _batches(sorted(family, key=place.__getitem__), prompts, prefix, new_tokens, tokens_per_batch)
        for prefix, together in joined.items()
        for family in together
    ]
    found.sort(key=lambda groups: (groups[-1].capacity, min(place[i] for g in groups for i in g.members)))
    return [group for groups in found for group in groups]


def _batches(
    waiting: list[int], prompts: Sequence[tuple[int, ...]], prefix: int, new_tokens: int, room: int
) -> list[PrefillBatch]:
    """The sorted requests, as many at a time as are padded to the same length and fit."""
    groups = []
    # All of a family have the capacity of its longest, so that they can come one after another.
    family = _capacity(prompts[waiting[-1]], prefix, new_tokens) if prefix and waiting else 0
    while waiting:
        width = _prefill_width(len(prompts[waiting[0]]), prefix)
        most = max(1, PREFILL_TOKENS // (width - prefix))
        alike = sum(_prefill_width(len(prompts[i]), prefix) == width for i in waiting[:most])
        count = 1 << (alike.bit_length() - 1)
        # The last of them is the longest and decides the capacity; fewer may need less of it, and so fit.
        while True:
            capacity = family or _capacity(prompts[waiting[count - 1]], 0, new_tokens)
            if count <= max_rows(capacity, room):
                break
            count //= 2
        groups.append(PrefillBatch(tuple(waiting[:count]), capacity, prefix))
        waiting = waiting[count:]
    return groups


def _capacity(prompt: tuple[int, ...], prefix: int, new_tokens: int) -> int:
    """Slots for a prompt as it is prefilled, padding included, and for its answer."""
    return round_up_cache(max(_prefill_width(len(prompt), prefix), len(prompt) + new_tokens))


def _prefill_width(length: int, prefix: int) -> int:
    """Slots that a prompt takes while it is read."""
    return prefix + round_up_suffix(length - prefix) if prefix else round_up_prompt(length)


def boundary_budgets(lengths: Sequence[int], most: int) -> list[int]:
    """At most `most` numbers of new tokens for which a cache just has room behind one of these prompts.

    It is the shortest of prompts of `lengths` tokens that are prefilled together: who gives such a cache to the others
    too overwrites what they say. The numbers with the longest other prompts come first; none is above STRADDLING.
    """
    together = [list(alike) for _, alike in groupby(sorted(lengths), round_up_prompt)]
    spans = [(alike[0], alike[-1]) for alike in together]
    found = {
        round_up_cache(b) - a: b - a for a, b in sorted(spans, key=lambda span: span[1] - span[0]) if b > a
    }
    return sorted((n for n in found if n <= MAX_BOUNDARY_BUDGET), key=lambda n: -found[n])[:most]
