"""Reuse of keys and values between prompts; a Prefiller is chosen once, by the generator's `kv_reuse`.

plain.py prefills whole prompts ("none") or after the prefix of an earlier prompt ("prefix", prefix.py); chunk.py
prefills with precomputed chunk KV caches ("chunk"), with CacheBlend ("blend", blend.py).
"""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

import numpy as np
from jaxtyping import Float32

from rag.generate import Request
from rag.generate.decode_state import DecodeState
from rag.types import Message


@runtime_checkable
class Prefiller(Protocol):
    """Turns conversations into tokens and prefills them."""

    batched: bool  # whether the token ids of many prompts may be prefilled together (rag.generate.scheduler)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        """Return the token ids of a conversation in the chat format."""

    def start(self, request: Request) -> tuple[list[int], DecodeState]:
        """Return the prompt's token ids, and the state after it with its first new token chosen.

        Raises UserError as `Engine.check` does.
        """

    def log_probs(
        self, pairs: Sequence[tuple[Sequence[Message], Sequence[int]]]
    ) -> list[Float32[np.ndarray, "n"]]:
        """Return the log-probability of every token of each pair's continuation of its conversation.

        Raises UserError for a pair beyond the context.
        """

    def next_log_probs(self, messages: Sequence[Message]) -> Float32[np.ndarray, "V"]:
        """Return the log-probability of every token to be the answer's first. Raises UserError beyond the context."""
