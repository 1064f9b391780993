"""What faster ways of reading cost in answers: settings of our generator on the same prompts, each beside the first.

Of every setting the means over the questions, the paired difference to the first with its 95% interval, and the
Kullback-Leibler divergence of the distribution of the answer's first token from the first setting's, in nats. For speed
there is bench=pipeline.

Letters: N questions, V vocab.
"""

import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
from jaxtyping import Float, Float64

from rag.bench.reading import MEASURES, ReadingBenchmark, Task, scores_of
from rag.bench.timing import Row
from rag.evaluate.datasets.beir import load_beir
from rag.evaluate.statistics import Statistics, intervals
from rag.generate.local import LocalGenerator
from rag.runtime.measurement import Figure, Spread
from rag.runtime.options import ArgumentsOf
from rag.types import UserError


@dataclass(frozen=True, slots=True)
class QualityOutcome:
    """What one setting made of all questions."""

    scores: Float64[np.ndarray, "N 4"]  # MEASURES
    log_probs: Float[np.ndarray, "N V"]  # of the answer's first token


@dataclass(frozen=True)
class QualityBenchmark:
    """bench=quality: EM, F1, contains, gold log-likelihood and KL of each setting."""

    reading: ReadingBenchmark  # the questions and their prompts
    # a name: options of a LocalGenerator
    settings: Mapping[str, Annotated[Mapping[str, Any], ArgumentsOf(LocalGenerator)]]

    def __post_init__(self):
        if not self.settings:
            raise UserError("bench.settings is empty; name a setting, and others to stand beside it")

    def run(self) -> list[Row]:
        dataset = load_beir(self.reading.path).sample(self.reading.questions, self.reading.seed)
        tasks, outcomes = None, {}
        for name, options in self.settings.items():
            generator = LocalGenerator(self.reading.weights, **options)
            tasks = tasks or self.reading.tasks(dataset, generator)
            print(f"{name}: {len(tasks)} questions", file=sys.stderr)
            outcomes[name] = self._outcome(generator, tasks)
        return rows(outcomes)

    def _outcome(self, generator: LocalGenerator, tasks: Sequence[Task]) -> QualityOutcome:
        conversations = [task.messages for task in tasks]
        limit = self.reading.max_new_tokens
        texts = generator.generate(conversations, max_new_tokens=limit, stop=self.reading.stop)
        gold = generator.log_likelihood([(task.messages, task.gold[0]) for task in tasks])
        scores = scores_of(tasks, texts, [score.total for score in gold])
        log_probs = np.stack([generator.next_log_probs(messages) for messages in conversations])
        return QualityOutcome(scores, log_probs)


def rows(outcomes: Mapping[str, QualityOutcome], options: Statistics = Statistics()) -> list[Row]:
    """A row a setting; all but the first also with what changes from it."""
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
    """KL of `other` from `true`, the mean and the spread over questions, and how often the best token is the same."""
    true, other = true.astype(np.float64), other.astype(np.float64)
    each = (np.exp(true) * (true - other)).sum(axis=1)
    same = np.mean(true.argmax(axis=1) == other.argmax(axis=1))
    return {"mean KL": float(each.mean()), "KL": Spread.of(each.tolist()), "same best token": float(same)}
