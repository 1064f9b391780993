"""Token ids in, token ids out: bucketed prefill, multi-step decode over a donated KV cache, batches of any lengths.

Prompts of a batch are padded on the right to one bucketed length, so that few shapes are compiled; each row
then writes at its own position. Decode runs several steps a dispatch in one `while_loop`, because in float32 that
costs nothing on CPU and hides the host's work between steps.

Letters: B batch, T prompt tokens, V vocab.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Int, Key

from rag.models.llama import KVCache, Llama, forward, logits
from rag.ops.sampling import Sampling, sample
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


@partial(jax.jit, static_argnames=("capacity", "sampling", "end_ids"))
def prefill(
    model: Llama,
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
    rows, width = tokens.shape
    hidden, cache = forward(model, tokens, jnp.zeros(rows, jnp.int32))
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    padding = jnp.arange(width) >= length[:, None]
    vocab = model.config.vocab_size
    seen = jnp.zeros((rows, vocab), bool).at[jnp.arange(rows)[:, None], tokens].max(~padding)
    state = DecodeState(
        cache.padded(capacity), length, length, budget, jnp.zeros(rows, bool), key, seen
    )  # .token is a placeholder that _advance fills
    return _advance(state, logits(model, last), sampling, end_ids)


@partial(jax.jit, static_argnames=("steps", "sampling", "end_ids"), donate_argnames=("state",))
def decode(
    model: Llama, state: DecodeState, *, steps: int, sampling: Sampling, end_ids: tuple[int, ...]
) -> tuple[DecodeState, Int[Array, "steps B"]]:
    """Up to `steps` more tokens a row; -1 where a row had already finished."""

    def step(carry):
        i, state, made = carry
        hidden, cache = forward(model, state.token[:, None], state.length, state.cache)
        length = jnp.where(state.finished, state.length, state.length + 1)
        new = _advance(
            replace(state, cache=cache, length=length), logits(model, hidden[:, 0]), sampling, end_ids
        )
        return i + 1, new, made.at[i].set(jnp.where(state.finished, -1, new.token))

    def unfinished(carry):
        i, state, _ = carry
        return (i < steps) & ~jnp.all(state.finished)

    made = jnp.full((steps, state.token.shape[0]), -1, jnp.int32)
    _, state, made = jax.lax.while_loop(unfinished, step, (0, state, made))
    return state, made


def _advance(
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


def bucket(length: int) -> int:
    """The padded length for `length` tokens: steps of 64 to 512, of 128 to 2,048, then of 512."""
    step = 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, -(-length // step) * step)


def batches(
    lengths: Sequence[int], tokens_per_batch: int, new_tokens: int = 0
) -> Iterator[tuple[slice, int]]:
    """Which of the prompts run together, for lengths that stand longest first: (a slice of them, rows to run).

    Rows times the padded length with its new tokens stay within `tokens_per_batch` unless one row alone is
    longer. The number of rows is a power of two, so that few programs are compiled; rows may exceed the slice.
    """
    start = 0
    while start < len(lengths):
        width = bucket(lengths[start]) if not new_tokens else bucket(bucket(lengths[start]) + new_tokens)
        most = 1 << (max(1, tokens_per_batch // width).bit_length() - 1)
        count = min(most, len(lengths) - start)
        yield slice(start, start + count), 1 << (count - 1).bit_length()
        start += count


class Engine:
    """A model with the ids that end its answers."""

    def __init__(self, model: Llama, end_ids: Collection[int], steps_per_dispatch: int = 4):
        self.model = model
        self.end_ids = tuple(sorted(end_ids))
        self.steps_per_dispatch = steps_per_dispatch

    def start(
        self,
        prompts: Sequence[Sequence[int]],
        max_new_tokens: int,
        sampling: Sampling = Sampling(),
        seeds: Sequence[int] | None = None,
    ) -> "Decoding":
        """Prefill a batch of prompts; the answers' tokens come from the Decoding that is returned.

        A row's seed alone decides its random draws. Raises UserError for an empty prompt, a budget below one
        token, and prompts that leave no room for it in the model's context.
        """
        self._check(prompts, max_new_tokens)
        lengths = np.array([len(prompt) for prompt in prompts], np.int32)
        tokens = np.zeros((len(prompts), bucket(max(map(len, prompts)))), np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[: len(prompt)] = prompt
        keys = jax.vmap(jax.random.key)(np.asarray(seeds or [0] * len(prompts), np.uint32))
        begin = time.perf_counter()
        state = prefill(
            self.model,
            tokens,
            lengths,
            np.full(len(prompts), max_new_tokens, np.int32),
            keys,
            capacity=bucket(tokens.shape[1] + max_new_tokens),
            sampling=sampling,
            end_ids=self.end_ids,
        )
        return Decoding(self, state, sampling, time.perf_counter() - begin)

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

    def _check(self, prompts: Sequence[Sequence[int]], max_new_tokens: int) -> None:
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
    """A batch being decoded: iterate for each row's new tokens; `finish(row)` ends a row early (a stop string).

    `prefill_prepare_s` and `decode_prepare_s` are the seconds that the first call of each program took to return:
    tracing and compiling it, or reading it from the compilation cache; the device works on after that.
    """

    def __init__(self, engine: Engine, state: DecodeState, sampling: Sampling, prefill_prepare_s: float):
        self._engine, self._state, self._sampling = engine, state, sampling
        self._first = True
        self.prefill_prepare_s, self.decode_prepare_s = prefill_prepare_s, 0.0

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
        engine, begin = self._engine, time.perf_counter()
        self._state, made = decode(
            engine.model,
            self._state,
            steps=engine.steps_per_dispatch,
            sampling=self._sampling,
            end_ids=engine.end_ids,
        )
        self.decode_prepare_s = self.decode_prepare_s or time.perf_counter() - begin
        return self._rows(np.asarray(made))

    def _rows(self, made: np.ndarray) -> list[list[int]]:
        ended = (-1, *self._engine.end_ids)
        return [[token for token in row if token not in ended] for row in made.T.tolist()]
