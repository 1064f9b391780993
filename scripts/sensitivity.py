"""Measure the numerical sensitivity of an evaluation: how much batch sizes, padding and number formats change it.

python scripts/sensitivity.py dataset=sample
python scripts/sensitivity.py dataset=sample retriever=hybrid sensitivity.answers=0

Everything is computed, with one setting changed at a time; no cached result is read or written.
"""

from __future__ import annotations  # the types below are imported in functions: a typo must not wait for JAX

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from hydra_run import run_dir
from launch import launch
from settings import CorpusFolder, Part, build, target_of
from system import SystemSettings, build_method, check_dataset

from rag.runtime.options import parameters_of

if TYPE_CHECKING:
    from rich.table import Table

    from rag.evaluate.sensitivity.options import SystemUnderTest
    from rag.evaluate.sensitivity.report import MetricChange, SensitivityReport


@dataclass(frozen=True, kw_only=True)
class SensitivitySettings(SystemSettings):
    """The settings of conf/sensitivity.yaml."""

    dataset: Part
    corpus: CorpusFolder | None = None  # of dataset=synthetic
    chunker: Part
    sensitivity: Part


def main(config) -> None:
    """Measure, print the tables and the verdict, and write them into the run's folder."""
    from terminal import print_problem, progress_bars

    from rag.evaluate.sensitivity.measure import measure_sensitivity
    from rag.retrieve.run_file import run_problems

    system, options = build_system(config), build(config.sensitivity)
    dataset = system.dataset
    documents = [document.id for document in dataset.corpus]
    for problem in (*dataset.problems, *run_problems(system.method, dataset.queries, documents)):
        print_problem(problem)
    with progress_bars() as update:
        report = measure_sensitivity(system, options, update)
    show(report)
    write(report)


def build_system(config) -> SystemUnderTest:
    """Build the system that a configuration describes, with functions that build its parts again."""
    from rag.evaluate.sensitivity.options import SystemUnderTest
    from rag.pipeline import Reader

    reader = {"template": build(config.prompt), "context": build(config.context)}
    reader |= {"sampling": build(config.sampling), "options": build(config.answer)}

    def factory(part, setting: str) -> Callable | None:
        """Return a function that builds the part with a value of the setting; None if the part lacks the setting."""
        return (lambda value: build(part, **{setting: value})) if takes(part, setting) else None

    return SystemUnderTest(
        dataset=check_dataset(build(config.dataset), config.dataset),
        chunker=build(config.chunker),
        embedder=build(config.embedder),
        method=build_method(config),
        generator=functools.cache(lambda: build(config.generator)),
        reader=lambda generator: Reader(generator, **reader),
        embedder_of_batch=factory(config.embedder, "tokens_per_batch"),
        generator_of_batch=factory(config.generator, "tokens_per_batch"),
        generator_of_dtype=factory(config.generator, "dtype"),
    )


def takes(part, setting: str) -> bool:
    """Return whether the target of a part of the configuration has a setting."""
    return setting in parameters_of(target_of(part))


def write(report: SensitivityReport) -> None:
    """Write sensitivity.json and verdict.txt into the run's folder."""
    from rag.runtime.files import atomic_file
    from rag.runtime.machine.hardware import environment

    folder = run_dir()
    record = report.summary() | {"environment": environment()}
    texts = {
        "sensitivity.json": json.dumps(record, indent=1, allow_nan=False, ensure_ascii=False),
        "verdict.txt": report.verdict,
    }
    for name, text in texts.items():
        with atomic_file(folder / name, "w") as file:
            file.write(f"{text}\n")
    print(f"-> {folder}")


def show(report: SensitivityReport) -> None:
    """Print a table of lists, a table of answers, the axes that were left out, and the verdict."""
    from rich.console import Console
    from terminal import print_problem

    wide = None if sys.stdout.isatty() else 1000  # a log has no width: never cut a table that goes into one
    for table in (list_table(report), answer_table(report)):
        if table.rows:
            Console(width=wide).print(table)
    for sentence in report.skipped:
        print_problem(sentence)
    print(report.verdict)


def list_table(report: SensitivityReport) -> Table:
    """Return the table of changed top-k lists."""
    v, d = report.variations, report.dataset
    title = f"{d['name']}: {d['queries']} top-{v.k} lists, {v.measure} {number(report.means[v.measure])}"
    table = _table(title, "other\nlists", "other\npassages", "scores\nby up to", *_headings(v.measure))
    for row in report.lists:
        changes = (str(len(row.changed)), str(len(row.replaced)), f"{row.score_difference:.1e}")
        table.add_row(row.axis, row.setting, *changes, *_figures(row.movements[v.measure]))
    return table


def answer_table(report: SensitivityReport) -> Table:
    """Return the table of changed answers."""
    from rag.evaluate.sensitivity.answers import ANSWER_METRICS_COMPARED

    means = {name: report.means.get(name) for name in ANSWER_METRICS_COMPARED}
    count = report.answers[0].answers if report.answers else 0
    title = f"{count} answers, " + ", ".join(f"{name} {number(mean)}" for name, mean in means.items())
    table = _table(title, "other\ntext", *(heading for name in means for heading in _headings(name)))
    for row in report.answers:
        moved = [figure for name in means for figure in _figures(row.movements[name])]
        table.add_row(row.axis, row.setting, str(len(row.changed)), *moved)
    return table


def _table(title: str, *headings: str) -> Table:
    from rich.table import Table

    table = Table(title=title)
    table.add_column("varied", no_wrap=True)
    for heading in ("to", *headings):
        table.add_column(heading, justify="right")
    return table


def _headings(measure: str) -> tuple[str, str]:
    return f"{measure}\nmoves by", "one query\nby up to"


def _figures(movement: MetricChange) -> tuple[str, str]:
    return number(movement.change, "+z.4f"), number(movement.largest)


def number(value: float | None, spelling: str = ".4f") -> str:
    """Return a number as text; "-" for None."""
    return "-" if value is None else format(value, spelling)


if __name__ == "__main__":
    launch(main, "sensitivity", SensitivitySettings)
