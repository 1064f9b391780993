"""The peer llama.cpp: the same GGUF file, the same token ids, and as many threads as this process has cores.

It is built as PyPI ships it. Compiled with AMX, version 0.3.36 crashes on the processors that this was tried on, so its
figures are those of AVX512 and VNNI there. It decodes greedily.

Letters: V vocab.
"""

import time
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np
from jaxtyping import Float32

from rag.bench.peers import print_left_out
from rag.generate import Request, join_text
from rag.generate.local import LocalGenerator
from rag.generate.stop_text import AnswerText
from rag.runtime.cache import entries, file_hash
from rag.runtime.cache.folder import cache_root
from rag.runtime.machine.hardware import cores
from rag.types import Usage

if TYPE_CHECKING:
    from llama_cpp import Llama

LLAMA_CPP = "llama-cpp-python"

_QUANTISATIONS = {"Q8_0": 7, "Q4_0": 2}  # their numbers in llama.cpp (enum llama_ftype)
_TRIAL_PROMPT, _TRIAL_TOKENS = 512, 32


class LlamaCpp:
    """A model in llama.cpp that writes tokens and scores them."""

    def __init__(self, model: "Llama", nbytes: int, reuse: bool = False):
        """Wrap an open model.

        Args:
            model: The model of llama-cpp-python.
            nbytes: The size of its file.
            reuse: Whether a prompt reuses the cached prefix that it shares with the one before, as llama.cpp does
                by default; otherwise the cache is emptied before each prompt.
        """
        self._model, self.nbytes, self._reuse = model, nbytes, reuse
        self._prompt_tokens = 0  # of the prompt that `prefill` was given
        self._after_prompt = np.zeros(model.n_vocab(), np.float32)

    def write(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """Yield `new_tokens` tokens after the prompt; end tokens do not stop it."""
        if not self._reuse:
            self._model.reset()
        tokens = self._model.generate(list(prompt), temp=0.0)
        for _ in range(new_tokens):
            yield next(tokens)

    def prefill(self, prompt: Sequence[int]) -> None:
        """Compute the prompt from an empty cache, so that `log_likelihood` can score what follows it."""
        self._model.reset()
        self._after_prompt = self._evaluate(prompt)
        self._prompt_tokens = len(prompt)

    def log_likelihood(self, continuation: Sequence[int]) -> float:
        """Return log p(continuation | the prefilled prompt), like a Generator's without the end token."""
        self._model.n_tokens = self._prompt_tokens  # the next evaluation drops what followed from the cache
        logits, total = self._after_prompt, 0.0
        for i, token in enumerate(continuation, 1):
            total += float(logits[token]) - _log_sum_exp(logits)
            if i < len(continuation):
                logits = self._evaluate([token])
        return total

    def _evaluate(self, tokens: Sequence[int]) -> Float32[np.ndarray, "V"]:
        """Append tokens to the cache and return the logits after the last one."""
        from llama_cpp import llama_get_logits_ith

        self._model.eval(tokens)
        logits = llama_get_logits_ith(self._model.ctx, -1)
        return np.ctypeslib.as_array(logits, self._after_prompt.shape).copy()


def _log_sum_exp(logits: Float32[np.ndarray, "V"]) -> float:
    exact = logits.astype(np.float64)
    return float(exact.max() + np.log(np.exp(exact - exact.max()).sum()))


class LlamaCppGenerator:
    """LlamaCpp as a generator of the pipeline; our tokenizer makes its token ids, so prompts are equal to ours."""

    def __init__(self, model: LlamaCpp, ours: LocalGenerator, end_ids: Collection[int] = ()):
        """Use the tokenizer and the context length of `ours`; a token of `end_ids` ends an answer."""
        self._model, self._tokenizer, self._end_ids = model, ours.tokenizer, frozenset(end_ids)
        self.context_length, self.fingerprint = ours.context_length, f"{LLAMA_CPP} {ours.fingerprint}"
        self.count, self.prompt_tokens = ours.count, ours.prompt_tokens

    def stream(self, request: Request) -> Iterator[str | Usage]:
        """Yield text and Usage as LocalGenerator.stream does; decoding is always greedy."""
        prompt, begin, first, made = self._tokenizer.chat(request.messages), time.perf_counter(), None, 0
        text = AnswerText(self._tokenizer, request)
        for token in self._model.write(prompt, request.max_new_tokens):
            first = first or time.perf_counter()
            if token in self._end_ids:
                break
            made += 1
            if piece := text.push([token]):
                yield piece
            if text.stopped:
                break
        if piece := text.finish():
            yield piece
        first = first or time.perf_counter()
        reason = text.finish_reason(made, request.max_new_tokens)
        yield Usage(len(prompt), made, first - begin, time.perf_counter() - first, finish_reason=reason)

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the answers, written one after another."""
        return [join_text(self.stream(request)) for request in requests]


def open_llama_cpp(path: Path, context: int, *, reuse: bool = False) -> LlamaCpp | None:
    """Open a GGUF file in llama.cpp, on the accelerator if there is one.

    Returns:
        The model, or None, and a line on stderr, where llama-cpp-python is missing or does not support the accelerator.
    """
    try:
        import llama_cpp
    except ImportError:
        print_left_out(LLAMA_CPP, "it is not installed (make bench-setup)")
        return None
    accelerated = jax.default_backend() != "cpu"
    if accelerated and not llama_cpp.llama_supports_gpu_offload():
        print_left_out(LLAMA_CPP, "it is built for the CPU only")
        return None
    model = llama_cpp.Llama(
        str(path),
        n_ctx=context,
        n_batch=2048,
        n_gpu_layers=-1 if accelerated else 0,
        n_threads=cores(),
        n_threads_batch=cores(),
        verbose=False,
    )
    return LlamaCpp(model, path.stat().st_size, reuse)


def llama_cpp_peers(path: Path, context: int, *, reuse: bool = False) -> dict[str, LlamaCpp]:
    """Return llama.cpp's models by column: the file as it is, its fastest requantisation, and with `reuse` the file
    with llama.cpp's own prefix reuse. Empty where llama.cpp cannot be had.
    """
    context = max(context, _TRIAL_PROMPT + _TRIAL_TOKENS + 1)
    same = open_llama_cpp(path, context)
    if same is None:
        return {}
    trials = {kind: open_llama_cpp(requantised(path, kind), context) for kind in _QUANTISATIONS}
    opened = {kind: model for kind, model in trials.items() if model is not None}
    best = min(opened, key=lambda kind: _trial_seconds(opened[kind]))
    peers = {LLAMA_CPP: same, f"{LLAMA_CPP} {best}": opened[best]}
    if reuse and (own := open_llama_cpp(path, context, reuse=True)):
        peers[f"{LLAMA_CPP}, own prefix reuse"] = own
    return peers


def _trial_seconds(model: LlamaCpp) -> float:
    """Return the seconds of the faster of two short answers."""
    prompt, seconds = np.random.default_rng(0).integers(1000, 40000, _TRIAL_PROMPT).tolist(), []
    for _ in range(2):
        begin = time.perf_counter()
        for _ in model.write(prompt, _TRIAL_TOKENS):
            pass
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def requantised(path: Path, kind: str) -> Path:
    """Return the GGUF file's weights in the quantisation "Q8_0" or "Q4_0"; the cache key is the hash of the file."""
    import llama_cpp

    def quantise(folder: Path) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = _QUANTISATIONS[kind], True, cores()
        target = folder / "model.gguf"
        if failed := llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), params):
            raise RuntimeError(f"llama.cpp could not make {kind} of {path}: code {failed}")

    entry = cache_root() / "requantised" / f"{file_hash.file_sha256(path)[:16]}-{kind}"
    folder = entries.get_or_make(entry, lambda: entries.write_folder(entry, quantise), entries.check_folder)
    return folder / "model.gguf"
