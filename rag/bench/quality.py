"""Measure what faster settings of our generator cost in answers: each is compared with the first on the same prompts.

Each setting has the means over the questions, the paired difference from the first setting with its 95% interval, and
the Kullback-Leibler divergence of its distribution of the answer's first token from the first setting's, in nats.
bench=pipeline measures the speed.

Letters: N questions, V vocab.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float64

from rag.bench.question_answering import MEASURES, scores_of
from rag.bench.questions import QuestionSet, Task
from rag.bench.timing import Row
from rag.evaluate.statistics import Statistics, intervals
from rag.generate import Request
from rag.generate.local import LocalGenerator
from rag.runtime.machine.measurement import Figure, Spread
from rag.runtime.options import ArgumentsOf, Count, Filled, check_fields
from rag.types import UserError


@dataclass(frozen=True, slots=True)
class QualityOutcome:
    """The scores of one setting on all questions."""

    scores: Float64[np.ndarray, "N 4"]  # MEASURES
    log_probs: Float[np.ndarray, "N V"]  # of the answer's first token


@dataclass(frozen=True)
class QualityBenchmark:
    """Measure EM, F1, contains, gold log-likelihood and KL of each setting; defaults: conf/bench/quality.yaml."""

    questions: QuestionSet
    weights: Filled
    max_new_tokens: Count
    stop: Sequence[Filled]
    settings: Mapping[str, Annotated[Mapping[str, Any], ArgumentsOf(LocalGenerator)]]  # by name

    def __post_init__(self) -> None:
        check_fields(self)
        if not self.settings:
            raise UserError("bench.settings is empty; name a setting, and others to stand beside it")

    def run(self) -> list[Row]:
        """Return a row for each setting."""
        tasks: list[Task] = []
        outcomes = {}
        for name, options in self.settings.items():
            generator = LocalGenerator(self.weights, **options)
            tasks = tasks or self.questions.tasks(generator, self.max_new_tokens, self.stop)
            print(f"{name}: {len(tasks)} questions", file=sys.stderr)
            outcomes[name] = self._outcome(generator, tasks)
        return rows(outcomes)

    def _outcome(self, generator: LocalGenerator, tasks: Sequence[Task]) -> QualityOutcome:
        conversations = [task.messages for task in tasks]
        requests = [
            Request(messages, max_new_tokens=self.max_new_tokens, stop=self.stop)
            for messages in conversations
        ]
        texts = generator.generate(requests)
        gold = generator.log_likelihood([(task.messages, task.gold[0]) for task in tasks])
        scores = scores_of(tasks, texts, [score.total for score in gold])
        log_probs = np.stack([generator.prefiller.next_log_probs(messages) for messages in conversations])
        return QualityOutcome(scores, log_probs)


def rows(outcomes: Mapping[str, QualityOutcome], options: Statistics = Statistics()) -> list[Row]:
    """Return a row for each setting; all but the first also have the change from the first."""
    first = next(iter(outcomes.values()))
    found = []
    for name, outcome in outcomes.items():
        figures: dict[str, Figure] = dict(zip(MEASURES, outcome.scores.mean(axis=0).tolist(), strict=True))
        if outcome is not first:
            change = outcome.scores - first.scores
            for measure, mean, bounds in zip(
                MEASURES, change.mean(axis=0), intervals(change, options), strict=True
            ):
                figures[f"change of {measure}"] = Spread(float(mean), *map(float, bounds))
            figures |= _divergence(first.log_probs, outcome.log_probs)
        found.append(Row(f"{name}, {len(outcome.scores)} questions", figures))
    return found


def _divergence(true: Float[np.ndarray, "N V"], other: Float[np.ndarray, "N V"]) -> dict[str, Figure]:
    """Return KL(true || other), its mean and spread over questions, and how often the best token is the same."""
    true, other = true.astype(np.float64), other.astype(np.float64)
    each = (np.exp(true) * (true - other)).sum(axis=1)
    same = np.mean(true.argmax(axis=1) == other.argmax(axis=1))
    return {"mean KL": float(each.mean()), "KL": Spread.of(each.tolist()), "same best token": float(same)}
