"""Measure the numerical sensitivity of a system."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TypeVar

from rag.evaluate.sensitivity.answers import AnswerSensitivity
from rag.evaluate.sensitivity.lists import ListSensitivity
from rag.evaluate.sensitivity.options import SensitivityOptions, SystemUnderTest, Variation
from rag.evaluate.sensitivity.report import MetricChange, SensitivityReport

Progress = Callable[[str, int, int], None]  # "reference", "lists" or "answers", how many done, of how many
Changes = TypeVar("Changes")


def measure_sensitivity(
    system: SystemUnderTest,
    options: SensitivityOptions,
    progress: Progress = lambda *_: None,
) -> SensitivityReport:
    """Compute the reference and every variation, and compare them.

    Raises:
        UserError: when the corpus has no text, and what the parts of the system raise.
    """
    dataset = system.dataset.sample(options.questions, system.dataset.seed)
    progress("reference", 0, 1)
    lists = ListSensitivity(replace(system, dataset=dataset), options)
    answers = AnswerSensitivity(lists)
    progress("reference", 1, 1)
    list_variations, no_lists = lists.variations()
    answer_variations, no_answers = answers.variations()
    return SensitivityReport(
        variations=options,
        dataset={"name": dataset.name, "fingerprint": dataset.fingerprint, "queries": len(dataset.queries)},
        method=repr(system.method),
        means={options.measure: MetricChange.between(lists.values, lists.values).mean} | answers.means(),
        lists=_each("lists", list_variations, lists.changes, progress),
        answers=_each("answers", answer_variations, answers.changes, progress),
        skipped=(*no_lists, *no_answers),
    )


def _each(
    stage: str, variations: Sequence[Variation], changes: Callable[[Variation], Changes], progress: Progress
) -> tuple[Changes, ...]:
    found = []
    for done, variation in enumerate(variations):
        progress(stage, done, len(variations))
        found.append(changes(variation))
        progress(stage, done + 1, len(variations))
    return tuple(found)
