"""Token ids in, token ids out: bucketed prefill, multi-step decode over a donated KV cache, batches of any lengths.

Prompts of a batch are padded on the right to one bucketed length, so that few shapes are compiled; each row
then writes at its own position. Decode runs several steps a dispatch in one `while_loop`, because in float32 that
costs nothing on CPU and hides the host's work between steps; XLA's int8 products fall off their fast path in loops on
some processors, so there the steps of a dispatch are unrolled, and one is the default.

Letters: B batch, T prompt tokens, C slots of the cache, M width, V vocab.
"""

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rag import native
from rag.models.checkpoint import Packed, pack
from rag.models.llama.model import KVCache, Llama, forward, logits
from rag.ops.sampling import Sampling, sample
from rag.runtime.shapes import round_up_prompt, round_up_suffix
from rag.types import UserError


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "length", "remaining", "finished", "key", "seen"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """All that decoding carries from step to step."""

    cache: KVCache
    token: Int[Array, "B"]  # the newest token of each row, not yet in the cache
    length: Int[Array, "B"]  # tokens of each row in the cache
    remaining: Int[Array, "B"]  # tokens that may still be made
    finished: Bool[Array, "B"]
    key: Key[Array, "B"]  # one stream of random numbers a row
    seen: Bool[Array, "B V"]  # tokens of the prompt and the answer, for the repetition penalty


def is_finished(
    token: Int[Array, "B"], remaining: Int[Array, "B"], end_ids: tuple[int, ...]
) -> Bool[Array, "B"]:
    """The one place where a row ends: an end token was made, or its budget is used up."""
    return jnp.isin(token, jnp.asarray(end_ids, jnp.int32)) | (remaining <= 0)


def check_capacity(lengths: Sequence[int], new_tokens: int, capacity: int) -> None:
    """Raise RuntimeError unless `capacity` slots a row hold prompts of these lengths and `new_tokens` behind each.

    XLA clamps a position past the capacity, so a token would overwrite the keys and values of another and the answer
    be wrong without a word. Whoever fills a cache, or moves a row to another one, asks here first.
    """
    if max(lengths) + new_tokens > capacity:
        raise RuntimeError(
            f"a prompt of {max(lengths)} tokens and {new_tokens} new ones do not fit a cache of {capacity} slots"
        )


@partial(jax.jit, static_argnames=("capacity", "sampling", "end_ids"))
def prefill(
    packed: Packed[Llama],
    tokens: Int[Array, "B T"],
    length: Int[Array, "B"],
    budget: Int[Array, "B"],
    key: Key[Array, "B"],
    *,
    capacity: int,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """Read right-padded prompts of `length` tokens and choose the first new token of each row."""
    model, rows = packed.module, len(tokens)
    hidden, cache = forward(model, tokens, jnp.zeros(rows, jnp.int32))
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    seen = tokens_seen(model, tokens, length)
    return choose_first_token(
        model, cache.resized(capacity), last, length, budget, key, seen, sampling, end_ids
    )


@partial(jax.jit, static_argnames=("sampling", "end_ids"), donate_argnames=("cache",))
def prefill_suffix(
    packed: Packed[Llama],
    cache: KVCache,
    fresh: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    last: Int[Array, ""],
    prompt: Int[Array, "1 C"],
    length: Int[Array, "1"],
    budget: Int[Array, "1"],
    key: Key[Array, "1"],
    *,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """Read the `fresh` tokens of a prompt whose others' keys and values are in the cache already.

    fresh[0, last] is the prompt's last token; what follows it is filling, at positions behind the prompt. `prompt`
    holds all `length` tokens.
    """
    hidden, cache = forward(packed.module, fresh, positions, cache)
    about = (prompt, length, budget, key)
    return start_decode(packed, cache, hidden[:, last], *about, sampling=sampling, end_ids=end_ids)


@partial(jax.jit, static_argnames=("sampling", "end_ids"), donate_argnames=("cache",))
def start_decode(
    packed: Packed[Llama],
    cache: KVCache,
    last: Float[Array, "1 M"],
    prompt: Int[Array, "1 C"],
    length: Int[Array, "1"],
    budget: Int[Array, "1"],
    key: Key[Array, "1"],
    *,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """The state behind a prompt that was read already: `last` is its last token's state after the last norm."""
    seen = tokens_seen(packed.module, prompt, length)
    return choose_first_token(packed.module, cache, last, length, budget, key, seen, sampling, end_ids)


def tokens_seen(model: Llama, tokens: Int[Array, "B T"], length: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Which tokens stand among the first `length` of each row."""
    rows, width = tokens.shape
    there = jnp.arange(width) < length[:, None]
    empty = jnp.zeros((rows, model.config.vocab_size), bool)
    return empty.at[jnp.arange(rows)[:, None], tokens].max(there)


def choose_first_token(
    model: Llama,
    cache: KVCache,
    last: Float[Array, "B M"],
    length: Int[Array, "B"],
    budget: Int[Array, "B"],
    key: Key[Array, "B"],
    seen: Bool[Array, "B V"],
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """The state with its first token chosen from the prompt's last hidden state."""
    state = DecodeState(cache, length, length, budget, jnp.zeros(len(length), bool), key, seen)
    return _choose_next(state, logits(model, last), sampling, end_ids)  # .token was a placeholder


@partial(jax.jit, static_argnames=("steps", "sampling", "end_ids", "loop"), donate_argnames=("state",))
def decode(
    packed: Packed[Llama],
    state: DecodeState,
    *,
    steps: int,
    sampling: Sampling,
    end_ids: tuple[int, ...],
    loop: bool = True,
) -> tuple[DecodeState, Int[Array, "steps B"]]:
    """Up to `steps` more tokens a row, in a lax loop or unrolled; -1 where a row had already finished."""
    model = packed.module

    def step(carry):
        i, state, made = carry
        hidden, cache = forward(model, state.token[:, None], state.length, state.cache)
        length = jnp.where(state.finished, state.length, state.length + 1)
        new = _choose_next(
            replace(state, cache=cache, length=length), logits(model, hidden[:, 0]), sampling, end_ids
        )
        return i + 1, new, made.at[i].set(jnp.where(state.finished, -1, new.token))

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.finished)

    carry = (0, state, jnp.full((steps, state.token.shape[0]), -1, jnp.int32))
    if loop:
        _, state, made = jax.lax.while_loop(unfinished, step, carry)
    else:
        for _ in range(steps):
            carry = step(carry)
        _, state, made = carry
    return state, made


def _choose_next(
    state: DecodeState, next_logits: Array, sampling: Sampling, end_ids: tuple[int, ...]
) -> DecodeState:
    """The state with its next token chosen; a finished row keeps its last one."""
    keys = jax.vmap(jax.random.fold_in)(state.key, state.length)  # by position: steps a dispatch don't matter
    token = sample(next_logits, keys, state.seen, sampling)
    token = jnp.where(state.finished, state.token, token)
    remaining = jnp.where(state.finished, state.remaining, state.remaining - 1)
    return replace(
        state,
        token=token,
        remaining=remaining,
        finished=state.finished | is_finished(token, remaining, end_ids),
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B T"]:
    """The prompts, padded on the right with zeros."""
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def random_keys(seeds: Sequence[int]) -> Key[Array, "B"]:
    """A stream of random numbers for each row."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))


def batch_by_length(lengths: Sequence[int], tokens_per_batch: int) -> Iterator[tuple[slice, int]]:
    """Which of the texts run together, for lengths that stand longest first: (a slice of them, rows to run).

    Rows times the padded length stay within `tokens_per_batch` unless one row alone is longer. The number of rows
    is a power of two, so that few programs are compiled; rows may exceed the slice.
    """
    start = 0
    while start < len(lengths):
        most = 1 << (max(1, tokens_per_batch // round_up_prompt(lengths[start])).bit_length() - 1)
        count = min(most, len(lengths) - start)
        yield slice(start, start + count), 1 << (count - 1).bit_length()
        start += count


class Engine:
    """A model with the ids that end its answers."""

    def __init__(self, model: Llama, end_ids: Collection[int], steps_per_dispatch: int | None = None):
        """`steps_per_dispatch` None: 4, or 1 where int8 products should not stand in a loop."""
        self.model, self.packed = model, pack(model)
        self.end_ids = tuple(sorted(end_ids))
        plain = model.embed_tokens.scale is None
        quick = model.native and native.has_tiles()  # else batches are XLA's
        self.loop = plain or quick or jax.default_backend() != "cpu"
        self.steps_per_dispatch = steps_per_dispatch or (4 if self.loop else 1)

    def capacity(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Slots of the cache for a prompt and its answer: what `prefill` makes and `resume` asks for."""
        return round_up_prompt(round_up_prompt(prompt_tokens) + max_new_tokens)

    def prefill(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
    ) -> DecodeState:
        """Read a batch of prompts; a row's seed alone decides its random draws.

        Raises UserError for an empty prompt, a budget below one token, and prompts that leave no room for it in
        the model's context.
        """
        self.check(prompts, max_new_tokens)
        longest = max(map(len, prompts))
        capacity = self.capacity(longest, max_new_tokens)
        check_capacity([longest], max_new_tokens, capacity)
        return prefill(
            self.packed,
            pad_prompts(prompts, round_up_prompt(longest)),
            np.array([len(prompt) for prompt in prompts], np.int32),
            np.full(len(prompts), max_new_tokens, np.int32),
            random_keys([0] * len(prompts) if seeds is None else seeds),
            capacity=capacity,
            sampling=sampling,
            end_ids=self.end_ids,
        )

    def resume(
        self,
        cache: KVCache,
        prompt: Sequence[int],
        fresh: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ) -> DecodeState:
        """Read the tokens of a prompt at the positions `fresh`, ascending; the cache, donated, holds all others.

        It has one row and `capacity` slots. The prompt's last token must be fresh: it decides the first new one.
        """
        self.check([prompt], max_new_tokens)
        count, capacity = len(fresh), cache.capacity
        if fresh[-1] != len(prompt) - 1 or capacity != self.capacity(len(prompt), max_new_tokens):
            raise ValueError("the last token must be fresh, and the cache of Engine.capacity")
        check_capacity([len(prompt)], max_new_tokens, capacity)
        width = round_up_suffix(count)
        behind = np.minimum(
            len(prompt) + np.arange(width - count), capacity - 1
        )  # overwritten before it is seen
        positions = np.concatenate([np.asarray(fresh, np.int32), behind]).astype(np.int32)
        tokens = np.asarray([*(prompt[at] for at in fresh), *[0] * (width - count)], np.int32)
        read = (tokens[None], positions[None], np.int32(count - 1))
        about = self._about(prompt, capacity, max_new_tokens, seed)
        return prefill_suffix(self.packed, cache, *read, *about, sampling=sampling, end_ids=self.end_ids)

    def begin(
        self,
        cache: KVCache,
        last: Float[Array, "1 M"],
        prompt: Sequence[int],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seed: int = 0,
    ) -> DecodeState:
        """The state behind a prompt that the cache, donated, holds whole; `last` is its last token's hidden state.

        Raises RuntimeError for a cache that the answer does not fit.
        """
        check_capacity([len(prompt)], max_new_tokens, cache.capacity)
        about = self._about(prompt, cache.capacity, max_new_tokens, seed)
        return start_decode(self.packed, cache, last, *about, sampling=sampling, end_ids=self.end_ids)

    def _about(self, prompt: Sequence[int], capacity: int, max_new_tokens: int, seed: int) -> tuple:
        """What a state is told of its prompt: tokens, length, budget and key."""
        size, budget = np.array([len(prompt)], np.int32), np.array([max_new_tokens], np.int32)
        return pad_prompts([prompt], capacity), size, budget, random_keys([seed])

    def decode(self, state: DecodeState, sampling: Sampling) -> tuple[DecodeState, Int[Array, "steps B"]]:
        """One dispatch: `steps_per_dispatch` more tokens a row, -1 where it had finished. The state is donated."""
        return decode(
            self.packed,
            state,
            steps=self.steps_per_dispatch,
            sampling=sampling,
            end_ids=self.end_ids,
            loop=self.loop,
        )

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
    ) -> "Decoding":
        """Prefill a batch of prompts; the answers' tokens come from the Decoding that is returned."""
        return Decoding(self, self.prefill(prompts, max_new_tokens, sampling, seeds), sampling)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
    ) -> list[list[int]]:
        """The new tokens of every prompt, without the token that ended it."""
        decoding = self.start(prompts, max_new_tokens, sampling, seeds)
        made: list[list[int]] = [[] for _ in prompts]
        for new in decoding:
            for row, tokens in zip(made, new, strict=True):
                row.extend(tokens)
        return made

    def check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
        """UserError for what `prefill` cannot read."""
        limit = self.model.config.max_position_embeddings
        if max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {max_new_tokens}; ask for at least one token")
        if not prompts or not all(prompts):
            raise UserError("a prompt holds no tokens; give the model something to read")
        longest = max(map(len, prompts))
        if longest + max_new_tokens > limit:
            raise UserError(
                f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the model's context of {limit}; "
                "shorten the prompt or lower max_new_tokens"
            )


class Decoding:
    """A batch being decoded: iterate for each row's new tokens; `finish(row)` ends a row early (a stop string)."""

    def __init__(self, engine: Engine, state: DecodeState, sampling: Sampling):
        self._engine, self._state, self._sampling = engine, state, sampling
        self._first = True

    @property
    def state(self) -> DecodeState:
        """As it stands; the next step donates it."""
        return self._state

    def finish(self, row: int) -> None:
        """Make no more tokens for this row."""
        self._state = replace(self._state, finished=self._state.finished.at[row].set(True))

    def __iter__(self) -> "Decoding":
        return self

    def __next__(self) -> list[list[int]]:
        """The next tokens of every row, none for a finished one, end tokens left out."""
        if self._first:  # prefill made it already
            self._first = False
            return self._rows(np.asarray(self._state.token)[None])
        if np.asarray(self._state.finished).all():
            raise StopIteration
        self._state, made = self._engine.decode(self._state, self._sampling)
        return self._rows(np.asarray(made))

    def _rows(self, made: np.ndarray) -> list[list[int]]:
        ended = (-1, *self._engine.end_ids)
        return [[token for token in row if token not in ended] for row in made.T.tolist()]
