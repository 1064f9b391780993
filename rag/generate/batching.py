"""Continuous batching (Orca, Yu et al., OSDI 2022): prompts join the rows of one cache as others leave them.

A prompt is read in a program of its own length's shape and put into a free row; all rows are decoded by one program
of their own shape; a row whose answer ends is free at once. What prompts begin with in common is read once, and
the rest of each behind it. Short prompts come first, so that attention, which costs what the longest row has,
costs little for as long as possible; the cache grows when a longer prompt joins.

Letters: B rows, T tokens, P tokens of a shared prefix, M width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

from rag.generate.engine import (
    DecodeState,
    Engine,
    bucket,
    check_room,
    choose_first,
    fresh_bucket,
    padded_rows,
    prefill,
    row_keys,
    tokens_seen,
)
from rag.models import llama
from rag.models.checkpoint import Packed
from rag.models.llama import KVCache, Llama, forward
from rag.ops.sampling import Sampling

ROWS = 16  # at most; chosen, not measured
READ = 1024  # tokens read at once; chosen, not measured
SHARED = 64  # prefixes are cut to a multiple of this, so that few programs are compiled
CAPACITY = 512  # for the same reason the cache has a multiple of so many slots, or below it a power of two
STRADDLING = 160  # new tokens at most that `straddling_budgets` proposes

Request = tuple[tuple[int, ...], int]  # a prompt's token ids, and the seed of its draws


@dataclass(frozen=True, slots=True)
class Group:
    """Requests that are read together, a power of two of them."""

    members: tuple[int, ...]  # their places in the list of all requests
    capacity: int  # slots of the cache that each row needs, its answer included
    prefix: int = 0  # tokens that all of its family begin with


@jax.jit
def read_prefix(packed: Packed[Llama], tokens: Int[Array, "1 P"]) -> KVCache:
    """Keys and values of what a family of prompts begins with."""
    return forward(packed.module, tokens, jnp.zeros(1, jnp.int32))[1]


@partial(jax.jit, static_argnames=("sampling", "end_ids"))
def follow(
    packed: Packed[Llama],
    prefix: KVCache,
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    budget: Int[Array, "B"],
    key: Key[Array, "B"],
    *,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """As `engine.prefill` of right-padded prompts, all of which begin with the tokens of the one-row `prefix`."""
    model, (rows, width), start = packed.module, tokens.shape, prefix.capacity
    cache = jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), prefix.resized(width))
    hidden, cache = forward(model, tokens[:, start:], jnp.full(rows, start, jnp.int32), cache)
    last = jnp.take_along_axis(hidden, (length - start - 1)[:, None, None], axis=1)[:, 0]
    return choose_first(
        model, cache, last, length, budget, key, tokens_seen(model, tokens, length), sampling, end_ids
    )


@partial(jax.jit, donate_argnames=("state",))
def insert(state: DecodeState, part: DecodeState, source: Int[Array, ""], row: Int[Array, ""]) -> DecodeState:
    """The state with `part`'s row `source` in its `row`; slots of the cache that only one of the two has, aside."""
    shared = min(state.cache.capacity, part.cache.capacity)

    def put(into: Array, new: Array) -> Array:
        new = lax.dynamic_index_in_dim(new, source)
        new = new[:, :, :shared] if new.ndim == 4 else new
        return lax.dynamic_update_slice(into, new, (row, *[0] * (into.ndim - 1)))

    return jax.tree.map(put, state, part)


@partial(jax.jit, static_argnames=("rows", "capacity"))
def vacant(part: DecodeState, rows: int, capacity: int) -> DecodeState:
    """A state of free rows, of `part`'s types."""

    def empty(a: Array) -> Array:
        return jnp.full((rows, a.shape[1], capacity, a.shape[3]), llama.UNUSED, a.dtype)

    shape = (rows,)
    return DecodeState(
        cache=jax.tree.map(empty, part.cache),
        token=jnp.zeros(shape, jnp.int32),
        length=jnp.zeros(shape, jnp.int32),
        remaining=jnp.zeros(shape, jnp.int32),
        finished=jnp.ones(shape, bool),
        key=row_keys([0] * rows),
        seen=jnp.zeros((rows, part.seen.shape[1]), bool),
    )


def families(prompts: Sequence[tuple[int, ...]]) -> list[tuple[int, list[int]]]:
    """(prefix length, members) of each family of prompts that begin alike, so that most reading is saved.

    A prefix is 0 or a multiple of SHARED, and shorter than each of its prompts.
    """
    order = sorted(range(len(prompts)), key=prompts.__getitem__)
    shared = [_common(prompts[a], prompts[b]) // SHARED * SHARED for a, b in pairwise(order)]
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


def _common(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    """Tokens that both begin with, leaving each at least one of its own."""
    most = min(len(a), len(b)) - 1
    return next((i for i in range(most) if a[i] != b[i]), most)


def slots(tokens: int) -> int:
    """The cache's capacity for that many tokens a row."""
    if tokens <= CAPACITY:
        return max(128, 1 << (tokens - 1).bit_length())
    return -(-tokens // CAPACITY) * CAPACITY


def rows_for(capacity: int, tokens_per_batch: int) -> int:
    """How many rows of that capacity a batch has: a power of two, up to ROWS."""
    return min(ROWS, 1 << (max(1, tokens_per_batch // capacity).bit_length() - 1))


def plan(
    requests: Sequence[Request], new_tokens: int, tokens_per_batch: int, apart: bool = False
) -> list[Group]:
    """The requests in the order in which they join: short ones first, those of a family after one another.

    `apart` reads each by itself. No group needs less capacity than the one before it, nor more rows than it allows.
    """
    prompts = [prompt for prompt, _ in requests]
    order = sorted(range(len(requests)), key=lambda i: (len(prompts[i]), requests[i]))
    if apart:
        return [Group((i,), _capacity(prompts[i], 0, new_tokens)) for i in order]
    place = {i: at for at, i in enumerate(order)}
    joined: dict[int, list[list[int]]] = {}
    for prefix, family in families(prompts):
        joined.setdefault(prefix, []).append(family)
    alone = sorted((i for family in joined.pop(0, []) for i in family), key=place.__getitem__)
    found = [[group] for group in _groups(alone, prompts, 0, new_tokens, tokens_per_batch)] + [
        _groups(sorted(family, key=place.__getitem__), prompts, prefix, new_tokens, tokens_per_batch)
        for prefix, together in joined.items()
        for family in together
    ]
    found.sort(key=lambda groups: (groups[-1].capacity, min(place[i] for g in groups for i in g.members)))
    return [group for groups in found for group in groups]


def _groups(
    waiting: list[int], prompts: Sequence[tuple[int, ...]], prefix: int, new_tokens: int, room: int
) -> list[Group]:
    """The sorted requests, as many at a time as are padded to the same length and fit."""
    groups = []
    # All of a family have the capacity of its longest, so that they can come one after another.
    family = _capacity(prompts[waiting[-1]], prefix, new_tokens) if prefix and waiting else 0
    while waiting:
        width = _width(len(prompts[waiting[0]]), prefix)
        most = max(1, READ // (width - prefix))
        alike = sum(_width(len(prompts[i]), prefix) == width for i in waiting[:most])
        count = 1 << (alike.bit_length() - 1)
        # The last of them is the longest and decides the capacity; fewer may need less of it, and so fit.
        while True:
            capacity = family or _capacity(prompts[waiting[count - 1]], 0, new_tokens)
            if count <= rows_for(capacity, room):
                break
            count //= 2
        groups.append(Group(tuple(waiting[:count]), capacity, prefix))
        waiting = waiting[count:]
    return groups


def _capacity(prompt: tuple[int, ...], prefix: int, new_tokens: int) -> int:
    """Slots for a prompt as it is prefilled, padding included, and for its answer."""
    return slots(max(_width(len(prompt), prefix), len(prompt) + new_tokens))


def _width(length: int, prefix: int) -> int:
    """Slots that a prompt takes while it is read."""
    return prefix + fresh_bucket(length - prefix) if prefix else bucket(length)


def straddling_budgets(lengths: Sequence[int], most: int) -> list[int]:
    """At most `most` numbers of new tokens for which a cache just has room behind one of these prompts.

    It is the shortest of prompts of `lengths` tokens that are prefilled together: who gives such a cache to the others
    too overwrites what they say. The numbers with the longest other prompts come first; none is above STRADDLING.
    """
    together = [list(alike) for _, alike in groupby(sorted(lengths), bucket)]
    spans = [(alike[0], alike[-1]) for alike in together]
    found = {slots(b) - a: b - a for a, b in sorted(spans, key=lambda span: span[1] - span[0]) if b > a}
    return sorted((n for n in found if n <= STRADDLING), key=lambda n: -found[n])[:most]


class Prompts:
    """Reads groups of requests; the newest family's prefix is kept."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[Request],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
    ):
        self._engine, self._requests = engine, requests
        self._budget, self._sampling = max_new_tokens, sampling
        self._prefix: tuple[tuple[int, ...], KVCache] | None = None

    def __call__(self, group: Group) -> DecodeState:
        """A row for each member, in order, its first new token chosen."""
        prompts, seeds = zip(*(self._requests[i] for i in group.members), strict=True)
        longest = max(map(len, prompts))
        inputs = (
            padded_rows(prompts, _width(longest, group.prefix)),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.full(len(prompts), self._budget, np.int32),
            row_keys(seeds),
        )
        options = {"sampling": self._sampling, "end_ids": self._engine.end_ids}
        if not group.prefix:
            return prefill(self._engine.packed, *inputs, capacity=inputs[0].shape[1], **options)
        return follow(self._engine.packed, self._shared(prompts[0][: group.prefix]), *inputs, **options)

    def _shared(self, tokens: tuple[int, ...]) -> KVCache:
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = (tokens, read_prefix(self._engine.packed, np.array([tokens], np.int32)))
        return self._prefix[1]


class Rows:
    """The rows of one decoding batch, and which request each serves."""

    def __init__(self, engine: Engine, sampling: Sampling, tokens_per_batch: int, most: int = ROWS):
        """`most` rows are needed at any time, whatever `tokens_per_batch` allows."""
        self._engine, self._sampling, self._most = engine, sampling, 1 << (most - 1).bit_length()
        self._tokens_per_batch = tokens_per_batch
        self._capacity, self._serves, self._state = 0, [], None

    @property
    def busy(self) -> int:
        """How many rows serve a request."""
        return sum(request is not None for request in self._serves)

    def has_room(self, group: Group) -> bool:
        """Whether the group can join now; as long as not, decode on."""
        rows = len(self._serves) if group.capacity <= self._capacity else self._count(group.capacity)
        return self.busy + len(group.members) <= rows

    def join(self, group: Group, part: DecodeState) -> Iterator[tuple[int, list[int]]]:
        """Put the rows of `part` into free ones; each member with its first token, none if that ends it.

        Raises RuntimeError for a row that the cache could not hold to its end, and without enough free rows.
        """
        left = np.asarray(part.remaining).max() + 1  # the first new token is made already
        check_room(np.asarray(part.length).tolist(), int(left), group.capacity)
        if not self.has_room(group):
            raise RuntimeError(
                f"{len(group.members)} prompts were to join {self.busy} busy rows, which are too many"
            )
        if group.capacity > self._capacity:
            self._grow(group.capacity, part)
        tokens, finished = np.asarray(part.token)[None], np.asarray(part.finished)
        free = (row for row, request in enumerate(self._serves) if request is None)
        for source, (request, new) in enumerate(zip(group.members, self._made(tokens), strict=True)):
            if not finished[source]:
                row = next(free)
                self._serves[row] = request
                self._state = insert(self._state, part, np.int32(source), np.int32(row))
            yield request, new

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Decode one dispatch; each request that is served with its new tokens."""
        self._state, made = self._engine.decode(self._state, self._sampling)
        made, finished, served = np.asarray(made), np.asarray(self._state.finished), tuple(self._serves)
        self._serves = [None if done else request for request, done in zip(served, finished, strict=True)]
        for request, new in zip(served, self._made(made), strict=True):
            if request is not None:
                yield request, new

    def leave(self, requests: set[int]) -> None:
        """End the rows of these requests, if they have not ended by themselves."""
        gone = np.array([request in requests for request in self._serves])
        if gone.any():
            self._serves = [None if request in requests else request for request in self._serves]
            self._state = replace(self._state, finished=self._state.finished | gone)

    def _count(self, capacity: int) -> int:
        return min(self._most, rows_for(capacity, self._tokens_per_batch))

    def _grow(self, capacity: int, part: DecodeState) -> None:
        """Larger rows, perhaps fewer; those in use move to the front."""
        old, served = self._state, [(row, r) for row, r in enumerate(self._serves) if r is not None]
        count = self._count(capacity)
        self._capacity, self._state = capacity, vacant(part, count, capacity)
        self._serves = [request for _, request in served] + [None] * (count - len(served))
        for row, (source, _) in enumerate(served):
            self._state = insert(self._state, old, np.int32(source), np.int32(row))

    def _made(self, made: np.ndarray) -> list[list[int]]:
        ended = (-1, *self._engine.end_ids)
        return [[token for token in row if token not in ended] for row in made.T.tolist()]


def serve(
    groups: Sequence[Group],
    read: Callable[[Group], DecodeState],
    rows: Rows,
    take: Callable[[int, list[int]], bool],
) -> None:
    """Answer all requests: `take(request, new tokens)` receives each answer and says whether it should go on."""
    waiting = deque(groups)
    while waiting or rows.busy:
        # With no row busy the next group must have room: `join` raises where it has not.
        while waiting and (rows.has_room(waiting[0]) or not rows.busy):
            group = waiting.popleft()
            rows.leave({request for request, new in rows.join(group, read(group)) if not take(request, new)})
        if rows.busy:
            rows.leave({request for request, new in rows.step() if not take(request, new)})
