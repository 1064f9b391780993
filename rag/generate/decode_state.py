"""The state of decoding, and the jitted functions that prefill prompts into it and decode from it.

Prompts that are prefilled together are padded on the right to one length (rag.runtime.shapes), so that few shapes are
compiled; each row then writes at its own position.

Letters: B batch, T query tokens, S cache slots, M width, V vocab.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int, Key

from rag.generate.prefill_batches import TokenRequest
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


class Prompts(NamedTuple):
    """Prompts that are prefilled together, padded on the right, and what decides their answers."""

    tokens: Int[Array, "B T"]
    length: Int[Array, "B"]  # tokens of each prompt without its padding
    budget: Int[Array, "B"]  # new tokens that each row may have
    key: Key[Array, "B"]  # one stream of random numbers a row


@dataclass(frozen=True)
class DecodeRules:
    """How tokens are chosen, and which of them end an answer; static in every program."""

    sampling: Sampling
    end_ids: tuple[int, ...]


def is_finished(
    token: Int[Array, "B"], remaining: Int[Array, "B"], end_ids: tuple[int, ...]
) -> Bool[Array, "B"]:
    """Return which rows end: an end token was chosen, or no token remains. The one place with stop conditions."""
    return jnp.isin(token, jnp.asarray(end_ids, jnp.int32)) | (remaining <= 0)


def check_capacity(length: int, new_tokens: int, capacity: int) -> None:
    """Raise RuntimeError unless `capacity` slots hold a prompt of this length and its new tokens.

    XLA clamps a position beyond the capacity: a token would silently overwrite the keys and values of another. Every
    function that fills a cache, or moves a row to another cache, calls this first.
    """
    if length + new_tokens > capacity:
        raise RuntimeError(
            f"a prompt of {length} tokens and {new_tokens} new ones do not fit a cache of {capacity} slots"
        )


@partial(jax.jit, static_argnames=("capacity", "rules"))
def prefill_prompts(
    packed: Packed[Llama], prompts: Prompts, *, capacity: int, rules: DecodeRules
) -> DecodeState:
    """Prefill prompts, and choose the first new token of each row.

    Args:
        packed: the model.
        prompts: B of them, padded to T tokens.
        capacity: slots S of the state's cache.
        rules: how tokens are chosen.
    """
    model, (tokens, length, *_) = packed.module, prompts
    hidden, cache = forward(model, tokens, jnp.zeros(len(tokens), jnp.int32))
    last = jnp.take_along_axis(hidden, (length - 1)[:, None, None], axis=1)[:, 0]
    return choose_first_token(model, cache.resized(capacity), last, prompts, rules)


@partial(jax.jit, static_argnames=("rules",), donate_argnames=("cache",))
def prefill_suffix(
    packed: Packed[Llama],
    cache: KVCache,
    prompts: Prompts,
    fresh: Int[Array, "1 T"],
    positions: Int[Array, "1 T"],
    last: Int[Array, ""],
    *,
    rules: DecodeRules,
) -> DecodeState:
    """Prefill those tokens of one prompt whose keys and values are not in the cache yet.

    Args:
        packed: the model.
        cache: the keys and values of the other tokens; it is donated.
        prompts: one row with all tokens of the prompt.
        fresh: the tokens to prefill, padded on the right.
        positions: of these tokens in the prompt; the padding's are after the prompt.
        last: the index in `fresh` of the prompt's last token.
        rules: how tokens are chosen.
    """
    hidden, cache = forward(packed.module, fresh, positions, cache)
    return choose_first_token(packed.module, cache, hidden[:, last], prompts, rules)


@partial(jax.jit, static_argnames=("rules",), donate_argnames=("cache",))
def start_decode(
    packed: Packed[Llama], cache: KVCache, last: Float[Array, "1 M"], prompts: Prompts, *, rules: DecodeRules
) -> DecodeState:
    """Return the state after a prompt that the cache holds whole, with its first new token.

    Args:
        packed: the model.
        cache: the keys and values of all its tokens; it is donated.
        last: the last token's hidden state after the last norm.
        prompts: one row with the prompt.
        rules: how tokens are chosen.
    """
    return choose_first_token(packed.module, cache, last, prompts, rules)


def _tokens_seen(model: Llama, tokens: Int[Array, "B T"], length: Int[Array, "B"]) -> Bool[Array, "B V"]:
    """Return which tokens are among the first `length` of each row."""
    rows, width = tokens.shape
    valid = jnp.arange(width) < length[:, None]
    empty = jnp.zeros((rows, model.config.vocab_size), bool)
    return empty.at[jnp.arange(rows)[:, None], tokens].max(valid)


def choose_first_token(
    model: Llama, cache: KVCache, last: Float[Array, "B M"], prompts: Prompts, rules: DecodeRules
) -> DecodeState:
    """Return the state after prompts, with the first new token of each row.

    Args:
        model: the model.
        cache: the keys and values of the prompts.
        last: the hidden states of their last tokens after the last norm.
        prompts: their tokens, and what decides their answers.
        rules: how tokens are chosen.
    """
    tokens, length, budget, key = prompts
    seen = _tokens_seen(model, tokens, length)
    state = DecodeState(cache, length, length, budget, jnp.zeros(len(length), bool), key, seen)
    return _choose_next(state, logits(model, last), rules)  # .token was a placeholder


@partial(jax.jit, static_argnames=("steps", "rules", "loop"), donate_argnames=("state",))
def decode(
    packed: Packed[Llama],
    state: DecodeState,
    *,
    steps: int,
    rules: DecodeRules,
    loop: bool = True,
) -> tuple[DecodeState, Int[Array, "steps B"]]:
    """Decode up to `steps` more tokens a row.

    Args:
        packed: the model.
        state: it is donated.
        steps: at most; fewer if all rows finish.
        rules: how tokens are chosen.
        loop: whether the steps are a lax loop, or unrolled.

    Returns:
        The new state, and the tokens, -1 where a row had already finished.
    """
    model = packed.module

    def step(carry):
        i, state, made = carry
        hidden, cache = forward(model, state.token[:, None], state.length, state.cache)
        length = jnp.where(state.finished, state.length, state.length + 1)
        state = replace(state, cache=cache, length=length)
        new = _choose_next(state, logits(model, hidden[:, 0]), rules)
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


def _choose_next(state: DecodeState, next_logits: Float[Array, "B V"], rules: DecodeRules) -> DecodeState:
    """Return the state with its next token chosen; a finished row repeats its last one."""
    # Keys depend on the position, so that the number of steps a dispatch changes no draw.
    keys = jax.vmap(jax.random.fold_in)(state.key, state.length)
    token = sample(next_logits, keys, state.seen, rules.sampling)
    token = jnp.where(state.finished, state.token, token)
    remaining = jnp.where(state.finished, state.remaining, state.remaining - 1)
    return replace(
        state,
        token=token,
        remaining=remaining,
        finished=state.finished | is_finished(token, remaining, rules.end_ids),
        seen=state.seen.at[jnp.arange(token.shape[0]), token].set(True),
    )


def pad_requests(requests: Sequence[TokenRequest], width: int) -> Prompts:
    """Return the requests' prompts as rows of `width` tokens."""
    arrays = (
        pad_prompts([request.prompt for request in requests], width),
        np.array([len(request.prompt) for request in requests], np.int32),
        np.array([request.max_new_tokens for request in requests], np.int32),
    )
    tokens, length, budget = map(jax.device_put, arrays)
    return Prompts(tokens, length, budget, random_keys([request.seed for request in requests]))


def pad_prompts(prompts: Sequence[Sequence[int]], width: int) -> Int[np.ndarray, "B T"]:
    """Return the prompts as rows of `width` tokens, padded on the right with zeros."""
    rows = np.zeros((len(prompts), width), np.int32)
    for row, prompt in zip(rows, prompts, strict=True):
        row[: len(prompt)] = prompt
    return rows


def random_keys(seeds: Sequence[int]) -> Key[Array, "B"]:
    """Return a random key for each row."""
    return jax.vmap(jax.random.key)(np.asarray(seeds, np.uint32))
