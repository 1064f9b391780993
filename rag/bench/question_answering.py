"""Answer questions from retrieved passages beside llama.cpp: same weights, same token ids of the prompts.

Both decode greedily with the same stop strings, and both score the first gold answer after the same prompt. Ours has
int8 weights on a CPU, llama.cpp rounds activations to 8 bits, so near ties fall differently: what counts is the paired
difference and its interval. llama.cpp scores the gold answer first, then returns to the end of the prompt and answers:
it prefills each prompt once, one question at a time. Ours prefills it twice, once to answer and once to score, many
questions together; its seconds include compiling, which is shown beside them.

Letters: N questions.
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float64

from rag.bench.peers.llama_cpp import LLAMA_CPP, LlamaCpp, LlamaCppGenerator, open_llama_cpp
from rag.bench.questions import QuestionSet, Task
from rag.bench.timing import Row
from rag.evaluate.metrics import measure_answer
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.statistics import Statistics, intervals, randomisation
from rag.generate import Request
from rag.generate.local import LocalGenerator, WeightsDtype
from rag.models import hub
from rag.runtime.machine.clock import Clock
from rag.runtime.options import Count, Filled, check_fields

MEASURES = ("EM", "F1", "contains", "log-likelihood")


@dataclass(frozen=True, slots=True)
class EngineAnswers:
    """The answers of one engine to all tasks, in their order, and the seconds that they took."""

    texts: Sequence[str]
    log_likelihoods: Sequence[float]  # of each task's first gold answer, natural logarithm
    answering_s: float
    scoring_s: float
    compile_s: float = 0.0  # of both together


@dataclass(frozen=True)
class QuestionAnsweringBenchmark:
    """Measure EM, F1, contains and gold log-likelihood; conf/bench/question_answering.yaml has the defaults."""

    questions: QuestionSet
    weights: Filled
    dtype: WeightsDtype
    max_new_tokens: Count
    stop: Sequence[Filled]

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each measure and one for the seconds."""
        generator = LocalGenerator(self.weights, self.dtype, adapter=None)  # llama.cpp has none
        tasks = self.questions.tasks(generator, self.max_new_tokens, self.stop)
        outcomes = {"ours": self._ours(generator, tasks)}
        if model := open_llama_cpp(hub.local_path(self.weights), self._context(generator, tasks), reuse=True):
            outcomes[LLAMA_CPP] = self._llama_cpp(model, generator, tasks)
        return rows(tasks, outcomes)

    def _ours(self, generator: LocalGenerator, tasks: Sequence[Task]) -> EngineAnswers:
        _ = generator.engine  # loads the weights
        begin = Clock.now()
        texts = generator.generate([self._request(task) for task in tasks])
        answered = Clock.now()
        scores = generator.log_likelihood([(task.messages, task.gold[0]) for task in tasks])
        scored = Clock.now()
        return EngineAnswers(
            texts,
            [score.total for score in scores],
            (answered - begin).wall,
            (scored - answered).wall,
            (scored - begin).compiling,
        )

    def _context(self, generator: LocalGenerator, tasks: Sequence[Task]) -> int:
        """Return the tokens of the longest task, answer or gold answer included."""
        tokens = (
            generator.prompt_tokens(task.messages) + max(self.max_new_tokens, generator.count(task.gold[0]))
            for task in tasks
        )
        return max(tokens) + 1

    def _request(self, task: Task) -> Request:
        return Request(task.messages, max_new_tokens=self.max_new_tokens, stop=self.stop)

    def _llama_cpp(self, model: LlamaCpp, ours: LocalGenerator, tasks: Sequence[Task]) -> EngineAnswers:
        generator, tokenizer = LlamaCppGenerator(model, ours, ours.tokenizer.eos_ids), ours.tokenizer
        texts, scores, scoring_s, begin = [], [], 0.0, time.perf_counter()
        for task in tasks:
            model.prefill(tokenizer.chat(task.messages))
            started = time.perf_counter()
            scores.append(model.log_likelihood(tokenizer.encode(task.gold[0], special=False)))
            scoring_s += time.perf_counter() - started
            texts += generator.generate([self._request(task)])
        return EngineAnswers(texts, scores, time.perf_counter() - begin - scoring_s, scoring_s)


def rows(
    tasks: Sequence[Task], outcomes: dict[str, EngineAnswers], options: Statistics = Statistics()
) -> list[Row]:
    """Return a row for each measure, then one for the seconds.

    Args:
        tasks: The questions.
        outcomes: Those of "ours" and of any peers, by name.
        options: How intervals and p are computed.

    Returns:
        Rows with each engine's mean and its interval; a peer's figures also have the paired difference, ours minus
        its own, with its interval and the p of a two-sided randomisation test.
    """
    tables = {
        name: scores_of(tasks, outcome.texts, outcome.log_likelihoods) for name, outcome in outcomes.items()
    }
    spread = {name: _interval_figures(table, options) for name, table in tables.items()}
    ours = spread.pop("ours")
    for name, figures in spread.items():
        paired = tables["ours"] - tables[name]
        p = randomisation(paired, options)
        for i, compared in enumerate(_interval_figures(paired, options)):
            figures[i] |= {f"ours minus it, {key}": value for key, value in compared.items()}
            figures[i]["p"] = float(p[i])
    return [
        Row(f"{measure}, {len(tasks)} questions", ours[i], {name: spread[name][i] for name in spread})
        for i, measure in enumerate(MEASURES)
    ] + [_seconds(outcomes)]


def scores_of(
    tasks: Sequence[Task], texts: Sequence[str], log_likelihoods: Sequence[float]
) -> Float64[np.ndarray, "N 4"]:
    """Return the scores of all answers, a column for each of MEASURES."""
    found = []
    for task, text, likelihood in zip(tasks, texts, log_likelihoods, strict=True):
        scores = measure_answer(JudgedAnswer(text.strip(), task.gold), MEASURES)
        found.append([scores["EM"], scores["F1"], scores["contains"], likelihood])
    return np.array(found, np.float64)


def _interval_figures(values: Float64[np.ndarray, "N 4"], options: Statistics) -> list[dict[str, float]]:
    """Return mean, low and high of each column."""
    bounds = intervals(values, options)
    return [
        {"mean": float(mean), "low": float(low), "high": float(high)}
        for mean, (low, high) in zip(values.mean(axis=0), bounds, strict=True)
    ]


def _seconds(outcomes: dict[str, EngineAnswers]) -> Row:
    """Return the seconds for all questions, and how many answers differ from ours in any letter."""
    seconds: dict[str, dict[str, float]] = {
        name: {"answering s": outcome.answering_s, "scoring s": outcome.scoring_s}
        for name, outcome in outcomes.items()
    }
    ours = outcomes["ours"]
    mine = seconds.pop("ours") | {"of these compiling s": ours.compile_s}
    for name, figures in seconds.items():
        pairs = zip(ours.texts, outcomes[name].texts, strict=True)
        figures["answers that differ"] = sum(a.strip() != b.strip() for a, b in pairs)
    ratios = {name: figures["answering s"] / ours.answering_s for name, figures in seconds.items()}
    return Row("time and agreement", mine, seconds, ratios)
