"""Compute the log-probabilities of given continuations of given prompts: one forward pass a batch, no decoding.

Prompt and continuation go through the model together; the hidden state before each token of the continuation gives
that token's log-probability. Logits are computed for those states alone, `TOKENS_PER_CALL` of them at a time: the
whole batch's would be T x V numbers, fifty times the size of everything else.

Letters: B batch, T query tokens, M width, V vocab, n tokens of continuations.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int

from rag.generate.decode_state import check_capacity
from rag.generate.prefill_batches import batch_by_length
from rag.models.llama.model import KVCache, Llama, forward, logits
from rag.models.placement import Packed
from rag.runtime.shapes import round_up, round_up_prompt, round_up_suffix
from rag.types import UserError

TOKENS_PER_CALL = 128  # scored in one call; V x 128 logits are 25 MB for a vocabulary of 49,152

Pair = tuple[Sequence[int], Sequence[int]]  # the ids of a prompt and of its continuation


@jax.jit
def hidden_states(model: Llama, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
    """Return states after the last norm; rows padded on the right are safe, because attention is causal."""
    return forward(model, tokens, jnp.zeros(tokens.shape[0], jnp.int32))[0]


@jax.jit
def token_log_probs(
    model: Llama,
    hidden: Float[Array, "B T M"],
    row: Int[Array, "n"],
    position: Int[Array, "n"],
    token: Int[Array, "n"],
) -> Float32[Array, "n"]:
    """Return the log-probabilities of tokens, by a float32 softmax over the vocabulary.

    Args:
        model: the model.
        hidden: the states of `hidden_states`.
        row: the row of each token's text.
        position: of the token before it in that row.
        token: the tokens.
    """
    scores = logits(model, hidden[row, position])
    return jnp.take_along_axis(scores, token[:, None], axis=1)[:, 0] - jax.nn.logsumexp(scores, axis=1)


def log_probs(
    model: Llama, pairs: Sequence[Pair], tokens_per_batch: int = 1024
) -> list[Float32[np.ndarray, "n"]]:
    """Return the log-probability of every token of each pair's continuation, given all tokens before it.

    Pairs of similar lengths run together, about `tokens_per_batch` padded tokens at a time; which do depends on
    the pairs and not on their order. Raises UserError for a prompt without tokens, because the first token would
    follow nothing, and for a pair that exceeds the model's context.
    """
    _check(pairs, model.config.max_position_embeddings)
    found = [np.zeros(0, np.float32) for _ in pairs]
    scored = [i for i, (_, continuation) in enumerate(pairs) if len(continuation)]
    inputs = {i: [*pairs[i][0], *pairs[i][1][:-1]] for i in scored}  # nothing follows the last token
    order = sorted(scored, key=lambda i: (-len(inputs[i]), inputs[i], pairs[i][1][-1]))
    for some, size in batch_by_length([len(inputs[i]) for i in order], tokens_per_batch):
        members = order[some]
        tokens = np.zeros((size, round_up_prompt(len(inputs[members[0]]))), np.int32)
        for row, i in zip(tokens, members, strict=False):  # rows after the members are padding
            row[: len(inputs[i])] = inputs[i]
        for i, values in zip(
            members, _batch_log_probs(model, tokens, [pairs[i] for i in members]), strict=True
        ):
            found[i] = values
    return found


@jax.jit
def hidden_after_cache(
    packed: Packed[Llama], cache: KVCache, tokens: Int[Array, "1 T"], positions: Int[Array, "1 T"]
) -> Float[Array, "1 T M"]:
    """Return the states of tokens after others that are in a cache.

    Args:
        packed: the model.
        cache: the keys and values of other positions.
        tokens: some of the text.
        positions: of these tokens, ascending.
    """
    return forward(packed.module, tokens, positions, cache)[0]


def log_probs_after_cache(
    packed: Packed[Llama],
    cache: KVCache,
    prompt: Sequence[int],
    fresh: Sequence[int],
    continuation: Sequence[int],
) -> Float32[np.ndarray, "n"]:
    """Return what `log_probs` returns for one pair, with most of the prompt in a cache.

    Args:
        packed: the model.
        cache: the keys and values of the prompt's tokens except the fresh ones, with room for the continuation.
        prompt: all its tokens.
        fresh: the positions of the tokens that are not in the cache; the last token must be one of them.
        continuation: the tokens to score.
    """
    hidden = _states_after_cache(packed, cache, prompt, fresh, continuation[:-1])
    wanted = np.zeros((3, round_up(len(continuation), TOKENS_PER_CALL)), np.int32)
    wanted[1, : len(continuation)] = len(fresh) - 1 + np.arange(len(continuation))
    wanted[2, : len(continuation)] = continuation
    return _log_probs_of(packed.module, hidden, wanted)[: len(continuation)]


def next_log_probs(model: Llama, prompt: Sequence[int]) -> Float32[np.ndarray, "V"]:
    """Return the log-probability of every token to be the first after the prompt."""
    tokens = np.zeros((1, round_up_prompt(len(prompt))), np.int32)
    tokens[0, : len(prompt)] = prompt
    return np.asarray(_distribution(model, hidden_states(model, tokens), np.int32(len(prompt) - 1)))


def next_log_probs_after_cache(
    packed: Packed[Llama], cache: KVCache, prompt: Sequence[int], fresh: Sequence[int]
) -> Float32[np.ndarray, "V"]:
    """Return what `next_log_probs` returns, with most of the prompt in a cache; see `log_probs_after_cache`.

    Args:
        packed: the model.
        cache: the keys and values of the prompt's tokens except the fresh ones.
        prompt: all its tokens.
        fresh: the positions of the tokens that are not in the cache; the last token must be one of them.
    """
    hidden = _states_after_cache(packed, cache, prompt, fresh, ())
    return np.asarray(_distribution(packed.module, hidden, np.int32(len(fresh) - 1)))


@jax.jit
def _distribution(
    model: Llama, hidden: Float[Array, "1 T M"], position: Int[Array, ""]
) -> Float32[Array, "V"]:
    return jax.nn.log_softmax(logits(model, hidden[:, position]))[0]


def _states_after_cache(
    packed: Packed[Llama],
    cache: KVCache,
    prompt: Sequence[int],
    fresh: Sequence[int],
    continuation: Sequence[int],
) -> Float[Array, "1 T M"]:
    """Return the states of the prompt's fresh tokens and of the continuation."""
    tokens = [*(prompt[at] for at in fresh), *continuation]
    positions = [*fresh, *range(len(prompt), len(prompt) + len(continuation))]
    padding = round_up_suffix(len(tokens)) - len(tokens)
    # Padding is written to the last slot, so no token may be there.
    check_capacity(len(prompt), len(continuation) + (padding > 0), cache.capacity)
    behind = range(positions[-1] + 1, positions[-1] + 1 + padding)
    return hidden_after_cache(
        packed,
        cache,
        np.array([[*tokens, *[0] * padding]], np.int32),
        np.minimum(np.array([[*positions, *behind]], np.int32), cache.capacity - 1),
    )


def _batch_log_probs(
    model: Llama, tokens: Int[np.ndarray, "B T"], pairs: Sequence[Pair]
) -> list[Float32[np.ndarray, "n"]]:
    """Return the log-probabilities of a batch's continuations, row by row."""
    sizes = [len(continuation) for _, continuation in pairs]
    row = np.repeat(np.arange(len(pairs)), sizes)
    position = np.concatenate([len(prompt) - 1 + np.arange(len(rest)) for prompt, rest in pairs])
    token = np.concatenate([np.asarray(rest) for _, rest in pairs])
    padding = (0, -len(token) % TOKENS_PER_CALL)  # one program whatever the number of tokens
    wanted = np.stack([np.pad(a, padding) for a in (row, position, token)]).astype(np.int32)
    values = _log_probs_of(model, hidden_states(model, tokens), wanted)[: len(token)]
    return np.split(values, np.cumsum(sizes)[:-1])


def _log_probs_of(
    model: Llama, hidden: Float[Array, "B T M"], wanted: Int[np.ndarray, "3 n"]
) -> Float32[np.ndarray, "n"]:
    """Return `token_log_probs` of rows, positions and tokens, TOKENS_PER_CALL at a time."""
    starts = range(0, wanted.shape[1], TOKENS_PER_CALL)
    parts = [token_log_probs(model, hidden, *wanted[:, at : at + TOKENS_PER_CALL]) for at in starts]
    return np.concatenate([np.asarray(part) for part in parts])


def _check(pairs: Sequence[Pair], limit: int) -> None:
    """Raise UserError for a prompt without tokens, and for a pair of more than `limit` tokens."""
    if any(len(rest) and not len(prompt) for prompt, rest in pairs):
        raise UserError("a prompt holds no tokens; give the model something before the text to score")
    longest = max((len(prompt) + len(rest) for prompt, rest in pairs), default=0)
    if longest > limit:
        raise UserError(
            f"a prompt with the text to score is {longest} tokens long and the model's context {limit}; shorten them"
        )
