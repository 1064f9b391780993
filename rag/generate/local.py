"""Our own engine behind the generator's interface: chat messages in, text or its likelihood out."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from datetime import date as day
from functools import cached_property
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from rag.generate import LogLikelihood
from rag.generate.engine import DecodeState, Decoding, Engine
from rag.generate.kv.chunk import ChunkKVCache, ChunkKVOptions, KVDtype
from rag.generate.kv.prefix import PrefixCache
from rag.generate.prefill_batches import plan_batches
from rag.generate.scheduler import BatchPrefill, Scheduler, run
from rag.generate.scoring import log_probs, next_log_probs
from rag.generate.speculative import DraftLengthPolicy, SpeculativeDecoding, supports_speculation
from rag.generate.stop_text import StoppedText
from rag.models import checkpoint, hub
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama import model as llama
from rag.models.tokenizer.tokenizer import DEFAULT_DATE, TextStream, Tokenizer
from rag.ops.sampling import Sampling
from rag.runtime import cache_key
from rag.runtime.clock import Clock
from rag.runtime.options import Count, Date, Filled, Share, Whole, checked
from rag.types import Message, Usage

DTYPES = ("auto", "float32", "bfloat16", "int8")
KVReuse = Literal["none", "prefix", "chunk", "blend"]
_DEFAULT_DATE = DEFAULT_DATE.isoformat()


class LocalGenerator:
    """A Llama-family checkpoint run by rag.generate.engine; weights are fetched at once, read when first needed."""

    @checked
    def __init__(
        self,
        weights: Filled = hub.DEFAULT_GENERATOR,
        dtype: Literal[DTYPES] = "auto",
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
        """`weights` is a URI of rag.models.hub; `context_length` None takes the checkpoint's own.

        `dtype` is that of the weights: "float32", "bfloat16", "int8" with a scale a row (rag.ops.linear), or "auto",
        int8 on a CPU and bfloat16 on an accelerator. `date`, as 2026-01-31, is the day that a chat template which asks
        for one is told; it is a setting, since answers of another day are other answers.

        `tokens_per_batch` bounds the padded tokens, new ones included, that `generate` and the likelihoods hold
        at once; it changes their speed and memory, and results no more than float rounding does. Neither does
        `speculative` from the text so far (rag.generate.speculative), for what `stream` writes with greedy sampling and no
        repetition penalty; all else is decoded plainly.

        `kv_reuse` names what of a prompt is not read again: "none"; "prefix", what earlier prompts began with, in
        memory up to `prefix_mib` MiB (rag.generate.kv.prefix; exact); "chunk", the messages' passages but for the
        first `kv_recompute` tokens of each (rag.generate.kv.chunk), kept as `kv_dtype` in chunk_kv below the folder
        `kv_path`, None for the cache's; "blend", these but for the `blend_share` that differs most
        (rag.generate.kv.blend). The last two change answers, and make of `generate` a loop over `stream`.
        """
        self._date = day.fromisoformat(date)
        share = blend_share if kv_reuse == "blend" else 0.0
        self._kv_reuse, self._prefix_bytes = kv_reuse, prefix_mib << 20
        self._chunk_options = ChunkKVOptions(kv_path, kv_dtype, kv_recompute, share)
        self._tokens_per_batch = tokens_per_batch
        self._drafts = DraftLengthPolicy() if speculative else None
        self._path = hub.local_path(weights)
        self._wanted_dtype, self._limit, self._steps = dtype, context_length, steps_per_dispatch

    @cached_property
    def dtype(self) -> str:
        """The type of the weights: what was asked for, or what "auto" stands for on this machine."""
        if self._wanted_dtype != "auto":
            return self._wanted_dtype
        return "int8" if jax.default_backend() == "cpu" else "bfloat16"

    @property
    def description(self) -> str:
        """The checkpoint's file or folder, and the type of the weights."""
        return f"{self._path.name} with {self.dtype} weights"

    @cached_property
    def _loaded(self) -> tuple[Engine, Tokenizer]:
        model, tokenizer = llama_checkpoint.load(self._path, int8=self.dtype == "int8", date=self._date)
        llama.use_native(model)
        if model.native:
            model = checkpoint.in_huge_pages(model)
        model = checkpoint.to_device(model, None if self.dtype == "int8" else jnp.dtype(self.dtype))
        return Engine(model, tokenizer.eos_ids, self._steps), tokenizer

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits of all that answers depend on, nothing of which is loaded for it.

        These are the checkpoint's files, dtype, context length, the date and how passages are kept.
        """
        if not self.reuses_passages:
            return cache_key.content_key(self._model_fingerprint, self._date.isoformat())
        return cache_key.content_key(
            self._model_fingerprint,
            self._date.isoformat(),
            self._kv_reuse,
            replace(self._chunk_options, path=None),
        )

    @cached_property
    def _model_fingerprint(self) -> str:
        files = checkpoint.contents(llama_checkpoint.source_files(self._path))
        return cache_key.content_key("llama", files, self.dtype, self._limit)

    @property
    def reuses_passages(self) -> bool:
        """Whether passages are kept: messages then become tokens in pieces."""
        return self._kv_reuse in ("chunk", "blend")

    @cached_property
    def chunks(self) -> ChunkKVCache:
        """What reads passages for kv_reuse=chunk and blend."""
        return ChunkKVCache(*self._loaded, self._model_fingerprint, self._chunk_options)

    @cached_property
    def _prefixes(self) -> PrefixCache:
        return PrefixCache(self.engine, self._prefix_bytes)

    @property
    def engine(self) -> Engine:
        return self._loaded[0]

    @property
    def tokenizer(self) -> Tokenizer:
        return self._loaded[1]

    @property
    def context_length(self) -> int:
        """Tokens that prompt and answer may have together."""
        own = self.engine.model.config.max_position_embeddings
        return own if self._limit is None else min(own, self._limit)

    def count(self, text: str) -> int:
        """Tokens of a text, without special ones."""
        return self.tokenizer.count(text)

    def prompt_tokens(self, messages: Sequence[Message]) -> int:
        """Tokens of a conversation in the checkpoint's chat format."""
        return len(self.chunks.prompt(messages) if self.reuses_passages else self.tokenizer.chat(messages))

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str | Usage]:
        """Yield the answer's text as it is decoded, then its Usage. A stop string ends it and is left out."""
        engine = self.engine  # the weights are read before the clock starts
        begin, prefilled = Clock.now(), None
        prompt, state = self._start(messages, max_new_tokens, sampling, seed)
        if self._drafts is not None and supports_speculation(sampling):
            decoding = SpeculativeDecoding(engine, state, prompt, self._drafts)
        else:
            decoding = Decoding(engine, state, sampling)
        decoder, text, new_tokens = TextStream(self.tokenizer), StoppedText(stop), 0
        for [tokens] in decoding:
            prefilled = prefilled or Clock.now()
            new_tokens += len(tokens)
            if piece := text.push("".join(map(decoder.push, tokens))):
                yield piece
            if text.stopped:
                break
        if piece := text.push(decoder.finish()) + text.finish():
            yield piece
        prefill, decode = prefilled - begin, Clock.now() - prefilled
        prepare_s = prefill.compiling + decode.compiling
        yield Usage(len(prompt), new_tokens, prefill.working, decode.working, prepare_s)

    def _start(
        self, messages: Sequence[Message], max_new_tokens: int, sampling: Sampling, seed: int
    ) -> tuple[list[int], DecodeState]:
        """The prompt's token ids, and the state behind it with its first new token chosen."""
        if self.reuses_passages:
            return self.chunks.start(messages, max_new_tokens, sampling, seed)
        prompt = self.tokenizer.chat(messages)
        if self._kv_reuse == "prefix":
            return prompt, self._prefixes.start(prompt, max_new_tokens, sampling, seed)
        return prompt, self.engine.prefill([prompt], max_new_tokens, sampling, [seed])

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The answers to any number of conversations of any lengths, in their order.

        They are decoded together, as many as `tokens_per_batch` allows, and take one another's places as they end
        (rag.generate.scheduler); which do depends on the conversations and not on their order. Equal ones with
        equal seeds are answered once. Raises UserError as `Engine.check` does.
        """
        if not conversations:
            return []
        if self.reuses_passages:
            return self._one_by_one(conversations, sampling, max_new_tokens, seeds, stop)
        prompts = [tuple(self.tokenizer.chat(messages)) for messages in conversations]
        self.engine.check(prompts, max_new_tokens)
        each = [0] * len(prompts) if seeds is None else list(seeds)
        asked = dict(zip(zip(prompts, each, strict=True), conversations, strict=True))
        requests = list(asked)
        writers = [_Writer(self.tokenizer, stop) for _ in requests]
        rows = Scheduler(self.engine, sampling, self._tokens_per_batch, len(requests))
        groups = plan_batches(requests, max_new_tokens, self._tokens_per_batch)
        read = BatchPrefill(self.engine, requests, max_new_tokens, sampling)
        run(groups, read, rows, lambda i, tokens: writers[i].push(tokens))
        texts = {request: writer.finish() for request, writer in zip(requests, writers, strict=True)}
        return [texts[request] for request in zip(prompts, each, strict=True)]

    def _one_by_one(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling,
        max_new_tokens: int,
        seeds: Sequence[int] | None,
        stop: Sequence[str],
    ) -> list[str]:
        each = [0] * len(conversations) if seeds is None else seeds
        streams = (
            self.stream(messages, sampling, max_new_tokens, seed, stop)
            for messages, seed in zip(conversations, each, strict=True)
        )
        return ["".join(piece for piece in stream if isinstance(piece, str)) for stream in streams]

    def log_likelihood(self, pairs: Sequence[tuple[Sequence[Message], str]]) -> list[LogLikelihood]:
        """log p(text | conversation) of each pair, in order: how likely the model's answer would be that text.

        Conversation and text become tokens apart, so that the text's do not depend on what stands before it;
        the token that would end the answer is not counted. Raises UserError for a pair beyond the context.
        """
        if self.reuses_passages:
            texts = [self.tokenizer.encode(text, special=False) for _, text in pairs]
            found = [self.chunks.log_probs(pair[0], ids) for pair, ids in zip(pairs, texts, strict=True)]
            return [_total(values) for values in found]
        return self._likelihoods([(self.tokenizer.chat(messages), text) for messages, text in pairs])

    def next_log_probs(self, messages: Sequence[Message]) -> Float32[np.ndarray, "V"]:
        """The log-probability of every token to be the answer's first. UserError beyond the context."""
        if self.reuses_passages:
            return self.chunks.next_log_probs(messages)
        prompt = self.tokenizer.chat(messages)
        self.engine.check([prompt], 1)
        return next_log_probs(self.engine.model, prompt)

    def text_log_likelihood(self, pairs: Sequence[tuple[str, str]]) -> list[LogLikelihood]:
        """log p(second text | first text) of each pair, in order, without a chat format.

        The two become tokens apart: a space between them belongs at the beginning of the second, as byte-level
        tokens carry it. Raises UserError for a pair beyond the context, and for a first text without tokens.
        """
        return self._likelihoods([(self.tokenizer.encode(prompt), text) for prompt, text in pairs])

    def _likelihoods(self, pairs: Sequence[tuple[list[int], str]]) -> list[LogLikelihood]:
        ids = [(prompt, self.tokenizer.encode(text, special=False)) for prompt, text in pairs]
        found = log_probs(self.engine.model, ids, self._tokens_per_batch)
        return [_total(values) for values in found]


def _total(log_probabilities: Float32[np.ndarray, "n"]) -> LogLikelihood:
    return LogLikelihood(math.fsum(log_probabilities.tolist()), len(log_probabilities))


class _Writer:
    """One answer's text from its tokens, up to the first stop string."""

    def __init__(self, tokenizer: Tokenizer, stop: Sequence[str]):
        self._decoder, self._stopped, self._text = TextStream(tokenizer), StoppedText(stop), ""

    def push(self, tokens: Sequence[int]) -> bool:
        """Whether the answer goes on."""
        self._text += self._stopped.push("".join(map(self._decoder.push, tokens)))
        return not self._stopped.stopped

    def finish(self) -> str:
        return self._text + self._stopped.push(self._decoder.finish()) + self._stopped.finish()
