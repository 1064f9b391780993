"""Prefill with precomputed chunk KV caches: those of passages come from disk, and the rest of a prompt is prefilled.

The first passage is exact. A later one was computed without the passages before it, unless its first tokens (EPIC, Hu
et al. 2024, arXiv:2410.15332) or those that differ most (CacheBlend, rag.generate.kv.blend) are recomputed.

Letters: T tokens of the prompt, S cache slots, M width, V vocab, n tokens of a continuation.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Array, Bool, Float, Float32

from rag.generate import Request
from rag.generate.decode_state import DecodeState, pad_prompts
from rag.generate.engine import Engine
from rag.generate.kv.blend import SCORED_LAYERS, blend
from rag.generate.kv.chunk_cache import ChunkKVCache
from rag.generate.kv.chunk_store import KVDtype
from rag.generate.kv.prompt_parts import PromptParts, split_prompt
from rag.generate.prefill_batches import TokenRequest
from rag.generate.scoring import log_probs_after_cache, next_log_probs_after_cache
from rag.models.llama.model import KVCache
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.runtime.options import Filled, Share, Whole, check_fields
from rag.runtime.shapes import round_up_prompt, round_up_suffix
from rag.types import Message


@dataclass(frozen=True, slots=True)
class ChunkKVOptions:
    """How passages are cached, and how many of their tokens are recomputed. Raises UserError for a wrong value."""

    path: Filled | None = None  # of the folder that chunk_kv is in; None: the cache folder
    dtype: KVDtype = "float16"  # of the files, or int8: half the bytes
    recompute: Whole = 0  # first tokens of each passage that are recomputed
    blend_share: Share = 0.0  # of the passages' tokens, those that are recomputed because they differ most

    def __post_init__(self):
        check_fields(self)


class ChunkPrefiller:
    """Loads the precomputed KV caches of passages, and prefills the other tokens (rag.generate.kv.Prefiller)."""

    batched = False

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        fingerprint: str,
        options: ChunkKVOptions = ChunkKVOptions(),
    ):
        """Open the chunk KV cache of a model.

        Args:
            engine: runs the model.
            tokenizer: the model's.
            fingerprint: 64 hex digits of the model.
            options: where the cache is, and what is recomputed.
        """
        self._engine, self._tokenizer, self._options = engine, tokenizer, options
        self.cache = ChunkKVCache(engine, tokenizer, fingerprint, options.path, options.dtype)

    def prompt(self, messages: Sequence[Message]) -> list[int]:
        return split_prompt(self._tokenizer, messages).ids

    def start(self, request: Request) -> tuple[list[int], DecodeState]:
        parts = split_prompt(self._tokenizer, request.messages)
        tokens = TokenRequest.of(parts.ids, request)
        self._engine.check(tokens)
        cache = self.cache.assemble(parts, self._engine.capacity(len(parts.ids), request.max_new_tokens))
        if self._blends(parts):
            cache, last = self._blended(cache, parts)
            return parts.ids, self._engine.start_decode(cache, last, tokens)
        return parts.ids, self._engine.prefill_suffix(cache, tokens, self._fresh(parts))

    def log_probs(
        self, pairs: Sequence[tuple[Sequence[Message], Sequence[int]]]
    ) -> list[Float32[np.ndarray, "n"]]:
        return [self._log_probs(messages, continuation) for messages, continuation in pairs]

    def _log_probs(
        self, messages: Sequence[Message], continuation: Sequence[int]
    ) -> Float32[np.ndarray, "n"]:
        if not continuation:
            return np.zeros(0, np.float32)
        prompt, cache, fresh = self._prepare(messages, len(continuation))
        return log_probs_after_cache(self._engine.packed, cache, prompt, fresh, continuation)

    def next_log_probs(self, messages: Sequence[Message]) -> Float32[np.ndarray, "V"]:
        prompt, cache, fresh = self._prepare(messages, 1)
        return next_log_probs_after_cache(self._engine.packed, cache, prompt, fresh)

    def _prepare(self, messages: Sequence[Message], tokens: int) -> tuple[list[int], KVCache, list[int]]:
        """Return a prompt's ids, its cache with room for so many tokens after it, and the fresh positions."""
        parts = split_prompt(self._tokenizer, messages)
        self._engine.check(TokenRequest(tuple(parts.ids), tokens))
        room = round_up_suffix(len(parts.ids)) + round_up_suffix(tokens)
        cache = self.cache.assemble(parts, self._engine.capacity(len(parts.ids), room))
        if self._blends(parts):
            return parts.ids, self._blended(cache, parts)[0], [len(parts.ids) - 1]
        return parts.ids, cache, self._fresh(parts)

    def _blends(self, parts: PromptParts) -> bool:
        return self._options.blend_share > 0 and bool(parts.passages)

    def _fresh(self, parts: PromptParts) -> list[int]:
        """Return the positions of the tokens to prefill."""
        return np.flatnonzero(~self._reused(parts)).tolist()

    def _reused(self, parts: PromptParts) -> Bool[np.ndarray, "T"]:
        """Return which tokens of the prompt have keys and values in the assembled cache that are not recomputed."""
        reused = np.zeros(len(parts.ids), bool)
        for start, end in parts.spans():
            reused[start:end] = True
        for at, ids in parts.passages:
            if not parts.is_exact(at):
                reused[at : at + min(self._options.recompute, len(ids))] = False
        reused[-1] = False  # its hidden state chooses the first new token
        return reused

    def _blended(self, cache: KVCache, parts: PromptParts) -> tuple[KVCache, Float[Array, "1 M"]]:
        """Return the cache of the whole prompt by CacheBlend, and the last token's hidden state."""
        there, width = self._reused(parts), round_up_prompt(len(parts.ids))
        reused, candidates = np.zeros(width, bool), np.zeros(width, bool)
        reused[: len(there)] = there
        for at, ids in parts.passages:
            candidates[at : at + len(ids)] = there[at : at + len(ids)] & (not parts.is_exact(at))
        inside = sum(len(ids) for _, ids in parts.passages)
        recomputed = np.count_nonzero(~there) + round(self._options.blend_share * inside)
        return blend(
            self._engine.packed,
            cache,
            pad_prompts([parts.ids], width),
            np.int32(len(parts.ids)),
            reused,
            candidates,
            count=min(width, round_up_suffix(int(recomputed))),
            layers=min(SCORED_LAYERS, self._engine.model.config.num_hidden_layers),
        )
