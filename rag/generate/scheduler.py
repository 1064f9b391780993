"""Continuous batching (Orca, Yu et al., OSDI 2022): prompts join the rows of one cache as others leave them.

A prompt is read in a program of its own length's shape and put into a free row; all rows are decoded by one program
of their own shape; a row whose answer ends is free at once. What prompts begin with in common is read once, and
the rest of each behind it. Short prompts come first, so that attention, which costs what the longest row has,
costs little for as long as possible; the cache grows when a longer prompt joins.

Letters: B rows, T tokens, P tokens of a shared prefix, M width.
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int, Key

from rag.generate.engine import (
    DecodeState,
    Engine,
    check_capacity,
    choose_first_token,
    pad_prompts,
    prefill,
    random_keys,
    tokens_seen,
)
from rag.generate.prefill_batches import MAX_ROWS, PrefillBatch, TokenRequest, _prefill_width, max_rows
from rag.models.checkpoint import Packed
from rag.models.llama import model as llama
from rag.models.llama.model import KVCache, Llama, forward
from rag.ops.sampling import Sampling


@jax.jit
def prefill_prefix(packed: Packed[Llama], tokens: Int[Array, "1 P"]) -> KVCache:
    """Keys and values of what a family of prompts begins with."""
    return forward(packed.module, tokens, jnp.zeros(1, jnp.int32))[1]


@partial(jax.jit, static_argnames=("sampling", "end_ids"))
def prefill_after_prefix(
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
    return choose_first_token(
        model, cache, last, length, budget, key, tokens_seen(model, tokens, length), sampling, end_ids
    )


@partial(jax.jit, donate_argnames=("state",))
def insert_row(
    state: DecodeState, part: DecodeState, source: Int[Array, ""], row: Int[Array, ""]
) -> DecodeState:
    """The state with `part`'s row `source` in its `row`; slots of the cache that only one of the two has, aside."""
    shared = min(state.cache.capacity, part.cache.capacity)

    def put(into: Array, new: Array) -> Array:
        new = lax.dynamic_index_in_dim(new, source)
        new = new[:, :, :shared] if new.ndim == 4 else new
        return lax.dynamic_update_slice(into, new, (row, *[0] * (into.ndim - 1)))

    return jax.tree.map(put, state, part)


@partial(jax.jit, static_argnames=("rows", "capacity"))
def empty_state(part: DecodeState, rows: int, capacity: int) -> DecodeState:
    """A state of free rows, of `part`'s types."""

    def empty(a: Array) -> Array:
        return jnp.full((rows, a.shape[1], capacity, a.shape[3]), llama.UNUSED_SLOT, a.dtype)

    shape = (rows,)
    return DecodeState(
        cache=jax.tree.map(empty, part.cache),
        token=jnp.zeros(shape, jnp.int32),
        length=jnp.zeros(shape, jnp.int32),
        remaining=jnp.zeros(shape, jnp.int32),
        finished=jnp.ones(shape, bool),
        key=random_keys([0] * rows),
        seen=jnp.zeros((rows, part.seen.shape[1]), bool),
    )


class BatchPrefill:
    """Reads groups of requests; the newest family's prefix is kept."""

    def __init__(
        self,
        engine: Engine,
        requests: Sequence[TokenRequest],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
    ):
        self._engine, self._requests = engine, requests
        self._budget, self._sampling = max_new_tokens, sampling
        self._prefix: tuple[tuple[int, ...], KVCache] | None = None

    def __call__(self, group: PrefillBatch) -> DecodeState:
        """A row for each member, in order, its first new token chosen."""
        prompts, seeds = zip(*(self._requests[i] for i in group.members), strict=True)
        longest = max(map(len, prompts))
        inputs = (
            pad_prompts(prompts, _prefill_width(longest, group.prefix)),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.full(len(prompts), self._budget, np.int32),
            random_keys(seeds),
        )
        options = {"sampling": self._sampling, "end_ids": self._engine.end_ids}
        if not group.prefix:
            return prefill(self._engine.packed, *inputs, capacity=inputs[0].shape[1], **options)
        return prefill_after_prefix(
            self._engine.packed, self._shared(prompts[0][: group.prefix]), *inputs, **options
        )

    def _shared(self, tokens: tuple[int, ...]) -> KVCache:
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = (tokens, prefill_prefix(self._engine.packed, np.array([tokens], np.int32)))
        return self._prefix[1]


class Scheduler:
    """The rows of one decoding batch, and which request each serves."""

    def __init__(self, engine: Engine, sampling: Sampling, tokens_per_batch: int, most: int = MAX_ROWS):
        """`most` rows are needed at any time, whatever `tokens_per_batch` allows."""
        self._engine, self._sampling, self._most = engine, sampling, 1 << (most - 1).bit_length()
        self._tokens_per_batch = tokens_per_batch
        self._capacity, self._serves, self._state = 0, [], None

    @property
    def busy(self) -> int:
        """How many rows serve a request."""
        return sum(request is not None for request in self._serves)

    def has_room(self, group: PrefillBatch) -> bool:
        """Whether the group can join now; as long as not, decode on."""
        rows = len(self._serves) if group.capacity <= self._capacity else self._count(group.capacity)
        return self.busy + len(group.members) <= rows

    def join(self, group: PrefillBatch, part: DecodeState) -> Iterator[tuple[int, list[int]]]:
        """Put the rows of `part` into free ones; each member with its first token, none if that ends it.

        Raises RuntimeError for a row that the cache could not hold to its end, and without enough free rows.
        """
        left = np.asarray(part.remaining).max() + 1  # the first new token is made already
        check_capacity(np.asarray(part.length).tolist(), int(left), group.capacity)
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
                self._state = insert_row(self._state, part, np.int32(source), np.int32(row))
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
        return min(self._most, max_rows(capacity, self._tokens_per_batch))

    def _grow(self, capacity: int, part: DecodeState) -> None:
        """Larger rows, perhaps fewer; those in use move to the front."""
        old, served = self._state, [(row, r) for row, r in enumerate(self._serves) if r is not None]
        count = self._count(capacity)
        self._capacity, self._state = capacity, empty_state(part, count, capacity)
        self._serves = [request for _, request in served] + [None] * (count - len(served))
        for row, (source, _) in enumerate(served):
            self._state = insert_row(self._state, old, np.int32(source), np.int32(row))

    def _made(self, made: np.ndarray) -> list[list[int]]:
        ended = (-1, *self._engine.end_ids)
        return [[token for token in row if token not in ended] for row in made.T.tolist()]


def run(
    groups: Sequence[PrefillBatch],
    read: Callable[[PrefillBatch], DecodeState],
    rows: Scheduler,
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
