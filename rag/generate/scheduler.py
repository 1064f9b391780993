"""Continuous batching (Orca, Yu et al., OSDI 2022): prompts join the rows of one decode batch as others leave them.

A batch of prompts is prefilled by a program of its own shape and inserted into free rows; all rows are decoded by one
program; a row is freed after the dispatch in which its answer ends. A common prefix of prompts is prefilled once, and
the rest of each prompt after it. Short prompts come first, because the cost of attention grows with the slots of the
cache, and these with the longest request; the cache grows when a longer prompt joins.

Letters: B batch rows, T query tokens, S tokens of a common prefix (its cache slots).
"""

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Int

from rag.generate.decode_state import (
    DecodeRules,
    DecodeState,
    Prompts,
    check_capacity,
    choose_first_token,
    pad_requests,
    prefill_prompts,
    random_keys,
)
from rag.generate.engine import Engine
from rag.generate.prefill_batches import MAX_ROWS, PrefillBatch, TokenRequest, max_rows, prefill_width
from rag.models.llama import model as llama
from rag.models.llama.model import KVCache, Llama, forward
from rag.models.placement import Packed
from rag.ops.sampling import Sampling
from rag.runtime.shapes import next_power_of_two


@jax.jit
def prefill_prefix(packed: Packed[Llama], tokens: Int[Array, "1 S"]) -> KVCache:
    """Return the keys and values of a common prefix."""
    return forward(packed.module, tokens, jnp.zeros(1, jnp.int32))[1]


@partial(jax.jit, static_argnames=("rules",))
def prefill_after_prefix(
    packed: Packed[Llama], prefix: KVCache, prompts: Prompts, *, rules: DecodeRules
) -> DecodeState:
    """Prefill as decode_state.prefill_prompts does, after a common prefix.

    Args:
        packed: the model.
        prefix: one row of exactly the prefix's keys and values.
        prompts: all of them begin with the prefix.
        rules: how tokens are chosen.
    """
    model, (tokens, length, *_), start = packed.module, prompts, prefix.capacity
    rows, width = tokens.shape
    cache = jax.tree.map(lambda a: jnp.repeat(a, rows, axis=0), prefix.resized(width))
    hidden, cache = forward(model, tokens[:, start:], jnp.full(rows, start, jnp.int32), cache)
    last = jnp.take_along_axis(hidden, (length - start - 1)[:, None, None], axis=1)[:, 0]
    return choose_first_token(model, cache, last, prompts, rules)


@partial(jax.jit, donate_argnames=("state",))
def insert_row(
    state: DecodeState, part: DecodeState, source: Int[Array, ""], row: Int[Array, ""]
) -> DecodeState:
    """Return the state with another state's row in place of one of its own.

    Args:
        state: it is donated.
        part: the other state; of its cache, the slots that both have are copied.
        source: the row of `part`.
        row: the row of `state` that is replaced.
    """
    shared = min(state.cache.capacity, part.cache.capacity)

    def put(into: Array, new: Array) -> Array:
        new = lax.dynamic_index_in_dim(new, source)
        new = new[:, :, :shared] if new.ndim == 4 else new  # 4: keys and values; the others have no slots
        return lax.dynamic_update_slice(into, new, (row, *[0] * (into.ndim - 1)))

    return jax.tree.map(put, state, part)


@partial(jax.jit, static_argnames=("rows", "capacity"))
def empty_state(part: DecodeState, rows: int, capacity: int) -> DecodeState:
    """Return a state of free rows with `part`'s dtypes."""

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


class BatchPrefiller:
    """Prefills batches of requests of equal sampling; caches the prefix of the newest prefix group."""

    def __init__(self, engine: Engine, requests: Sequence[TokenRequest]):
        self._engine, self._requests = engine, requests
        self._prefix: tuple[tuple[int, ...], KVCache] | None = None

    def __call__(self, batch: PrefillBatch) -> DecodeState:
        """Return a state with a row for each member of the batch, in order, its first new token chosen."""
        requests = [self._requests[i] for i in batch.members]
        width = prefill_width(max(len(request.prompt) for request in requests), batch.prefix)
        packed, prompts = self._engine.packed, pad_requests(requests, width)
        rules = self._engine.rules(requests[0].sampling)
        if not batch.prefix:
            return prefill_prompts(packed, prompts, capacity=width, rules=rules)
        prefix = self._cached_prefix(requests[0].prompt[: batch.prefix])
        return prefill_after_prefix(packed, prefix, prompts, rules=rules)

    def _cached_prefix(self, tokens: tuple[int, ...]) -> KVCache:
        if self._prefix is None or self._prefix[0] != tokens:
            self._prefix = (tokens, prefill_prefix(self._engine.packed, np.array([tokens], np.int32)))
        return self._prefix[1]


class Scheduler:
    """Assigns requests to the rows of one decode batch, and decodes them."""

    def __init__(self, engine: Engine, sampling: Sampling, tokens_per_batch: int, most: int = MAX_ROWS):
        """Make an empty batch.

        Args:
            engine: runs the model.
            sampling: of all requests.
            tokens_per_batch: cache slots of all rows, unless one row alone needs more.
            most: rows at most.
        """
        self._engine, self._sampling, self._most = engine, sampling, next_power_of_two(most)
        self._tokens_per_batch = tokens_per_batch
        self._capacity = 0
        self._requests: list[int | None] = []  # of each row; None: the row is free
        self._state: DecodeState | None = None  # None until the first batch joins

    @property
    def busy(self) -> int:
        """Return how many rows answer a request."""
        return sum(request is not None for request in self._requests)

    def has_room(self, batch: PrefillBatch) -> bool:
        """Return whether the batch can join now; if not, continue decoding."""
        rows = len(self._requests) if batch.capacity <= self._capacity else self._row_count(batch.capacity)
        return self.busy + len(batch.members) <= rows

    def join(self, batch: PrefillBatch, part: DecodeState) -> Iterator[tuple[int, list[int]]]:
        """Put the rows of `part`, the prefilled batch, into free rows.

        Yields:
            (request, its first token in a list; an empty list if the token ends the answer).

        Raises:
            RuntimeError: for a row that the cache could not hold with its whole answer, or without enough free rows.
        """
        left = np.asarray(part.remaining) + 1  # prefill chose the first new token
        for length, new_tokens in zip(np.asarray(part.length).tolist(), left.tolist(), strict=True):
            check_capacity(length, new_tokens, batch.capacity)
        if not self.has_room(batch):
            raise RuntimeError(
                f"{len(batch.members)} prompts were to join {self.busy} busy rows, which are too many"
            )
        if self._state is None or batch.capacity > self._capacity:
            self._state = self._grown(batch.capacity, part)
        finished = np.asarray(part.finished)
        first = self._engine.answer_tokens(np.asarray(part.token)[None])
        free = (row for row, request in enumerate(self._requests) if request is None)
        for source, (request, tokens) in enumerate(zip(batch.members, first, strict=True)):
            if not finished[source]:
                row = next(free)
                self._requests[row] = request
                self._state = insert_row(self._state, part, np.int32(source), np.int32(row))
            yield request, tokens

    def step(self) -> Iterator[tuple[int, list[int]]]:
        """Decode up to `Engine.steps_per_dispatch` steps; yield (request, its new tokens) of each busy row."""
        if self._state is None:
            raise RuntimeError("no request has joined yet")
        self._state, made = self._engine.decode(self._state, self._sampling)
        finished, answered = np.asarray(self._state.finished), tuple(self._requests)
        self._requests = [None if done else request for request, done in zip(answered, finished, strict=True)]
        for request, tokens in zip(answered, made, strict=True):
            if request is not None:
                yield request, tokens

    def leave(self, requests: set[int]) -> None:
        """Free the rows of these requests, unless they are free already."""
        gone = np.array([request in requests for request in self._requests])
        if self._state is not None and gone.any():
            self._requests = [None if request in requests else request for request in self._requests]
            self._state = replace(self._state, finished=self._state.finished | gone)

    def _row_count(self, capacity: int) -> int:
        return min(self._most, max_rows(capacity, self._tokens_per_batch))

    def _grown(self, capacity: int, part: DecodeState) -> DecodeState:
        """Return a state with more cache slots a row, perhaps fewer rows; busy rows move to the front."""
        busy = [(row, request) for row, request in enumerate(self._requests) if request is not None]
        count = self._row_count(capacity)
        state = empty_state(part, count, capacity)
        for row, (source, _) in enumerate(busy):
            state = insert_row(state, self._state, np.int32(source), np.int32(row))
        self._capacity = capacity
        self._requests = [request for _, request in busy] + [None] * (count - len(busy))
        return state


def run(
    batches: Sequence[PrefillBatch],
    prefill_batch: Callable[[PrefillBatch], DecodeState],
    scheduler: Scheduler,
    on_tokens: Callable[[int, list[int]], bool],
) -> None:
    """Answer all requests.

    Args:
        batches: the plan (rag.generate.prefill_batches.plan_prefill).
        prefill_batch: prefills one of them.
        scheduler: holds the rows.
        on_tokens: receives (request, its new tokens) and returns whether the answer continues.
    """
    waiting = deque(batches)
    while waiting or scheduler.busy:
        # With no row busy the next batch must have room: `join` raises where it has not.
        while waiting and (scheduler.has_room(waiting[0]) or not scheduler.busy):
            batch = waiting.popleft()
            joined = scheduler.join(batch, prefill_batch(batch))
            scheduler.leave({request for request, new in joined if not on_tokens(request, new)})
        if scheduler.busy:
            scheduler.leave({request for request, new in scheduler.step() if not on_tokens(request, new)})
