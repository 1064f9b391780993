"""Reading a prompt and writing an answer: our engine beside llama.cpp, same file, same token ids, all cores.

Prefill is timed to the first new token, decode from there to the last; both decode greedily to the exact budget.
"""

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rag.generate.engine import Engine
from rag.generate.local import LocalGenerator
from rag.measure import Row, cores
from rag.models import hub

Run = Callable[[list[int], int], tuple[float, float]]  # prompt, new tokens -> seconds of prefill, of decode


@dataclass(frozen=True)
class Generate:
    """bench=generate: tokens per second of prefill and decode."""

    weights: str = hub.DEFAULT_GENERATOR
    dtype: str = "float32"
    prompt_tokens: tuple[int, ...] = (256, 1024)
    new_tokens: int = 64
    steps_per_dispatch: int = 4
    repeats: int = 5

    def run(self) -> list[Row]:
        runs = {"ours": _ours(self.weights, self.dtype, self.steps_per_dispatch)}
        if peer := _llama_cpp(str(hub.local_path(self.weights)), max(self.prompt_tokens) + self.new_tokens):
            runs["llama-cpp-python"] = peer
        return [self._row(runs, size) for size in self.prompt_tokens]

    def _row(self, runs: dict[str, Run], size: int) -> Row:
        """Each round reads another prompt, so that no peer can answer from its cache; the first does not count."""
        rng = np.random.default_rng(0)
        seconds: dict[str, list[tuple[float, float]]] = {name: [] for name in runs}
        for turn in range(self.repeats + 1):
            prompt = rng.integers(1000, 40000, size).tolist()
            for name, run in runs.items():
                measured = run(prompt, self.new_tokens)
                if turn:
                    seconds[name].append(measured)
        figures = {name: self._figures(size, values) for name, values in seconds.items()}
        ours = figures.pop("ours")
        ratios = {
            f"{peer} {stage}": ours[f"{stage} tok/s"] / values[f"{stage} tok/s"]
            for peer, values in figures.items()
            for stage in ("prefill", "decode")
        }
        return Row(f"{size} in, {self.new_tokens} out", ours, figures, ratios)

    def _figures(self, size: int, seconds: list[tuple[float, float]]) -> dict[str, float]:
        prefill, decode = (statistics.median(stage) for stage in zip(*seconds, strict=True))
        return {"prefill tok/s": size / prefill, "decode tok/s": (self.new_tokens - 1) / decode}


def _ours(weights: str, dtype: str, steps_per_dispatch: int) -> Run:
    model = LocalGenerator(weights, dtype).engine.model
    engine = Engine(model, (), steps_per_dispatch)  # no end tokens: the budget alone ends an answer

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        begin = time.perf_counter()
        decoding = engine.start([prompt], new_tokens)
        made = len(next(decoding)[0])
        first = time.perf_counter()
        made += sum(len(tokens) for [tokens] in decoding)
        assert made == new_tokens
        return first - begin, time.perf_counter() - first

    return run


def _llama_cpp(path: str, context: int) -> Run | None:
    try:
        from llama_cpp import Llama
    except ImportError:
        print("llama-cpp-python is not installed: its column is left out (make bench-setup)", file=sys.stderr)
        return None
    model = Llama(
        path, n_ctx=context, n_threads=cores(), n_threads_batch=cores(), n_batch=2048, verbose=False
    )

    def run(prompt: list[int], new_tokens: int) -> tuple[float, float]:
        model.reset()
        begin = time.perf_counter()
        tokens = model.generate(prompt, temp=0.0)
        next(tokens)
        first = time.perf_counter()
        for _ in range(new_tokens - 1):
            next(tokens)
        return first - begin, time.perf_counter() - first

    return run
