"""Many questions answered: ours all in one call, llama.cpp one by one, the same prompts' token ids, greedy, same stops.

Both answer every question as an evaluation would: end tokens and stops count. Other questions, as many, are answered
first, so that what compiles or starts up does not count; what still compiles is told beside. llama.cpp keeps what a
prompt shares with the one before, as it does by itself.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import MinLen

from rag.bench import questions as bench_questions
from rag.bench.peers.llama_cpp import LLAMA_CPP, LlamaCppGenerator, open_llama_cpp
from rag.bench.timing import Row
from rag.generate.local import DTYPES, KVReuse, LocalGenerator
from rag.models import hub
from rag.runtime.clock import Clock
from rag.runtime.options import Count, Filled, check_fields
from rag.types import Message, Usage, UserError

Conversations = Sequence[Sequence[Message]]


@dataclass(frozen=True)
class EvaluationBenchmark:
    """bench=evaluation: answers a second."""

    questions: bench_questions.QuestionSet
    weights: Filled = hub.DEFAULT_GENERATOR  # a GGUF file, which llama.cpp reads too
    dtypes: Annotated[Sequence[Literal[DTYPES]], MinLen(1)] = ("float32", "int8")
    kv_reuse: Annotated[Sequence[KVReuse], MinLen(1)] = ("none",)
    count: Count = 100
    max_new_tokens: Count = 32
    stop: Sequence[Filled] = ("\n",)

    def __post_init__(self):
        check_fields(self)

    def run(self) -> list[Row]:
        search, questions = self.questions.load()
        if len(questions) < 2 * self.count:
            raise UserError(
                f"bench.count={self.count} needs {2 * self.count} questions, of which there are {len(questions)}"
            )
        cases = [(dtype, kind) for dtype in self.dtypes for kind in self.kv_reuse]
        ours = {
            f"{dtype}, reuse {kind}": LocalGenerator(self.weights, dtype, kv_reuse=kind)
            for dtype, kind in cases
        }
        first = next(iter(ours.values()))
        reader = self.questions.reader(first, self.max_new_tokens, self.stop)
        prompts = [
            bench_questions.messages(question, search, reader) for question in questions[: 2 * self.count]
        ]
        before, asked = prompts[: self.count], prompts[self.count :]
        answered = {
            name: timed(lambda some, generator=generator: self._together(generator, some), before, asked)
            for name, generator in ours.items()
        }
        room = max(map(first.prompt_tokens, prompts)) + self.max_new_tokens + 1
        peers = {}
        if model := open_llama_cpp(hub.local_path(self.weights), room, reuse=True):
            peer = LlamaCppGenerator(model, first, first.tokenizer.eos_ids)
            peers[LLAMA_CPP] = timed(lambda some: self._one_by_one(peer, some), before[:2], asked)
        return [_row(name, seconds, peers, len(asked)) for name, seconds in answered.items()]

    def _together(self, generator, conversations: Conversations) -> list[str]:
        return generator.generate(conversations, max_new_tokens=self.max_new_tokens, stop=self.stop)

    def _one_by_one(self, peer: LlamaCppGenerator, conversations: Conversations) -> list[str]:
        answers = []
        for messages in conversations:
            pieces = peer.stream(messages, max_new_tokens=self.max_new_tokens, stop=self.stop)
            answers.append("".join(piece for piece in pieces if not isinstance(piece, Usage)))
        return answers


def timed(
    answer: Callable[[Conversations], list[str]], before: Conversations, asked: Conversations
) -> dict[str, float]:
    """Seconds for all of `asked`, after `before`, with what compiling took of them, and the answers' characters."""
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
