"""The further tables of a dataset: every measure, answers, error breakdowns, and tuning."""

from collections.abc import Iterator, Mapping

from rag.evaluate.metrics import lower_is_better
from rag.report import plots
from rag.report.leaderboard import Leaderboard, significance
from rag.report.numbers import difference, number, setting, with_interval
from rag.report.page import Block, Details, Heading, Paragraph, Picture, Table, slug_of, tables

_MARKS = {"better": " ▲", "worse": " ▼"}


def every_measure(table: Leaderboard) -> Iterator[Block]:
    """Yield the means of every other retrieval metric, and hidden their intervals and differences to the baseline."""
    measures = [name for name in table.comparisons if name != table.measure]
    if not measures:
        return
    means, rows = [], []
    for run in table.runs:
        means.append([table.name(run)])
        for name in measures:
            found = table.comparisons[name].get(run.label)
            mark = _MARKS.get(significance(found, name, table.options), "")
            means[-1].append(f"{number(run.means.get(name))}{mark}")
            interval = with_interval(run.means.get(name), run.intervals.get(name))
            compared = f"{difference(found.difference, (found.low, found.high))}{mark}" if found else ""
            rows.append([name, table.name(run), interval, compared])
    yield Heading(3, "Every measure")
    yield from tables(["system", *measures], means)
    yield Paragraph(
        "▲ and ▼: significantly better or worse than the baseline, p corrected within each measure."
    )
    rows.sort(key=lambda row: measures.index(row[0]))
    header = ["measure", "system", "mean", "difference"]
    yield Details("Every measure with its interval and its difference to the baseline", [Table(header, rows)])


def answers(table: Leaderboard) -> Iterator[Block]:
    """Yield the table of answer metrics, one row for each system and condition."""
    names = dict.fromkeys(name for run in table.runs for name in run.means if "/" in name)
    measures = list(dict.fromkeys(name.partition("/")[2] for name in names))
    conditions = list(dict.fromkeys(name.partition("/")[0] for name in names))
    rows = []
    for run in table.runs:
        for condition in conditions:
            keys = [f"{condition}/{measure}" for measure in measures]
            if any(key in run.means for key in keys):
                cells = [with_interval(run.means.get(key), run.intervals.get(key)) for key in keys]
                rows.append([table.name(run), condition.replace("_", " "), *cells])
    if rows:
        yield Heading(3, "Answers")
        named = [f"{name} (lower is better)" if lower_is_better(name) else name for name in measures]
        yield from tables(["system", "passages shown", *named], rows, named=2)


def error_breakdown(table: Leaderboard, slug: str) -> Iterator[Block]:
    """Yield a figure and a table of the error breakdowns for each metric."""
    found = [(table.name(run), run.error_breakdown) for run in table.runs if run.error_breakdown]
    for measure in dict.fromkeys(parts["measure"] for _, parts in found):
        chosen = [(name, parts) for name, parts in found if parts["measure"] == measure]
        bars = [(name, parts["scores"].get("retrieved", 0.0), parts["errors"]) for name, parts in chosen]
        yield Heading(3, f"Error breakdown: {measure}")
        picture = plots.error_breakdown(bars, measure, max(parts["ceiling"] for _, parts in chosen))
        name = f"{slug}-error-breakdown-{slug_of(measure)}.png"
        yield Picture(name, picture, f"{measure} reached and lost, by cause")
        causes = list(dict.fromkeys(cause for _, parts in chosen for cause in parts["errors"]))
        scores = list(dict.fromkeys(condition for _, parts in chosen for condition in parts["scores"]))
        rows = [
            [name, str(parts["n"])]
            + [number(parts["scores"].get(condition)) for condition in scores]
            + [with_interval(parts["errors"].get(c), parts["intervals"].get(c)) for c in causes]
            for name, parts in chosen
        ]
        header = [f"{measure}, {condition.replace('_', ' ')}" for condition in scores]
        header += [f"lost: {cause}" for cause in causes]
        yield from tables(["system", "queries", *header], rows, named=2)


def tuning(table: Leaderboard) -> Iterator[Block]:
    """Yield the tables of tuning: nested and naive figures, and the parameters chosen for each fold."""
    tuned = [(table.name(run), run.tuning) for run in table.runs if run.tuning]
    if not tuned:
        return
    yield Heading(3, "Tuning")
    header = ["system", "family", "measure", "nested", "naive", "optimism", "naive choice"]
    yield Table(header, [_tuned(name, tuning) for name, tuning in tuned])
    yield Paragraph(
        "Nested: each fold's queries were scored with parameters chosen on the other folds. Naive: chosen and "
        "scored on the same queries; it is too good by the optimism."
    )
    header = ["system", "fold", "chosen on the other folds", "there", "on this fold", "queries"]
    yield Table(header, [row for name, tuning in tuned for row in _folds(name, tuning)])


def _tuned(name: str, tuning: Mapping) -> list[str]:
    scores = [number(tuning["nested"]), number(tuning["naive"]), difference(tuning["optimism"])]
    return [name, tuning["family"], tuning["measure"], *scores, _parameters(tuning["naive_parameters"])]


def _folds(name: str, tuning: Mapping) -> Iterator[list[str]]:
    for position, fold in enumerate(tuning["folds"], 1):
        scores = [number(fold["train"]), number(fold["test"]), str(fold["queries"])]
        yield [name, str(position), _parameters(fold["parameters"]), *scores]


def _parameters(values: Mapping[str, object]) -> str:
    return ", ".join(f"{name}={setting(value)}" for name, value in values.items())
