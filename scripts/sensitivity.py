"""How much an evaluation changes with what should not matter: batch sizes, padding, number formats.

python scripts/sensitivity.py dataset=sample
python scripts/sensitivity.py dataset=sample retriever=hybrid sensitivity.answers=0 'sensitivity.vector_dtypes=[bfloat16]'

Everything is computed anew, with one setting changed at a time; no kept result is read or written.
"""

import functools
import json
import sys
from dataclasses import dataclass

from launch import launch
from settings import Part, build, target_of
from stages import System, method_of
from this_run import run_dir

from rag.runtime.options import parameters_of


@dataclass(frozen=True, kw_only=True)
class Settings(System):
    """conf/sensitivity.yaml."""

    dataset: Part
    chunker: Part
    sensitivity: Part


def main(config) -> None:
    from terminal import print_problem, progress_bars

    from rag.evaluate.sensitivity import measure_sensitivity

    subject, variations = subject_of(config), build(config.sensitivity)
    for problem in subject.dataset.problems:
        print_problem(problem)
    with progress_bars() as update:
        report = measure_sensitivity(subject, variations, update)
    show(report)
    write(report)


def subject_of(config):
    """The system that a config describes, with the makers of its parts."""
    from rag.evaluate.sensitivity import SystemUnderTest
    from rag.pipeline import Reader

    reading = {"template": build(config.prompt), "context": build(config.context)}
    reading |= {"sampling": build(config.sampling), "options": build(config.answer)}

    def maker(part, setting: str):
        """Makes the part with a value of the setting; None where its target has none."""
        return (lambda value: build(part, **{setting: value})) if takes(part, setting) else None

    return SystemUnderTest(
        dataset=build(config.dataset),
        chunker=build(config.chunker),
        embedder=build(config.embedder),
        method=method_of(config),
        generator=functools.cache(lambda: build(config.generator)),
        reader=lambda generator: Reader(generator, **reading),
        embedder_of_batch=maker(config.embedder, "tokens_per_batch"),
        generator_of_batch=maker(config.generator, "tokens_per_batch"),
        generator_of_dtype=maker(config.generator, "dtype"),
    )


def takes(part, setting: str) -> bool:
    """Whether the target of a part of the config has a setting."""
    return setting in parameters_of(target_of(part))


def write(report) -> None:
    """sensitivity.json and verdict.txt in the run's folder."""
    from rag.runtime.files import atomic_file
    from rag.runtime.machine import environment

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


def show(report) -> None:
    """A table of lists, a table of answers, what was left out, and the verdict."""
    from rich.console import Console
    from terminal import print_problem

    wide = None if sys.stdout.isatty() else 1000  # a log has no width: never cut a table that goes into one
    for table in (list_table(report), answer_table(report)):
        if table.rows:
            Console(width=wide).print(table)
    for sentence in report.skipped:
        print_problem(sentence)
    print(report.verdict)


def list_table(report):
    v, d = report.variations, report.dataset
    title = f"{d['name']}: {d['queries']} top-{v.k} lists, {v.measure} {number(report.means[v.measure])}"
    table = _table(title, "other\nlists", "other\npassages", "scores\nby up to", *_headings(v.measure))
    for row in report.lists:
        changes = (str(len(row.changed)), str(len(row.replaced)), f"{row.score_difference:.1e}")
        table.add_row(row.axis, row.setting, *changes, *_figures(row.movements[v.measure]))
    return table


def answer_table(report):
    means = {name: report.means.get(name) for name in ("F1", "contains")}
    count = sensitivity.answers[0].answers if sensitivity.answers else 0
    title = f"{count} answers, " + ", ".join(f"{name} {number(mean)}" for name, mean in means.items())
    table = _table(title, "other\ntext", *(heading for name in means for heading in _headings(name)))
    for row in sensitivity.answers:
        moved = [figure for name in means for figure in _figures(row.movements[name])]
        table.add_row(row.axis, row.setting, str(len(row.changed)), *moved)
    return table


def _table(title: str, *headings: str):
    from rich.table import Table

    table = Table(title=title)
    table.add_column("varied", no_wrap=True)
    for heading in ("to", *headings):
        table.add_column(heading, justify="right")
    return table


def _headings(measure: str) -> tuple[str, str]:
    return f"{measure}\nmoves by", "one query\nby up to"


def _figures(movement) -> tuple[str, str]:
    return number(movement.change, "+z.4f"), number(movement.largest)


def number(value: float | None, spelling: str = ".4f") -> str:
    return "-" if value is None else format(value, spelling)


if __name__ == "__main__":
    launch(main, "sensitivity", Settings)
