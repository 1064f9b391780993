"""Prefix caching: the common prefix of prompts is prefilled once. Exact, because attention is causal.

The keys and values of the last prompts stay in memory, within a budget of bytes; the least recently used is removed
first. A new prompt reuses the cached one that it shares the most tokens with: the system text and the examples of
every question, the earlier turns of a conversation, the same passages asked about again.

Letters: T query tokens.
"""

from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Int

from rag.generate.decode_state import DecodeState
from rag.generate.engine import Engine
from rag.generate.prefill_batches import TokenRequest, common_prefix
from rag.models.llama.model import KVCache
from rag.runtime.shapes import round_up_prompt

_MIN_SHARED = 16  # tokens: for fewer, a plain prefill is as fast


@dataclass(frozen=True)
class _CachedPrompt:
    ids: Int[np.ndarray, "T"]
    cache: KVCache

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self.cache))


class PrefixCache:
    """Prefills only what follows the longest cached prefix of a prompt. Not thread-safe."""

    def __init__(self, engine: Engine, budget: int):
        """Make an empty cache of at most `budget` bytes of keys and values."""
        self._engine, self._budget = engine, budget
        self._prompts: list[_CachedPrompt] = []  # the least recently used first

    @property
    def nbytes(self) -> int:
        """Return the bytes of keys and values that are cached now."""
        return sum(prompt.nbytes for prompt in self._prompts)

    def prefill(self, request: TokenRequest) -> DecodeState:
        """Return what `Engine.prefill` of this request returns. Raises UserError as that does."""
        self._engine.check(request)
        ids = np.asarray(request.prompt, np.int32)
        best, shared = self._longest(ids)
        if best is None:
            state = self._engine.prefill(request)
        else:
            cache = _resized(best.cache, slots=self._engine.capacity(len(ids), request.max_new_tokens))
            state = self._engine.prefill_suffix(cache, request, range(shared, len(ids)))
        # A copy, because decoding donates the state.
        self._add(_CachedPrompt(ids, _resized(state.cache, slots=round_up_prompt(len(ids)))))
        return state

    def _longest(self, ids: Int[np.ndarray, "T"]) -> tuple[_CachedPrompt | None, int]:
        """Return the cached prompt that shares most tokens, now the most recently used, and how many.

        A prompt's last token is prefilled in any case, because its hidden state chooses the first new token.
        """
        shared = [min(common_prefix(cached.ids, ids), len(ids) - 1) for cached in self._prompts]
        if not shared or max(shared) < _MIN_SHARED:
            return None, 0
        at = int(np.argmax(shared))
        self._prompts.append(self._prompts.pop(at))
        return self._prompts[-1], shared[at]

    def _add(self, new: _CachedPrompt) -> None:
        """Add a prompt in place of those that it begins with, and remove the oldest beyond the budget."""
        self._prompts = [old for old in self._prompts if common_prefix(old.ids, new.ids) < len(old.ids)]
        self._prompts.append(new)
        while self._prompts and self.nbytes > self._budget:
            self._prompts.pop(0)


@partial(jax.jit, static_argnames="slots")
def _resized(cache: KVCache, *, slots: int) -> KVCache:
    """Return a copy with so many slots."""
    return cache.resized(slots)
