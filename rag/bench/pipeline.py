"""From a question to its answer: retrieval, prompt, prefill and decode, with every way of reusing keys and values.

Every reader goes through rag.pipeline.answer over the same passages, so retrieval and prompt are the same code, and
llama.cpp is given the same token ids. Each question is asked once of each reader, in turns, after others for warming
up; answers go on to the exact budget, whatever token they make. A reader that keeps passages' keys and values has
read the measured questions' passages beforehand, as ingest would have it, but in another order and under another
question; one that keeps prompts has read other questions. "own prefix reuse" is llama.cpp as it behaves by itself:
it keeps what a prompt shares with the one before, here the instruction; elsewhere it is reset before each question.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from rag import pipeline
from rag.bench import questions as bench_questions
from rag.bench.peers.llama_cpp import LlamaCppGenerator, llama_cpp_peers
from rag.bench.timing import Row
from rag.generate.local import DTYPES, KVReuse, LocalGenerator
from rag.models import hub
from rag.pipeline import Reader
from rag.retrieve.search import Search
from rag.runtime.measurement import Spread
from rag.runtime.options import Count, Filled, Whole, check_fields
from rag.types import UserError

_REST_S = 0.05  # after its turn a peer's thread pool spins for a while, on the cores of whoever comes next


@dataclass(frozen=True, slots=True)
class StageClock:
    """Seconds from the question to the first and to the last token of its answer, and what they count."""

    first: float
    last: float
    retrieval: float
    prompt_tokens: int
    new_tokens: int


@dataclass(frozen=True)
class PipelineBenchmark:
    """bench=pipeline: milliseconds from a question to the first and to the last token of its answer."""

    questions: bench_questions.QuestionSet
    weights: Filled = hub.DEFAULT_GENERATOR  # a GGUF file, which llama.cpp reads too
    dtypes: Annotated[Sequence[Literal[DTYPES]], MinLen(1)] = ("float32", "int8")
    kv_reuse: Annotated[Sequence[KVReuse], MinLen(1)] = ("none", "prefix", "chunk", "blend")
    # first tokens of each passage that "chunk" reads anew
    kv_recompute: Annotated[Sequence[Whole], MinLen(1)] = (0,)
    speculative: bool = False
    new_tokens: Count = 64
    repeats: Count = 7  # questions, each asked once
    warmup: Whole = 2  # questions before them

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        search, questions = self.questions.load()
        if len(questions) < self.warmup + self.repeats:
            raise UserError(f"bench.repeats is {self.repeats}, but there are only {len(questions)} questions")
        asked = questions[: self.warmup + self.repeats]
        ours = {name: self._ours(*case) for name, case in self._cases().items()}
        for reader in ours.values():
            if reader.generator.reuses_passages:
                _read_passages(asked[self.warmup :], search, reader)
        self._compile(asked[self.warmup :], search)
        readers = ours | self._peers(asked, search, next(iter(ours.values())))
        clocks: dict[str, list[StageClock]] = {name: [] for name in readers}
        for question in asked:
            for name, reader in readers.items():
                time.sleep(_REST_S)
                clocks[name].append(clocked(question, search, reader))
        return rows({name: taken[self.warmup :] for name, taken in clocks.items()}, list(ours))

    def _cases(self) -> dict[str, tuple[str, str, int]]:
        """The arguments of `_ours` by a name."""
        kinds = [
            (kind, n) for kind in self.kv_reuse for n in (self.kv_recompute if kind == "chunk" else (0,))
        ]
        return {
            f"{dtype}, reuse {kind}" + (f", {n} tokens anew" if n else ""): (dtype, kind, n)
            for dtype in self.dtypes
            for kind, n in kinds
        }

    def _ours(self, dtype: str, kv_reuse: str, kv_recompute: int) -> Reader:
        generator = LocalGenerator(
            self.weights, dtype, kv_reuse=kv_reuse, kv_recompute=kv_recompute, speculative=self.speculative
        )
        generator.engine.end_ids = ()  # the budget alone ends an answer
        return self.questions.reader(generator, self.new_tokens)

    def _compile(self, questions: Sequence[str], search: Search) -> None:
        """Every program that these prompts' lengths ask for, by readers whose memory is thrown away."""
        for case in self._cases().values():
            reader = self._ours(*case)
            for question in questions:
                clocked(question, search, reader)

    def _peers(self, asked: Sequence[str], search: Search, ours: Reader) -> dict[str, Reader]:
        prompts = (bench_questions.messages(question, search, ours) for question in asked)
        longest = max(map(ours.generator.prompt_tokens, prompts))
        models = llama_cpp_peers(hub.local_path(self.weights), longest + self.new_tokens + 1, reuse=True)
        return {
            name: self.questions.reader(LlamaCppGenerator(model, ours.generator), self.new_tokens)
            for name, model in models.items()
        }


def _read_passages(questions: Sequence[str], search: Search, reader: Reader) -> None:
    for question in questions:
        for _ in reader.generator.stream(
            bench_questions.another_use(question, search, reader), max_new_tokens=1
        ):
            pass


def clocked(question: str, search: Search, reader: Reader) -> StageClock:
    """Answer the question. RuntimeError when the answer ends before its budget."""
    begin = time.perf_counter()
    pieces = pipeline.answer(question, search, reader)
    next(pieces)
    first = time.perf_counter()
    *_, answer = pieces
    last = time.perf_counter()
    if answer.timings.new_tokens != reader.options.max_new_tokens:
        raise RuntimeError(f"the answer to {question!r} ended before {reader.options.max_new_tokens} tokens")
    timings = answer.timings
    return StageClock(
        first - begin, last - begin, timings.retrieve_s, timings.prompt_tokens, timings.new_tokens
    )


def rows(clocks: dict[str, list[StageClock]], ours: Sequence[str]) -> list[Row]:
    """A row for each of our settings, the peers beside every one of them."""
    figures = {name: _figures(taken) for name, taken in clocks.items()}
    peers = {name: figures[name] for name in clocks if name not in ours}
    found = []
    for name in ours:
        ratios = {
            f"{peer}, {what}": its[f"{what} token ms"].median / figures[name][f"{what} token ms"].median
            for peer, its in peers.items()
            for what in ("first", "last")
        }
        extra = {
            "retrieval ms": Spread.of([1000 * clock.retrieval for clock in clocks[name]]),
            "prompt tokens": Spread.of([clock.prompt_tokens for clock in clocks[name]]),
        }
        found.append(Row(name, figures[name] | extra, peers, ratios))
    return found


def _figures(taken: Sequence[StageClock]) -> dict[str, Spread]:
    return {
        "first token ms": Spread.of([1000 * clock.first for clock in taken]),
        "last token ms": Spread.of([1000 * clock.last for clock in taken]),
    }
