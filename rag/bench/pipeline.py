"""Time a question to its answer, retrieval, prompt, prefill and decode, with every way of reusing keys and values.

Every generator is called through rag.pipeline.answer with the same passages, so retrieval and prompt are the same code,
and llama.cpp gets the same token ids. Each question is asked once of each, in turns, after warm-up questions; answers
continue to the exact token budget, whatever their tokens. A generator that caches passages has prefilled those of the
measured questions before, as at ingest, but in another order and under another question; one that caches prompts has
prefilled other questions. "own prefix reuse" is llama.cpp's default: it reuses the prefix that a prompt shares with the
one before, here the instruction; in the other columns it is reset before each question.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated

from annotated_types import MinLen

from rag import pipeline
from rag.bench import questions as bench_questions
from rag.bench.peers.llama_cpp import LlamaCppGenerator, llama_cpp_peers
from rag.bench.timing import Row
from rag.generate import Generator, Request
from rag.generate.local import KVReuse, LocalGenerator, WeightsDtype
from rag.models import hub
from rag.pipeline import Reader
from rag.retrieve.search import Search
from rag.runtime.machine.measurement import Spread
from rag.runtime.options import Count, Filled, Whole, check_fields
from rag.types import Answer, UserError

_REST_S = 0.05  # after its turn a peer's thread pool spins for a while, on the cores that the next one needs


@dataclass(frozen=True, slots=True)
class AnswerTimes:
    """Seconds from the question to the first and to the last token of its answer, and the numbers of tokens."""

    first: float
    last: float
    retrieval: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class PipelineBenchmark:
    """Measure milliseconds from a question to the first and to the last token of its answer.

    conf/bench/pipeline.yaml has the defaults.
    """

    questions: bench_questions.QuestionSet
    weights: Filled
    dtypes: Annotated[Sequence[WeightsDtype], MinLen(1)]
    kv_reuse: Annotated[Sequence[KVReuse], MinLen(1)]
    kv_recompute: Annotated[Sequence[Whole], MinLen(1)]
    speculative: bool
    new_tokens: Count
    repeats: Count
    warmup: Whole

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each dtype and way of reusing keys and values. Raises UserError for too few questions."""
        search, questions = self.questions.load()
        if len(questions) < self.warmup + self.repeats:
            raise UserError(f"bench.repeats is {self.repeats}, but there are only {len(questions)} questions")
        asked = questions[: self.warmup + self.repeats]
        generators = {name: self._ours(*case) for name, case in self._cases().items()}
        ours = {name: self._reader(generator) for name, generator in generators.items()}
        for name, (_, kv_reuse, _) in self._cases().items():
            if kv_reuse in ("chunk", "blend"):
                _prefill_passages(asked[self.warmup :], search, ours[name])
        self._compile(asked[self.warmup :], search)
        readers = ours | self._peers(asked, search, next(iter(generators.values())))
        times: dict[str, list[AnswerTimes]] = {name: [] for name in readers}
        for question in asked:
            for name, reader in readers.items():
                time.sleep(_REST_S)
                times[name].append(timed_answer(question, search, reader))
        return rows({name: taken[self.warmup :] for name, taken in times.items()}, list(ours))

    def _cases(self) -> dict[str, tuple[WeightsDtype, KVReuse, int]]:
        """Return the arguments of `_ours` by the name of the case."""
        kinds = [
            (kind, n) for kind in self.kv_reuse for n in (self.kv_recompute if kind == "chunk" else (0,))
        ]
        return {
            f"{dtype}, reuse {kind}" + (f", {n} tokens recomputed" if n else ""): (dtype, kind, n)
            for dtype in self.dtypes
            for kind, n in kinds
        }

    def _ours(self, dtype: WeightsDtype, kv_reuse: KVReuse, kv_recompute: int) -> LocalGenerator:
        generator = LocalGenerator(
            self.weights,
            dtype,
            adapter=None,
            kv_reuse=kv_reuse,
            kv_recompute=kv_recompute,
            speculative=self.speculative,
        )
        generator.engine.end_ids = ()  # the budget alone ends an answer
        return generator

    def _reader(self, generator: Generator) -> Reader:
        return self.questions.reader(generator, self.new_tokens)

    def _compile(self, questions: Sequence[str], search: Search) -> None:
        """Compile every program that prompts of these lengths need, with generators whose caches are dropped."""
        for case in self._cases().values():
            reader = self._reader(self._ours(*case))
            for question in questions:
                timed_answer(question, search, reader)

    def _peers(self, asked: Sequence[str], search: Search, ours: LocalGenerator) -> dict[str, Reader]:
        reader = self._reader(ours)
        prompts = (bench_questions.messages(question, search, reader) for question in asked)
        longest = max(map(ours.prompt_tokens, prompts))
        models = llama_cpp_peers(hub.local_path(self.weights), longest + self.new_tokens + 1, reuse=True)
        return {name: self._reader(LlamaCppGenerator(model, ours)) for name, model in models.items()}


def _prefill_passages(questions: Sequence[str], search: Search, reader: Reader) -> None:
    for question in questions:
        prompt = bench_questions.another_prompt(question, search, reader)
        reader.generator.generate([Request(prompt, max_new_tokens=1)])


def timed_answer(question: str, search: Search, reader: Reader) -> AnswerTimes:
    """Answer the question and return its times. Raises RuntimeError when the answer ends before its token budget."""
    begin = time.perf_counter()
    pieces = pipeline.answer(question, search, reader)
    next(pieces)
    first = time.perf_counter()
    *_, answer = pieces
    last = time.perf_counter()
    assert isinstance(answer, Answer)
    if answer.timings.new_tokens != reader.options.max_new_tokens:
        raise RuntimeError(f"the answer to {question!r} ended before {reader.options.max_new_tokens} tokens")
    timings = answer.timings
    return AnswerTimes(
        first - begin, last - begin, timings.retrieve_s, timings.prompt_tokens, timings.new_tokens
    )


def rows(times: dict[str, list[AnswerTimes]], ours: Sequence[str]) -> list[Row]:
    """Return a row for each of our settings, compared with every peer."""
    figures = {name: _figures(taken) for name, taken in times.items()}
    peers = {name: figures[name] for name in times if name not in ours}
    found = []
    for name in ours:
        ratios = {
            f"{peer}, {what}": its[f"{what} token ms"].median / figures[name][f"{what} token ms"].median
            for peer, its in peers.items()
            for what in ("first", "last")
        }
        extra = {
            "retrieval ms": Spread.of([1000 * one.retrieval for one in times[name]]),
            "prompt tokens": Spread.of([one.prompt_tokens for one in times[name]]),
        }
        found.append(Row(name, figures[name] | extra, peers, ratios))
    return found


def _figures(taken: Sequence[AnswerTimes]) -> dict[str, Spread]:
    return {
        "first token ms": Spread.of([1000 * one.first for one in taken]),
        "last token ms": Spread.of([1000 * one.last for one in taken]),
    }
