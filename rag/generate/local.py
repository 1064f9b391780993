"""Our own engine behind the generator's interface: chat messages in, text out, piece by piece."""

import time
from collections.abc import Iterator, Sequence
from functools import cached_property

import jax.numpy as jnp

from rag.generate.engine import Engine
from rag.models import checkpoint, hub, llama_checkpoint
from rag.models.tokenizer import TextStream, Tokenizer
from rag.ops.sampling import Sampling
from rag.types import Message, Usage, UserError

DTYPES = ("float32", "bfloat16")


class LocalGenerator:
    """A Llama-family checkpoint run by rag.generate.engine; weights are fetched at once, read when first needed."""

    def __init__(
        self,
        weights: str = hub.DEFAULT_GENERATOR,
        dtype: str = "float32",
        context_length: int | None = None,
        steps_per_dispatch: int = 4,
    ):
        """`weights` is a URI of rag.models.hub; `context_length` None takes the checkpoint's own."""
        if dtype not in DTYPES:
            raise UserError(f"generator.dtype is {dtype!r}; choose one of {', '.join(DTYPES)}")
        if steps_per_dispatch < 1:
            raise UserError(f"generator.steps_per_dispatch is {steps_per_dispatch}; give 1 or more")
        self._path = hub.local_path(weights)
        self._dtype, self._limit, self._steps = jnp.dtype(dtype), context_length, steps_per_dispatch

    @cached_property
    def _loaded(self) -> tuple[Engine, Tokenizer]:
        model, tokenizer = llama_checkpoint.load(self._path)
        model = checkpoint.to_device(model, self._dtype)
        return Engine(model, tokenizer.eos_ids, self._steps), tokenizer

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
        return len(self.tokenizer.chat(messages))

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str | Usage]:
        """Yield the answer's text as it is decoded, then its Usage. A stop string ends it and is left out."""
        prompt = self.tokenizer.chat(messages)
        begin = time.perf_counter()
        decoding = self.engine.start([prompt], max_new_tokens, sampling, [seed])
        decoder, text, new_tokens, prefilled = TextStream(self.tokenizer), StoppedText(stop), 0, None
        for [tokens] in decoding:
            prefilled = prefilled or time.perf_counter()
            new_tokens += len(tokens)
            if piece := text.push("".join(map(decoder.push, tokens))):
                yield piece
            if text.stopped:
                break
        if piece := text.push(decoder.finish()) + text.finish():
            yield piece
        prefill_s = prefilled - begin - decoding.prefill_prepare_s
        decode_s = time.perf_counter() - prefilled - decoding.decode_prepare_s
        prepare_s = decoding.prefill_prepare_s + decoding.decode_prepare_s
        yield Usage(len(prompt), new_tokens, prefill_s, decode_s, prepare_s)

    def generate(
        self,
        conversations: Sequence[Sequence[Message]],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seeds: Sequence[int] | None = None,
        stop: Sequence[str] = (),
    ) -> list[str]:
        """The answers to a batch of conversations of any lengths, decoded together."""
        prompts = [self.tokenizer.chat(messages) for messages in conversations]
        decoding = self.engine.start(prompts, max_new_tokens, sampling, seeds)
        decoders, texts = [TextStream(self.tokenizer) for _ in prompts], [StoppedText(stop) for _ in prompts]
        answers = [""] * len(prompts)
        for new in decoding:
            for row, tokens in enumerate(new):
                answers[row] += texts[row].push("".join(map(decoders[row].push, tokens)))
                if tokens and texts[row].stopped:
                    decoding.finish(row)
        for row, (decoder, text) in enumerate(zip(decoders, texts, strict=True)):
            answers[row] += text.push(decoder.finish()) + text.finish()
        return answers


class StoppedText:
    """Streamed text up to the first stop string; holds back a tail that may be a stop string's beginning."""

    def __init__(self, stop: Sequence[str]):
        self._stop, self._held = [s for s in stop if s], ""
        self.stopped = False

    def push(self, new: str) -> str:
        """The text that is now certain; empty once stopped."""
        if self.stopped:
            return ""
        text = self._held + new
        ends = [at for at in map(text.find, self._stop) if at >= 0]
        if ends:
            self.stopped, self._held = True, ""
            return text[: min(ends)]
        keep = max((n for s in self._stop for n in range(1, len(s)) if text.endswith(s[:n])), default=0)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """The tail that was held back for nothing."""
        return self._held
