"""Our own engine as a Generator and a Scorer: chat messages in, text or its likelihood out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date as day
from functools import cached_property
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from rag.generate import LogLikelihood, Request, join_text
from rag.generate.batched import generate_batched
from rag.generate.engine import Engine
from rag.generate.kv import Prefiller
from rag.generate.kv.chunk import ChunkKVOptions, ChunkPrefiller
from rag.generate.kv.chunk_store import KVDtype
from rag.generate.kv.plain import PlainPrefiller
from rag.generate.kv.prefix import PrefixCache
from rag.generate.scoring import log_probs
from rag.generate.speculative import DraftLengthPolicy, stream_speculatively, supports_speculation
from rag.generate.stop_text import AnswerText
from rag.models import adapters, hub, placement
from rag.models.conversion_cache import file_digests
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama import model as llama
from rag.models.tokenizer.tokenizer import DEFAULT_DATE, Tokenizer
from rag.runtime.cache.keys import content_key
from rag.runtime.machine.clock import Clock
from rag.runtime.options import Count, Date, Filled, Share, Whole, checked
from rag.types import Message, Usage

WeightsDtype = Literal["auto", "float32", "bfloat16", "int8"]
KVReuse = Literal["none", "prefix", "chunk", "blend"]
_DEFAULT_DATE = DEFAULT_DATE.isoformat()


def load_engine(
    path: Path, dtype: str, steps_per_dispatch: int | None, date: day, adapter: Path | None
) -> tuple[Engine, Tokenizer]:
    """Load a checkpoint's weights and tokenizer.

    Args:
        path: a GGUF file or a Hugging Face folder.
        dtype: of the weights: "int8" or a name that jax.numpy knows.
        steps_per_dispatch: of the engine.
        date: given to chat templates that ask for today's date.
        adapter: the folder of an adapter that the weights are merged with.

    Returns:
        The engine and the tokenizer.
    """
    model, tokenizer = llama_checkpoint.load(path, int8=dtype == "int8", date=date, adapter=adapter)
    llama.use_native(model)
    if model.native:
        model = placement.in_huge_pages(model)
    model = placement.to_device(model, None if dtype == "int8" else jnp.dtype(dtype))
    return Engine(model, tokenizer.eos_ids, steps_per_dispatch), tokenizer


class LocalGenerator:
    """Runs a Llama-family checkpoint by rag.generate.engine; fetches weights at once, loads them when first needed."""

    @checked
    def __init__(
        self,
        weights: Filled = hub.DEFAULT_GENERATOR,
        dtype: WeightsDtype = "auto",
        adapter: Filled | None = "auto",
        context_length: Count | None = None,
        steps_per_dispatch: Count | None = None,
        tokens_per_batch: Count = 4096,
        speculative: bool = False,
        kv_reuse: KVReuse = "none",
        kv_path: Filled | None = None,
        kv_dtype: KVDtype = "float16",
        kv_recompute: Whole = 0,
        blend_share: Share = 0.15,
        prefix_mib: Whole = 512,
        date: Date = _DEFAULT_DATE,
    ):
        """Fetch the weights; conf/generator/local.yaml explains every setting.

        `tokens_per_batch` and `speculative` change speed and memory, and results no more than float rounding does.
        kv_reuse "chunk" and "blend" change answers, and make `generate` answer one request after another. `date` is a
        setting, because answers of another day are other answers.
        """
        self._date = day.fromisoformat(date)
        self._kv_reuse, self._prefix_bytes = kv_reuse, prefix_mib << 20
        share = blend_share if kv_reuse == "blend" else 0.0
        options = ChunkKVOptions(kv_path, kv_dtype, kv_recompute, share)
        self._chunk_options = options if kv_reuse in ("chunk", "blend") else None
        self._tokens_per_batch = tokens_per_batch
        self._draft_policy = DraftLengthPolicy() if speculative else None
        self._path, self._auto_adapter = hub.local_path(weights), adapter == "auto"
        self._given_adapter = hub.local_path(adapter) if adapter and adapter != "auto" else None
        self._wanted_dtype, self._limit, self._steps = dtype, context_length, steps_per_dispatch

    @cached_property
    def dtype(self) -> str:
        """Return the dtype of the weights, that of this machine for "auto"."""
        if self._wanted_dtype != "auto":
            return self._wanted_dtype
        return "int8" if jax.default_backend() == "cpu" else "bfloat16"

    @cached_property
    def adapter(self) -> Path | None:
        """Return the folder of the adapter; for "auto" that of the package, if it was trained on these weights."""
        if self._auto_adapter:
            return adapters.default_reader(llama_checkpoint.checkpoint_sha256(self._path))
        return self._given_adapter

    @property
    def description(self) -> str:
        """Return the name of the checkpoint's file or folder, the dtype of the weights, and the adapter's name."""
        adapter = f" and the adapter {self.adapter.name}" if self.adapter else ""
        return f"{self._path.name} with {self.dtype} weights{adapter}"

    @cached_property
    def fingerprint(self) -> str:
        """Return 64 hex digits of all that answers depend on, without loading weights.

        These are the checkpoint's files, the adapter's, dtype, context length, the date, and how passages' KV caches
        are computed.
        """
        reuse = self._chunk_options and (self._kv_reuse, replace(self._chunk_options, path=None))
        return content_key(self._model_fingerprint, self._date.isoformat(), *(reuse or ()))

    @cached_property
    def _model_fingerprint(self) -> str:
        files = file_digests(llama_checkpoint.source_files(self._path))
        adapter = [adapters.adapter_digest(self.adapter)] if self.adapter else []
        return content_key("llama", files, self.dtype, self._limit, *adapter)

    @cached_property
    def _loaded(self) -> tuple[Engine, Tokenizer]:
        return load_engine(self._path, self.dtype, self._steps, self._date, self.adapter)

    @property
    def engine(self) -> Engine:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded[1]

    @cached_property
    def prefiller(self) -> Prefiller:
        """Return what prefills prompts, chosen by kv_reuse."""
        engine, tokenizer = self._loaded
        if self._chunk_options:
            return ChunkPrefiller(engine, tokenizer, self._model_fingerprint, self._chunk_options)
        prefixes = PrefixCache(engine, self._prefix_bytes) if self._kv_reuse == "prefix" else None
        return PlainPrefiller(engine, tokenizer, self._tokens_per_batch, prefixes)

    @property
    def context_length(self) -> int:
        """Return how many tokens prompt and answer may have together."""
        own = self.engine.model.config.max_position_embeddings
        return own if self._limit is None else min(own, self._limit)

    def count(self, text: str) -> int:
        """Return the number of tokens of a text, without special ones."""
        return self.tokenizer.count(text)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Return the number of tokens of a conversation in the checkpoint's chat format."""
        return len(self.prefiller.prompt(messages))

    def stream(self, request: Request) -> Iterator[str | Usage]:
        """Yield the answer's text as it is decoded, then its Usage. A stop string or a repetition ends it."""
        engine = self.engine  # the weights are loaded before the clock starts
        begin = Clock.now()
        prompt, state = self.prefiller.start(request)
        if self._draft_policy and supports_speculation(request.sampling):
            answer = stream_speculatively(engine, state, prompt, self._draft_policy)
        else:
            answer = engine.stream(state, request.sampling)
        text, new_tokens, prefilled = AnswerText(self.tokenizer, request), 0, None
        for tokens in answer:
            prefilled = prefilled or Clock.now()
            new_tokens += len(tokens)
            if piece := text.push(tokens):
                yield piece
            if text.stopped:
                break
        if piece := text.finish():
            yield piece
        end = Clock.now()
        prefill_time, decode_time = (prefilled or end) - begin, end - (prefilled or end)
        compiling = prefill_time.compiling + decode_time.compiling
        seconds = (prefill_time.working, decode_time.working, compiling)
        reason = text.finish_reason(new_tokens, request.max_new_tokens)
        yield Usage(len(prompt), new_tokens, *seconds, finish_reason=reason)

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the answers to any number of requests of any lengths, in their order.

        They are decoded together, as many as `tokens_per_batch` allows (rag.generate.batched); which do depends on the
        requests and not on their order. Raises UserError as `Engine.check` does.
        """
        if not requests:
            return []  # without loading the weights
        if not self.prefiller.batched:
            return [join_text(self.stream(request)) for request in requests]
        return generate_batched(self.engine, self.tokenizer, requests, self._tokens_per_batch)

    def log_likelihood(self, pairs: Sequence[tuple[Sequence[Message], str]]) -> list[LogLikelihood]:
        """Return log p(text | conversation) of each pair, in order: how likely the answer would be that text.

        Conversation and text become tokens separately, so that the text's do not depend on what precedes it; the token
        that would end the answer is not counted. Raises UserError for a pair beyond the context.
        """
        ids = [(messages, self.tokenizer.encode(text, special=False)) for messages, text in pairs]
        return [_total(values) for values in self.prefiller.log_probs(ids)]

    def text_log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """Return log p(second text | first text) of each pair, in order, without a chat format.

        The two become tokens separately: a space between them belongs at the beginning of the second, as byte-level
        tokens carry it. Raises UserError for a pair beyond the context, and for a first text without tokens.
        """
        engine, tokenizer = self._loaded
        ids = [(tokenizer.encode(a), tokenizer.encode(b, special=False)) for a, b in pairs]
        return [_total(values) for values in log_probs(engine.model, ids, self._tokens_per_batch)]


def _total(log_probabilities: Float32[np.ndarray, "n"]) -> LogLikelihood:
    return LogLikelihood(math.fsum(log_probabilities.tolist()), len(log_probabilities))
