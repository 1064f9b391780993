"""Compose the report on a set of evaluations: tables, warnings and figures on one page, as blocks and as files."""

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from rag.evaluate.metrics import lower_is_better
from rag.evaluate.statistics import Comparison
from rag.report import plots
from rag.report.leaderboard import Leaderboard, asked, common, defined, leaderboards, significance
from rag.report.numbers import MISSING, difference, duration, number, p_value, setting, with_interval
from rag.report.page import Block, Bullets, Heading, Paragraph, Picture, Table, html, markdown
from rag.report.plots import Mark
from rag.report.provenance import cost, costs, differing_settings, environment
from rag.report.results import Failure, Run
from rag.runtime.files import atomic_file
from rag.types import UserError

TITLE = "Evaluation report"
_SIGNIFICANT = {"baseline": "baseline", "better": "▲ better", "worse": "▼ worse", "open": "no"}


def page(
    runs: Sequence[Run], failures: Sequence[Failure], baseline: str | None = None, measure: str | None = None
) -> list[Block]:
    """Return the whole report. Raise UserError as `leaderboards` does."""
    tables = leaderboards(runs, baseline, measure)
    blocks: list[Block] = [Heading(1, TITLE), Paragraph(_summary(runs, failures, tables))]
    if failures:
        blocks += [
            Heading(2, "Failed jobs"),
            Bullets([f"{job.label} failed: {job.error}" for job in failures]),
        ]
    for position, table in enumerate(tables, 1):
        blocks += _dataset(table, f"{position}-{_slug(table.dataset)}")
    if runs:
        blocks += [Heading(2, "How this was measured"), Paragraph(_method(tables[0])), *environment(runs)]
    return blocks


def write(folder: Path, blocks: Sequence[Block]) -> list[Path]:
    """Write report.md with its pictures, and report.html, each whole or not at all, and return their paths.

    Raises UserError for a folder that cannot be written to.
    """
    files = {block.name: block.png for block in blocks if isinstance(block, Picture)}
    texts = {"report.md": markdown(blocks), "report.html": html(TITLE, blocks)}
    for name, text in texts.items():
        files[name] = text.encode(errors="backslashreplace")  # a label may hold a path that is not UTF-8
    for name, content in files.items():
        try:
            with atomic_file(folder / name) as file:
                file.write(content)
        except OSError as error:
            raise UserError(f"Cannot write {folder / name} ({error.strerror}): choose output=DIR.") from error
    return [folder / name for name in files]


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "dataset"


def _summary(runs: Sequence[Run], failures: Sequence[Failure], tables: Sequence[Leaderboard]) -> str:
    datasets = f"{len(tables)} dataset{'s' if len(tables) != 1 else ''}"
    failed = (
        f" {len(failures)} failed and {'is' if len(failures) == 1 else 'are'} named below."
        if failures
        else ""
    )
    return f"{len(runs)} finished evaluation{'s' if len(runs) != 1 else ''} on {datasets}.{failed}"


def _dataset(table: Leaderboard, slug: str) -> Iterator[Block]:
    """Yield the blocks of one dataset; parts for which no run has data are left out."""
    yield Heading(2, table.dataset)
    yield _leaderboard(table)
    yield Paragraph(_legend(table))
    if marks := _marks(table):
        shown = f"{table.measure} on {table.dataset}"
        confidence = table.options.confidence
        picture = plots.forest(marks, table.measure, confidence)
        yield Picture(f"{slug}-intervals.png", picture, f"{shown}: mean and interval of each system")
    if notes := _notes(table):
        yield Heading(3, "Warnings")
        yield Bullets(notes)
    timed = [mark for mark in marks if mark.query_s > 0]
    if timed:
        yield Heading(3, "Quality against cost")
        lower = lower_is_better(table.measure)
        picture = plots.pareto(timed, table.measure, confidence, lower=lower)
        yield Picture(f"{slug}-pareto.png", picture, f"{shown} against the median time of a query")
        if len(timed) < len(table.runs):
            names = [table.name(run) for run in table.runs if not cost(run, "query_p50_s")]
            yield Paragraph(f"Not shown, since no query was timed: {'; '.join(names)}.")
    panels = {
        table.name(run): ([own - base for own, base in common(run, table.baseline, table.measure)], found)
        for run in table.runs
        if (found := table.comparison(run))
    }
    if panels:
        yield Heading(3, "Query by query")
        lower = lower_is_better(table.measure)
        picture = plots.win_loss(panels, table.measure, table.name(table.baseline), lower=lower)
        yield Picture(f"{slug}-queries.png", picture, f"{shown}: differences to the baseline, query by query")
    yield from _all_measures(table)
    yield from _answers(table)
    yield from _error_breakdown(table, slug)
    yield from _tuning(table)
    yield from costs(table)
    yield from differing_settings(table)


# --- the leaderboard


def _leaderboard(table: Leaderboard) -> Table:
    header = ["#", "system", "queries", table.measure, "difference", "p", "p (Holm)"]
    header += ["significant", "detectable", "query p50"]
    rows = [_row(table, rank, run) for rank, run in enumerate(table.runs, 1)]
    if not any(cost(run, "query_p50_s") for run in table.runs):
        header, rows = header[:-1], [row[:-1] for row in rows]
    return Table(header, rows, frozenset({table.runs.index(table.baseline)}))


def _row(table: Leaderboard, rank: int, run: Run) -> list[str]:
    mean = with_interval(run.means.get(table.measure), run.intervals.get(table.measure))
    comparison = ["", "", "", _SIGNIFICANT["baseline"] if run is table.baseline else "", ""]
    if found := table.comparison(run):
        comparison = [
            difference(found.difference, (found.low, found.high)),
            p_value(found.p),
            p_value(found.p_holm),
        ]
        comparison += [_SIGNIFICANT[table.significance(run)], number(found.detectable)]
    seconds = cost(run, "query_p50_s")
    time = MISSING if seconds is None else duration(seconds)
    return [str(rank), table.name(run), _queries(table, run), mean, *comparison, time]


def _queries(table: Leaderboard, run: Run) -> str:
    """Return the number of queries; for a sample also the number of all queries and the seed."""
    n = defined(run, table.measure)
    if run.limit is None:
        return str(n)
    whole = f" of {table.queries}" if table.queries > asked(run) else ""
    return f"{n}{whole} (sample, seed {run.seed})"


def _legend(table: Leaderboard) -> str:
    options, pairs = table.options, len(table.comparisons[table.measure])
    return (
        f"{table.measure} with its {options.confidence:.0%} interval. The difference is to the baseline, "
        f"{table.name(table.baseline)}, on the queries that both have; p is of the paired randomisation test, "
        f"p (Holm) corrected for the {pairs} comparison{'s' if pairs != 1 else ''} here, significant where below "
        f"{1 - options.confidence:.2g}. Detectable is the smallest difference that so many queries would show "
        f"with a chance of {options.power:.0%}."
    )


def _marks(table: Leaderboard) -> list[Mark]:
    """Return the marks in figures of the runs that have the main metric, best first."""
    marks, most = [], max(asked(run) for run in table.runs)
    for run in table.runs:
        if (mean := run.means.get(table.measure)) is not None:
            low, high = run.intervals.get(table.measure) or (mean, mean)
            seconds = cost(run, "query_p50_s")
            query_s = math.nan if seconds is None else float(seconds)
            sample = asked(run) < most
            marks.append(Mark(table.name(run), mean, low, high, table.significance(run), query_s, sample))
    return marks


def _notes(table: Leaderboard) -> list[str]:
    """Return the warnings of the runs, and the differences that are not significant."""
    notes = [*table.notes, *_partial(table)]
    said: dict[str, list[str]] = {}
    for run in table.runs:
        for warning in run.warnings:
            said.setdefault(warning, []).append(table.name(run))
    for warning, names in said.items():
        everywhere = len(names) == len(table.runs) and len(names) > 1
        notes.append(f"{'All runs' if everywhere else '; '.join(names)}: {warning}")
    compared = [(run, found) for run in table.runs if (found := table.comparison(run))]
    unclear = [(run, found) for run, found in compared if table.significance(run) == "open"]
    if unclear:
        sizes = [f"{table.name(run)} ({_beside_detectable(found)})" for run, found in unclear]
        notes.append(f"Not significantly different from {table.name(table.baseline)}: {'; '.join(sizes)}.")
    if len({json.dumps(run.statistics, sort_keys=True) for run in table.runs if run.statistics}) > 1:
        notes.append("The intervals of these runs were made with different settings of the statistics.")
    return notes


def _beside_detectable(found: Comparison) -> str:
    least = f", detectable from {found.detectable:.4f}" if math.isfinite(found.detectable) else ""
    return f"{difference(found.difference)}{least}"


def _partial(table: Leaderboard) -> Iterator[str]:
    """Yield warnings of comparisons on fewer queries than the run, or the baseline, was evaluated on."""
    alike: dict[tuple[int, float], list[str]] = {}
    for run in table.runs:
        if run is table.baseline:
            continue
        pairs = common(run, table.baseline, table.measure)
        if not pairs:
            yield f"{table.name(run)} has no query in common with the baseline, so nothing compares them."
        elif len(pairs) < max(defined(r, table.measure) for r in (run, table.baseline)):
            mean = sum(base for _, base in pairs) / len(pairs)
            alike.setdefault((len(pairs), round(mean, 12)), []).append(table.name(run))
    for (n, mean), names in alike.items():
        yield (
            f"{'; '.join(names)}: compared with the baseline on the {n} queries that both have, where the "
            f"baseline has {mean:.4f}; means over different queries do not compare by themselves."
        )


# --- further tables


def _all_measures(table: Leaderboard) -> Iterator[Block]:
    """Yield the table of every other retrieval metric with its interval and its difference to the baseline."""
    measures = [name for name in table.comparisons if name != table.measure]
    if not measures:
        return
    header = ["system", *(title for name in measures for title in (name, "difference"))]
    rows = []
    for run in table.runs:
        row = [table.name(run)]
        for name in measures:
            found = table.comparisons[name].get(run.label)
            row += [with_interval(run.means.get(name), run.intervals.get(name)), _marked(found, name, table)]
        rows.append(row)
    yield Heading(3, "Every measure")
    yield Table(header, rows, frozenset({table.runs.index(table.baseline)}))
    yield Paragraph(
        "▲ and ▼: significantly better or worse than the baseline, p corrected within each measure."
    )


def _marked(found: Comparison | None, measure: str, table: Leaderboard) -> str:
    if found is None:
        return ""
    mark = {"better": " ▲", "worse": " ▼"}.get(significance(found, measure, table.options), "")
    return f"{difference(found.difference)}{mark}"


def _answers(table: Leaderboard) -> Iterator[Block]:
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
        yield Table(["system", "passages shown", *named], rows)


def _error_breakdown(table: Leaderboard, slug: str) -> Iterator[Block]:
    """Yield a figure and a table of the error breakdowns for each metric."""
    found = [(table.name(run), run.error_breakdown) for run in table.runs if run.error_breakdown]
    for measure in dict.fromkeys(parts["measure"] for _, parts in found):
        chosen = [(name, parts) for name, parts in found if parts["measure"] == measure]
        bars = [(name, parts["scores"].get("retrieved", 0.0), parts["errors"]) for name, parts in chosen]
        yield Heading(3, f"Error breakdown: {measure}")
        picture = plots.error_breakdown(bars, measure, max(parts["ceiling"] for _, parts in chosen))
        name = f"{slug}-error-breakdown-{_slug(measure)}.png"
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
        yield Table(["system", "queries", *header, *(f"lost: {cause}" for cause in causes)], rows)


def _tuning(table: Leaderboard) -> Iterator[Block]:
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


# --- statistics


def _method(table: Leaderboard) -> str:
    options = table.options
    return (
        f"Intervals: {options.confidence:.0%}, bootstrap over queries (BCa), {options.resamples:,} resamples, seed "
        f"{options.seed}. Comparisons: two-sided paired randomisation test of the mean difference, "
        f"{options.resamples:,} resamples, seed {options.seed}, on the queries that both runs have; Holm's correction "
        f"over the comparisons of one dataset and measure. Smallest detectable difference: paired t-test's power "
        f"analysis, power {options.power:.0%}. The same seed gives the same figures."
    )
