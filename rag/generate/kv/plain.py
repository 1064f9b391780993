"""Prefill of whole prompts, or of what they do not share with an earlier prompt. Letters: V vocab, n tokens."""

from collections.abc import Sequence

import numpy as np
from jaxtyping import Float32

from rag.generate import Request
from rag.generate.decode_state import DecodeState
from rag.generate.engine import Engine
from rag.generate.kv.prefix import PrefixCache
from rag.generate.prefill_batches import TokenRequest
from rag.generate.scoring import log_probs, next_log_probs
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message


class PlainPrefiller:
    """Prefills prompts as the tokenizer's chat format makes them (rag.generate.kv.Prefiller)."""

    batched = True

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        tokens_per_batch: int,
        prefixes: PrefixCache | None = None,
    ):
        """Prefill with an engine.

        Args:
            engine: runs the model.
            tokenizer: the model's.
            tokens_per_batch: padded tokens of a batch of `log_probs`.
            prefixes: earlier prompts, of which the longest common prefix is reused; None reuses nothing.
        """
        self._engine, self._tokenizer, self._prefixes = engine, tokenizer, prefixes
        self._tokens_per_batch = tokens_per_batch

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return self._tokenizer.chat(messages)

    def start(self, request: Request) -> tuple[list[int], DecodeState]:
        prompt, source = self.prompt(request.messages), self._prefixes or self._engine
        return prompt, source.prefill(TokenRequest.of(prompt, request))

    def log_probs(
        self, pairs: Sequence[tuple[Sequence[Message], Sequence[int]]]
    ) -> list[Float32[np.ndarray, "n"]]:
        ids = [(self.prompt(messages), continuation) for messages, continuation in pairs]
        return log_probs(self._engine.model, ids, self._tokens_per_batch)

    def next_log_probs(self, messages: Sequence[Message]) -> Float32[np.ndarray, "V"]:
        prompt = self.prompt(messages)
        self._engine.check(TokenRequest(tuple(prompt), 1))
        return next_log_probs(self._engine.model, prompt)
