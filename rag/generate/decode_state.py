"""The state of decoding, and the jitted functions that prefill prompts into it and decode from it.

Prompts that are prefilled together are padded on the right to one length (rag.runtime.shapes), so that few shapes are
compiled; each row then writes at its own position.

Letters: B batch, T query tokens, S cache slots, M width, V vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rag.models.llama.model import KVCache, Llama, forward, logits
from rag.models.placement import Packed
from rag.ops.sampling import Sampling, sample


@partial(
    jax.tree_util.register_dataclass,
    data_fields=["cache", "token", "length", "remaining", "finished", "key", "seen"],
    meta_fields=[],
)
@dataclass(frozen=True)
class DecodeState:
    """Holds what the decode loop carries from step to step, for B rows."""

    cache: KVCache
    token: Int[Array, "B"]  # the newest token of each row, not yet in the cache
    length: Int[Array, "B"]  # tokens of each row in the cache
    remaining: Int[Array, "B"]  # tokens that may still be decoded
    finished: Bool[Array, "B"]
    key: Key[Array, "B"]  # one stream of random numbers a row
    seen: Bool[Array, "B V"]  # tokens of the prompt and the answer, for the repetition penalty


def is_finished(
    token: Int[Array, "B"], remaining: Int[Array, "B"], end_ids: tuple[int, ...]
) -> Bool[Array, "B"]:
    """Return which rows end: an end token was chosen, or no token remains. The one place with stop conditions."""
    return jnp.isin(token, jnp.asarray(end_ids, jnp.int32)) | (remaining <= 0)


def check_capacity(lengths: Sequence[int], new_tokens: int, capacity: int) -> None:
    """Raise RuntimeError unless `capacity` slots a row hold prompts of these lengths and `new_tokens` behind each.

    XLA clamps a position beyond the capacity: a token would silently overwrite the keys and values of another. Every
    function that fills a cache, or moves a row to another cache, calls this first.
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
    """Prefill right-padded prompts of `length` tokens, and choose the first new token of each row.

    Args:
        packed: the model.
        tokens: the prompts.
        length: tokens of each prompt without its padding.
        budget: new tokens that each row may have.
        key: one random key a row.
        capacity: slots S of the state's cache.
        sampling: how tokens are chosen.
        end_ids: the tokens that end an answer.
    """
    model, rows = packed.module, len(tokens)
    hidden, cache = forward(model, tokens, jnp.zeros(rows, jnp.int32))
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    cache = cache.resized(capacity)
    return choose_first_token(model, cache, last, tokens, length, budget, key, sampling, end_ids)


@partial(jax.jit, static_argnames=("sampling", "end_ids"), donate_argnames=("cache",))
def prefill_suffix(
    packed: Packed[Llama],
    cache: KVCache,
    tokens: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    last: Int[Array, ""],
    prompt: Int[Array, "1 S"],
    length: Int[Array, "1"],
    budget: Int[Array, "1"],
    key: Key[Array, "1"],
    *,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """Prefill those tokens of a prompt whose keys and values are not in the cache yet.

    tokens[0, last] is the prompt's last token; the padding behind it is at positions behind the prompt. `prompt` holds
    all `length` tokens.
    """
    hidden, cache = forward(packed.module, tokens, positions, cache)
    last_hidden = hidden[:, last]
    return choose_first_token(
        packed.module, cache, last_hidden, prompt, length, budget, key, sampling, end_ids
    )


@partial(jax.jit, static_argnames=("sampling", "end_ids"), donate_argnames=("cache",))
def start_decode(
    packed: Packed[Llama],
    cache: KVCache,
    last: Float[Array, "1 M"],
    prompt: Int[Array, "1 S"],
    length: Int[Array, "1"],
    budget: Int[Array, "1"],
    key: Key[Array, "1"],
    *,
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """Return the state behind a prompt that the cache holds; `last` is its last token's state after the last norm."""
    return choose_first_token(packed.module, cache, last, prompt, length, budget, key, sampling, end_ids)


def _tokens_seen(model: Llama, tokens: Int[Array, "B T"], length: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Return which tokens are among the first `length` of each row."""
    rows, width = tokens.shape
    valid = jnp.arange(width) < length[:, None]
    empty = jnp.zeros((rows, model.config.vocab_size), bool)
    return empty.at[jnp.arange(rows)[:, None], tokens].max(valid)


def choose_first_token(
    model: Llama,
    cache: KVCache,
    last: Float[Array, "B M"],
    prompts: Int[Array, "B T"],
    length: Int[Array, "B"],
    budget: Int[Array, "B"],
    key: Key[Array, "B"],
    sampling: Sampling,
    end_ids: tuple[int, ...],
) -> DecodeState:
    """Return the state behind `prompts` of `length` tokens, its first token chosen from their last hidden states."""
    seen = _tokens_seen(model, prompts, length)
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
    """Decode up to `steps` more tokens a row, in a lax loop or unrolled; -1 where a row had already finished."""
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
        carry = jax.lax.while_loop(unfinished, step, carry)
    else:
        for _ in range(steps):
            carry = step(carry)
    _, state, made = carry
    return state, made


def _choose_next(
    state: DecodeState, next_logits: Float[Array, "B V"], sampling: Sampling, end_ids: tuple[int, ...]
) -> DecodeState:
    """Return the state with its next token chosen; a finished row repeats its last one."""
    # Keys depend on the position, so that the number of steps a dispatch changes no draw.
    keys = jax.vmap(jax.random.fold_in)(state.key, state.length)
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
    """Return the prompts as rows of `width` tokens, padded on the right with zeros."""
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def random_keys(seeds: Sequence[int]) -> Key[Array, "B"]:
    """Return a random key for each row."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
