"""Token ids in, token ids out: padded prefill, then decoding of several steps a dispatch over a donated KV cache.

Decode runs several steps a dispatch in one `while_loop`, because in float32 that costs nothing on CPU and hides the
host's work between steps; XLA's int8 products are much slower inside loops on some processors, so there the steps of
a dispatch are unrolled, and one is the default.

Letters: M width, B batch.
"""

from collections.abc import Collection, Iterator, Sequence

import jax
import numpy as np
from jaxtyping import Array, Float, Int

from rag import native
from rag.generate import decode_state
from rag.generate.decode_state import DecodeRules, DecodeState, check_capacity, pad_requests
from rag.generate.prefill_batches import TokenRequest
from rag.models.llama.model import KVCache, Llama
from rag.models.placement import pack
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_prompt, round_up_suffix
from rag.types import UserError


class Engine:
    """Runs a model: prefills one prompt, decodes any number of rows. rag.generate.scheduler prefills batches."""

    def __init__(self, model: Llama, end_ids: Collection[int], steps_per_dispatch: int | None = None):
        """Pack the model's weights.

        Args:
            model: the model.
            end_ids: the tokens that end an answer.
            steps_per_dispatch: decode steps that run between two looks of the host; None: 4, or 1 where int8 products
                are slow in a loop.
        """
        self.model, self.packed = model, pack(model)
        self.end_ids = tuple(sorted(end_ids))
        float_weights = model.embed_tokens.scale is None
        tiles = model.native and native.has_tiles()  # without them, products of several rows are XLA's
        self.loop = float_weights or tiles or jax.default_backend() != "cpu"
        self.steps_per_dispatch = steps_per_dispatch or (4 if self.loop else 1)

    def capacity(self, prompt_tokens: int, max_new_tokens: int) -> int:
        """Return how many cache slots `prefill` makes, and `prefill_suffix` asks for, for a prompt and its answer."""
        return round_up_prompt(round_up_prompt(prompt_tokens) + max_new_tokens)

    def rules(self, sampling: Sampling) -> DecodeRules:
        """Return the static argument of the programs that choose tokens."""
        return DecodeRules(sampling, self.end_ids)

    def check(self, request: TokenRequest) -> None:
        """Raise UserError for an empty prompt, no new tokens, or a prompt that leaves them no room in the context."""
        limit, length = self.model.config.max_position_embeddings, len(request.prompt)
        if request.max_new_tokens < 1:
            raise UserError(f"max_new_tokens is {request.max_new_tokens}; ask for at least one token")
        if not length:
            raise UserError("a prompt holds no tokens; give the model something to read")
        if length + request.max_new_tokens > limit:
            raise UserError(
                f"a prompt of {length} tokens and {request.max_new_tokens} new ones exceed the model's context of "
                f"{limit}; shorten the prompt or lower max_new_tokens"
            )

    def prefill(self, request: TokenRequest) -> DecodeState:
        """Prefill a prompt and choose its first new token. Raises UserError as `check` does."""
        self.check(request)
        length = len(request.prompt)
        capacity = self.capacity(length, request.max_new_tokens)
        check_capacity(length, request.max_new_tokens, capacity)
        prompts = pad_requests([request], round_up_prompt(length))
        rules = self.rules(request.sampling)
        return decode_state.prefill_prompts(self.packed, prompts, capacity=capacity, rules=rules)

    def prefill_suffix(self, cache: KVCache, request: TokenRequest, fresh: Sequence[int]) -> DecodeState:
        """Prefill a prompt's tokens at the positions `fresh`; the cache holds the keys and values of all others.

        Args:
            cache: one row of `capacity` slots; it is donated.
            request: the prompt and how to answer it.
            fresh: ascending positions. The prompt's last token must be among them: it decides the first new token.

        Raises:
            UserError: as `check` does.
            ValueError: for a cache of another capacity, or without the last token.
        """
        self.check(request)
        length, capacity = len(request.prompt), cache.capacity
        if fresh[-1] != length - 1 or capacity != self.capacity(length, request.max_new_tokens):
            raise ValueError("the last token must be fresh, and the cache of Engine.capacity")
        check_capacity(length, request.max_new_tokens, capacity)
        padding = round_up_suffix(len(fresh)) - len(fresh)
        behind = np.minimum(length + np.arange(padding), capacity - 1)  # overwritten before they are read
        positions = np.concatenate([np.asarray(fresh), behind]).astype(np.int32)
        tokens = np.asarray([*(request.prompt[at] for at in fresh), *[0] * padding], np.int32)
        return decode_state.prefill_suffix(
            self.packed,
            cache,
            pad_requests([request], capacity),
            tokens[None],
            positions[None],
            np.int32(len(fresh) - 1),
            rules=self.rules(request.sampling),
        )

    def start_decode(self, cache: KVCache, last: Float[Array, "1 M"], request: TokenRequest) -> DecodeState:
        """Return the state after a prompt that the cache, which is donated, holds whole.

        `last` is the hidden state of the prompt's last token. Raises RuntimeError when the answer does not fit.
        """
        check_capacity(len(request.prompt), request.max_new_tokens, cache.capacity)
        prompts, rules = pad_requests([request], cache.capacity), self.rules(request.sampling)
        return decode_state.start_decode(self.packed, cache, last, prompts, rules=rules)

    def decode(self, state: DecodeState, sampling: Sampling) -> tuple[DecodeState, list[list[int]]]:
        """Run one dispatch of `steps_per_dispatch` steps; the state is donated.

        Returns:
            The new state, and each row's new tokens without the end token.
        """
        state, made = decode_state.decode(
            self.packed,
            state,
            steps=self.steps_per_dispatch,
            rules=self.rules(sampling),
            loop=self.loop,
        )
        return state, self.answer_tokens(np.asarray(made))

    def answer_tokens(self, made: Int[np.ndarray, "steps B"]) -> list[list[int]]:
        """Return each row's tokens without end tokens, and without -1, which marks a row that had finished."""
        left_out = (-1, *self.end_ids)
        return [[token for token in row if token not in left_out] for row in made.T.tolist()]

    def stream(self, state: DecodeState, sampling: Sampling = Sampling()) -> Iterator[list[int]]:
        """Yield the tokens of a one-row state's answer, a list for each dispatch; prefill chose the first."""
        yield self.answer_tokens(np.asarray(state.token)[None])[0]
        while not np.asarray(state.finished).all():
            state, [tokens] = self.decode(state, sampling)
            yield tokens
