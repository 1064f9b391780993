"""Answer many questions: ours in one call, llama.cpp one by one, with the same token ids and stop strings, greedily.

Both answer every question as an evaluation does: end tokens and stop strings end an answer. As many other questions are
answered first as warm-up, so that compiling and starting up do not count; what still compiles is a figure of its own.
llama.cpp reuses the prefix that a prompt shares with the one before, as it does by default.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from annotated_types import MinLen

from rag.bench import questions as bench_questions
from rag.bench.peers.llama_cpp import LLAMA_CPP, LlamaCppGenerator, open_llama_cpp
from rag.bench.timing import Row
from rag.generate import Generator, Request
from rag.generate.local import KVReuse, LocalGenerator, WeightsDtype
from rag.models import hub
from rag.runtime.machine.clock import Clock
from rag.runtime.options import Count, Filled, check_fields
from rag.types import Message, UserError

Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class EvaluationBenchmark:
    """Measure answers per second; conf/bench/evaluation.yaml has the defaults."""

    questions: bench_questions.QuestionSet
    weights: Filled
    dtypes: Annotated[Sequence[WeightsDtype], MinLen(1)]
    kv_reuse: Annotated[Sequence[KVReuse], MinLen(1)]
    count: Count
    max_new_tokens: Count
    stop: Sequence[Filled]

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each dtype and way of reusing keys and values. Raises UserError for too few questions."""
        search, questions = self.questions.load()
        if len(questions) < 2 * self.count:
            raise UserError(
                f"bench.count={self.count} needs {2 * self.count} questions, of which there are {len(questions)}"
            )
        cases = [(dtype, kind) for dtype in self.dtypes for kind in self.kv_reuse]
        ours = {
            f"{dtype}, reuse {kind}": LocalGenerator(self.weights, dtype, adapter=None, kv_reuse=kind)
            for dtype, kind in cases
        }
        first = next(iter(ours.values()))
        reader = self.questions.reader(first, self.max_new_tokens, self.stop)
        prompts = [
            bench_questions.messages(question, search, reader) for question in questions[: 2 * self.count]
        ]
        before, asked = prompts[: self.count], prompts[self.count :]
        answered = {
            name: timed(partial(self._answers, generator), before, asked) for name, generator in ours.items()
        }
        room = max(map(first.prompt_tokens, prompts)) + self.max_new_tokens + 1
        peers = {}
        if model := open_llama_cpp(hub.local_path(self.weights), room, reuse=True):
            peer = LlamaCppGenerator(model, first, first.tokenizer.eos_ids)
            peers[LLAMA_CPP] = timed(partial(self._answers, peer), before[:2], asked)
        return [_row(name, seconds, peers, len(asked)) for name, seconds in answered.items()]

    def _answers(self, generator: Generator, conversations: Conversations) -> list[str]:
        requests = [Request(m, max_new_tokens=self.max_new_tokens, stop=self.stop) for m in conversations]
        return generator.generate(requests)


def timed(
    answer: Callable[[Conversations], list[str]], before: Conversations, asked: Conversations
) -> dict[str, float]:
    """Return the seconds of answering `asked` after the warm-up `before`, those of compiling, and the characters."""
    answer(before)
    begin = Clock.now()
    answers = answer(asked)
    taken = Clock.now() - begin
    return {
        "seconds": taken.wall,
        "of these compiling": taken.compiling,
        "characters": sum(map(len, answers)),
    }


def _row(name: str, mine: dict[str, float], peers: dict[str, dict[str, float]], count: int) -> Row:
    def figures(found: dict[str, float]) -> dict[str, float]:
        return {"answers/s": count / found["seconds"], **found}

    others = {peer: figures(found) for peer, found in peers.items()}
    for found in others.values():
        del found["of these compiling"]
    ratios = {peer: found["seconds"] / mine["seconds"] for peer, found in peers.items()}
    return Row(f"{count} questions, {name}", figures(mine), others, ratios)
