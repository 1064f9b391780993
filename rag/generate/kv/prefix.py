"""What prompts have in common at their beginning is read once: exact, as causal attention never looks ahead.

The keys and values of the last prompts stay in memory, within a budget of bytes, the least recently used leaving
first. A new prompt goes on from the one that it shares the most tokens with: the system text and the examples of
every question, the earlier turns of a conversation, the same passages asked about again.

Letters: K kv heads, S slots of a cache, D head dim.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

import jax
import numpy as np
from jaxtyping import Int

from rag.generate.engine import DecodeState, Engine
from rag.models.llama.model import KVCache
from rag.ops.sampling import Sampling
from rag.runtime.shapes import round_up_prompt

_WORTHWHILE = 16  # shared tokens: for fewer, a plain prefill is as fast


@dataclass(frozen=True)
class _CachedPrompt:
    ids: Int[np.ndarray, "T"]
    cache: KVCache

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in jax.tree.leaves(self.cache))


class PrefixCache:
    """An engine that begins where an earlier prompt stopped being the same. For one thread."""

    def __init__(self, engine: Engine, budget: int):
        """`budget`: bytes of keys and values to keep."""
        self._engine, self._budget = engine, budget
        self._kept: list[_CachedPrompt] = []  # the least recently used first
        self.read = self.reused = 0  # tokens of prompts so far: gone through the model, and taken from here

    @property
    def nbytes(self) -> int:
        """Bytes of keys and values that are kept now."""
        return sum(kept.nbytes for kept in self._kept)

    def start(
        self, prompt: Sequence[int], max_new_tokens: int, sampling: Sampling = Sampling(), seed: int = 0
    ) -> DecodeState:
        """What `Engine.prefill` of this prompt gives. Raises UserError as that does."""
        self._engine.check([prompt], max_new_tokens)
        ids = np.asarray(prompt, np.int32)
        best, shared = self._longest(ids)
        if best is None:
            state = self._engine.prefill([prompt], max_new_tokens, sampling, [seed])
        else:
            cache = _resized(best.cache, slots=self._engine.capacity(len(prompt), max_new_tokens))
            fresh = range(shared, len(prompt))
            state = self._engine.resume(cache, prompt, fresh, max_new_tokens, sampling, seed)
        self.reused += shared
        self.read += len(prompt) - shared
        self._keep(
            _CachedPrompt(ids, _resized(state.cache, slots=round_up_prompt(len(prompt))))
        )  # decoding donates the state
        return state

    def _longest(self, ids: Int[np.ndarray, "T"]) -> tuple[_CachedPrompt | None, int]:
        """The kept prompt that shares most, now the most recently used; its last token must be read in any case."""
        shared = [min(_shared_prefix(kept.ids, ids), len(ids) - 1) for kept in self._kept]
        if not shared or max(shared) < _WORTHWHILE:
            return None, 0
        at = int(np.argmax(shared))
        self._kept.append(self._kept.pop(at))
        return self._kept[-1], shared[at]

    def _keep(self, new: _CachedPrompt) -> None:
        """Add a prompt, in the place of those that are its beginning, and let the oldest go."""
        self._kept = [kept for kept in self._kept if _shared_prefix(kept.ids, new.ids) < len(kept.ids)]
        self._kept.append(new)
        while self._kept and self.nbytes > self._budget:
            self._kept.pop(0)


def _shared_prefix(one: Int[np.ndarray, "T"], other: Int[np.ndarray, "S"]) -> int:
    """How many tokens the two share from the beginning on."""
    size = min(len(one), len(other))
    differ = np.flatnonzero(one[:size] != other[:size])
    return int(differ[0]) if len(differ) else size


@partial(jax.jit, static_argnames="slots")
def _resized(cache: KVCache, *, slots: int) -> KVCache:
    """A copy with so many slots."""
    return cache.resized(slots)
