"""llama.cpp beside us: the same GGUF file and token ids, and the file in the quantisation that it is fastest with.

Built as PyPI has it. Compiled with AMX, version 0.3.36 crashes on the processors that this was tried on, so its
figures are those of AVX512 and VNNI there. It decodes greedily with as many threads as this process has cores.
"""

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import jax
import numpy as np

from rag.generate.local import LocalGenerator
from rag.generate.stop_text import StoppedText
from rag.models.tokenizer.tokenizer import TextStream
from rag.ops.sampling import Sampling
from rag.runtime import cache, file_hash, files
from rag.runtime.machine import cores
from rag.types import Message, Usage

if TYPE_CHECKING:
    from llama_cpp import Llama

LLAMA_CPP = "llama-cpp-python"

_KINDS = {"Q8_0": 7, "Q4_0": 2}  # llama.cpp's numbers of these (enum llama_ftype)
_TRIAL_PROMPT, _TRIAL_TOKENS = 512, 32


def leave_out(peer: str, why: str) -> None:
    """Say on stderr that a peer's columns stay empty."""
    print(f"{peer} {why}: its columns are left out", file=sys.stderr)


class LlamaCpp:
    """A model of llama.cpp. With `reuse` it keeps what a prompt shares with the one before, as it does by itself."""

    def __init__(self, model: "Llama", nbytes: int, reuse: bool = False):
        """`nbytes` is the size of its file."""
        self._model, self.nbytes, self._reuse = model, nbytes, reuse

    def write(self, prompt: Sequence[int], new_tokens: int) -> Iterator[int]:
        """So many tokens, whichever they are."""
        if not self._reuse:
            self._model.reset()
        tokens = self._model.generate(list(prompt), temp=0.0)
        for _ in range(new_tokens):
            yield next(tokens)


class LlamaCppGenerator:
    """LlamaCpp as the pipeline's generator; chat format and token ids are our tokenizer's, so prompts are equal."""

    def __init__(self, model: LlamaCpp, ours: LocalGenerator, end_ids: Sequence[int] = ()):
        self._model, self._tokenizer, self._end_ids = model, ours.tokenizer, frozenset(end_ids)
        self.context_length, self.fingerprint = ours.context_length, f"{LLAMA_CPP} {ours.fingerprint}"
        self.count, self.prompt_tokens = ours.count, ours.prompt_tokens

    def stream(
        self,
        messages: Sequence[Message],
        sampling: Sampling = Sampling(),
        max_new_tokens: int = 256,
        seed: int = 0,
        stop: Sequence[str] = (),
    ) -> Iterator[str | Usage]:
        """As LocalGenerator.stream; always greedy."""
        prompt, begin, first, made = self._tokenizer.chat(messages), time.perf_counter(), None, 0
        decoder, text = TextStream(self._tokenizer), StoppedText(stop)
        for token in self._model.write(prompt, max_new_tokens):
            first = first or time.perf_counter()
            if token in self._end_ids:
                break
            made += 1
            if piece := text.push(decoder.push(token)):
                yield piece
            if text.stopped:
                break
        if piece := text.push(decoder.finish()) + text.finish():
            yield piece
        yield Usage(len(prompt), made, first - begin, time.perf_counter() - first)


def open_llama_cpp(path: Path, context: int, *, reuse: bool = False) -> LlamaCpp | None:
    """The GGUF file in llama.cpp, on the accelerator if there is one; None, and said so, where that cannot be."""
    try:
        import llama_cpp
    except ImportError:
        leave_out(LLAMA_CPP, "is not installed (make bench-setup)")
        return None
    accelerated = jax.default_backend() != "cpu"
    if accelerated and not llama_cpp.llama_supports_gpu_offload():
        leave_out(LLAMA_CPP, "is built for the CPU only")
        return None
    threads = {"n_threads": cores(), "n_threads_batch": cores()}
    layers = -1 if accelerated else 0
    model = llama_cpp.Llama(
        str(path), n_ctx=context, n_batch=2048, n_gpu_layers=layers, verbose=False, **threads
    )
    return LlamaCpp(model, path.stat().st_size, reuse)


def llama_cpp_peers(path: Path, context: int, *, reuse: bool = False) -> dict[str, LlamaCpp]:
    """Column -> model: the file as it is, in its fastest requantisation, and as it is with `reuse` if asked for."""
    context = max(context, _TRIAL_PROMPT + _TRIAL_TOKENS + 1)
    same = open_llama_cpp(path, context)
    if same is None:
        return {}
    trials = {kind: open_llama_cpp(requantised(path, kind), context) for kind in _KINDS}
    best = min(trials, key=lambda kind: _trial_seconds(trials[kind]))
    peers = {LLAMA_CPP: same, f"{LLAMA_CPP} {best}": trials[best]}
    return peers | (
        {f"{LLAMA_CPP}, own prefix reuse": open_llama_cpp(path, context, reuse=True)} if reuse else {}
    )


def _trial_seconds(model: LlamaCpp) -> float:
    """The faster of two short answers."""
    prompt, seconds = np.random.default_rng(0).integers(1000, 40000, _TRIAL_PROMPT).tolist(), []
    for _ in range(2):
        begin = time.perf_counter()
        for _ in model.write(prompt, _TRIAL_TOKENS):
            pass
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def requantised(path: Path, kind: str) -> Path:
    """The GGUF file's weights in another quantisation, "Q8_0" or "Q4_0", kept in the cache beside the file's hash."""
    import llama_cpp

    def quantise(folder: Path) -> None:
        params = llama_cpp.llama_model_quantize_default_params()
        params.ftype, params.allow_requantize, params.nthread = _KINDS[kind], True, cores()
        target = folder / "model.gguf"
        if failed := llama_cpp.llama_model_quantize(str(path).encode(), str(target).encode(), params):
            raise RuntimeError(f"llama.cpp could not make {kind} of {path}: code {failed}")

    place = files.cache_root() / "requantised" / f"{file_hash.file_sha256(path)[:16]}-{kind}"
    folder = cache.get_or_make(place, lambda: cache.write_folder(place, quantise), cache.check_folder)
    return folder / "model.gguf"
