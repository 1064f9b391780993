"""Measure prefill and decode of our engine beside llama.cpp: same file, same token ids, all cores.

Prefill is timed to the first new token, decode from there to the last; both decode greedily to the exact token budget.
Operations are those of the matrix products with the weights, in the type that they are multiplied in (without attention
and logits); bytes are those of the weights, which decode reads once per token. The last cases are answers from
passages, which end where the model ends them: there speculative decoding can copy from the passages.

Letters: M width.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Annotated

import jax
import numpy as np
from annotated_types import Ge, Le, MinLen

from rag import native
from rag.bench import questions as bench_questions
from rag.bench.peers.llama_cpp import LlamaCpp, LlamaCppGenerator, llama_cpp_peers
from rag.bench.timing import Row
from rag.generate import Generator, Request
from rag.generate.local import LocalGenerator, WeightsDtype
from rag.generate.prefill_batches import TokenRequest
from rag.models import hub
from rag.models.llama.model import Llama
from rag.ops.linear import product_type
from rag.runtime.machine.measurement import READ_RATE, WORKING_SET, Figure, Spread
from rag.runtime.options import Count, Filled, check_fields
from rag.runtime.shapes import round_up_prompt
from rag.types import Message, Usage

Write = Callable[[list[int], int], Iterator[int]]  # prompt, new tokens -> the number of tokens of each step
Seconds = dict[str, list[tuple[float, float]]]  # name -> (prefill, decode) of each round

_TOKEN_IDS = (1000, 40000)  # the range that prompts are drawn from
_REST_S = 0.02  # after its turn a peer's thread pool spins for a while, on the cores that the next one needs


@dataclass(frozen=True)
class GenerateBenchmark:
    """Measure tokens per second of prefill and decode; conf/bench/generate.yaml has the defaults."""

    questions: bench_questions.QuestionSet
    weights: Filled
    dtypes: Annotated[Sequence[WeightsDtype], MinLen(1)]
    prompt_tokens: Sequence[Count]
    contexts: Sequence[Count]
    new_tokens: Annotated[int, Ge(2), Le(1_000_000)]
    speculative: Sequence[bool]
    grounded_tokens: Count
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return the rows of prefill and decode for each dtype, then those of answers from passages."""
        ours: dict[str, LocalGenerator] = {dtype: self._ours(dtype) for dtype in self.dtypes}
        sizes = sorted({*self.prompt_tokens, *self.contexts})
        room = max(*sizes, 2048) + max(self.new_tokens, self.grounded_tokens) + 1
        peers = llama_cpp_peers(hub.local_path(self.weights), room)
        measured = {size: self._seconds(ours, peers, size) for size in sizes}
        work = {dtype: work_of(generator.engine.model, generator.dtype) for dtype, generator in ours.items()}
        found = []
        for dtype in self.dtypes:
            found += [
                self._prefill(measured[size], dtype, peers, size, work[dtype]) for size in self.prompt_tokens
            ]
            found += [self._decode(measured[size], dtype, peers, size, work[dtype]) for size in self.contexts]
        return found + self._grounded(ours, peers)

    def _ours(self, dtype: WeightsDtype, speculative: bool = False) -> LocalGenerator:
        return LocalGenerator(self.weights, dtype, adapter=None, speculative=speculative)

    def _seconds(self, ours: dict[str, LocalGenerator], peers: dict[str, LlamaCpp], size: int) -> Seconds:
        """Time rounds with a new prompt each, so that no cache can help; the first round is warm-up."""
        rng = np.random.default_rng(0)
        write = {name: _unending(generator) for name, generator in ours.items()}
        write |= {name: _one_at_a_time(model) for name, model in peers.items()}
        seconds: Seconds = {name: [] for name in write}
        for turn in range(self.repeats + 1):
            prompt = rng.integers(*_TOKEN_IDS, size).tolist()
            for name, call in write.items():
                time.sleep(_REST_S)
                taken = timed(call, prompt, self.new_tokens)
                if turn:
                    seconds[name].append(taken)
        return seconds

    def _prefill(
        self, seconds: Seconds, dtype: str, peers: dict[str, LlamaCpp], size: int, work: "WeightsWork"
    ) -> Row:
        rates = {name: Spread.of([size / prefill for prefill, _ in taken]) for name, taken in seconds.items()}
        unit, flop = work.products(size)
        flops: dict[str, Figure] = {unit: _scaled(rates[dtype], flop / 1e9)}
        return _row(f"prefill {size}, {dtype}", rates, dtype, flops, {name: {} for name in peers})

    def _decode(
        self, seconds: Seconds, dtype: str, peers: dict[str, LlamaCpp], size: int, work: "WeightsWork"
    ) -> Row:
        count = self.new_tokens - 1
        rates = {name: Spread.of([count / decode for _, decode in taken]) for name, taken in seconds.items()}
        read = _read_figures(rates[dtype], work.nbytes)
        theirs = {name: _read_figures(rates[name], model.nbytes) for name, model in peers.items()}
        return _row(f"decode at {size}, {dtype}", rates, dtype, read, theirs)

    def _grounded(self, ours: dict[str, LocalGenerator], peers: dict[str, LlamaCpp]) -> list[Row]:
        """Measure decode of answers from passages, with and without speculative decoding, in tokens per second."""
        if not self.speculative:
            return []
        search, asked = self.questions.load()
        some = next(iter(ours.values()))
        reader = self.questions.reader(some, self.grounded_tokens)
        prompts = [
            bench_questions.messages(question, search, reader) for question in asked[: 2 * self.repeats + 1]
        ]
        cases: dict[str, Generator] = {
            f"{dtype}, {'speculative' if speculative else 'plain'}": self._ours(dtype, speculative)
            for dtype in self.dtypes
            for speculative in self.speculative
        }
        mine = list(cases)
        cases |= {
            name: LlamaCppGenerator(model, some, some.tokenizer.eos_ids) for name, model in peers.items()
        }
        rates: dict[str, list[float]] = {name: [] for name in cases}
        for turn, prompt in enumerate(prompts):
            for name, generator in cases.items():
                time.sleep(_REST_S)
                if (rate := _answer_rate(generator, prompt, self.grounded_tokens)) is not None and turn:
                    rates[name].append(rate)
        spreads = {name: Spread.of(values) for name, values in rates.items() if values}
        others = {name: spreads[name] for name in peers if name in spreads}
        return [
            _row(
                f"decode of answers, {name}",
                {name: spreads[name], **others},
                name,
                {},
                {peer: {} for peer in others},
            )
            for name in mine
            if name in spreads
        ]


@dataclass(frozen=True, slots=True)
class WeightsWork:
    """The work that a model's weights cause: FLOP per prompt token, bytes read per decoded token."""

    flop: int
    nbytes: int
    dtype: str
    width: int  # M
    native: bool  # whether rag.native may run the prefill

    def products(self, tokens: int) -> tuple[str, int]:
        """Return the name of a prefill's rate, by the type that is multiplied in, and the FLOP per token."""
        if self.dtype != "int8":
            return f"{self.dtype} GFLOP/s", self.flop
        rows = round_up_prompt(tokens)
        kind = product_type(rows, self.width, by_native=self.native and native.supports_prefill(rows))
        return ("int8 GOP/s", 2 * self.flop) if kind == "int8" else (f"{kind} GFLOP/s", self.flop)


def work_of(model: Llama, dtype: str) -> WeightsWork:
    """Count a model's work, without the FLOP of norms and the bytes of an embedding that is not the output head."""
    leaves = jax.tree.leaves(model)
    vocab = model.config.vocab_size
    tables = [leaf for leaf in leaves if leaf.ndim == 2 and leaf.shape[0] == vocab]
    flop = 2 * (sum(leaf.size for leaf in leaves if leaf.ndim == 2) - sum(table.size for table in tables))
    nbytes = sum(leaf.nbytes for leaf in leaves) - sum(table.nbytes for table in tables[1:])
    return WeightsWork(flop, nbytes, dtype, model.config.hidden_size, model.native)


def timed(write: Write, prompt: list[int], new_tokens: int) -> tuple[float, float]:
    """Return the seconds to the first token and those of the others. Raises RuntimeError if tokens are missing."""
    begin = time.perf_counter()
    writing = write(prompt, new_tokens)
    made = next(writing)
    first = time.perf_counter()
    made += sum(writing)
    end = time.perf_counter()
    if made != new_tokens:
        raise RuntimeError(f"{made} tokens were written instead of {new_tokens}")
    return first - begin, end - first


def _unending(generator: LocalGenerator) -> Write:
    engine = generator.engine
    engine.end_ids = ()  # the budget alone ends an answer

    def write(prompt: list[int], new_tokens: int) -> Iterator[int]:
        state = engine.prefill(TokenRequest(tuple(prompt), new_tokens))
        return (len(tokens) for tokens in engine.stream(state))

    return write


def _one_at_a_time(model: LlamaCpp) -> Write:
    return lambda prompt, new_tokens: (1 for _ in model.write(prompt, new_tokens))


def _answer_rate(generator: Generator, prompt: Sequence[Message], budget: int) -> float | None:
    """Return tokens per second after the first one; None for an answer that is too short to have a rate."""
    *_, usage = generator.stream(Request(prompt, max_new_tokens=budget))
    assert isinstance(usage, Usage)
    return None if usage.new_tokens < 8 else (usage.new_tokens - 1) / usage.decode_s


def _read_figures(rate: Spread, nbytes: int) -> dict[str, Figure]:
    """Return the figures of reading so many bytes for each token."""
    return {WORKING_SET: nbytes / 1e6, READ_RATE: _scaled(rate, nbytes / 1e9)}


def _scaled(rate: Spread, factor: float) -> Spread:
    return Spread(factor * rate.median, factor * rate.low, factor * rate.high)


def _row(
    case: str,
    rates: dict[str, Spread],
    mine: str,
    more: dict[str, Figure],
    theirs: dict[str, dict[str, Figure]],
) -> Row:
    peers = {name: {"tokens/s": rates[name], **figures} for name, figures in theirs.items()}
    ratios = {name: rates[mine].median / rates[name].median for name in theirs}
    return Row(case, {"tokens/s": rates[mine], **more}, peers, ratios)
