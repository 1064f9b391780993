"""Compose the report on a set of evaluations: tables, warnings and figures on one page, as blocks and as files."""

import json
import math
from collections.abc import Iterator, Sequence
from pathlib import Path

from rag.evaluate.metrics import lower_is_better
from rag.evaluate.statistics import Comparison
from rag.report import plots
from rag.report.leaderboard import Leaderboard, asked, common, defined, leaderboards
from rag.report.measures import answers, error_breakdown, every_measure, tuning
from rag.report.numbers import MISSING, difference, duration, number, p_value, with_interval
from rag.report.page import (
    Block,
    Bullets,
    Heading,
    Paragraph,
    Picture,
    Table,
    html,
    markdown,
    slug_of,
)
from rag.report.plots import Mark
from rag.report.provenance import cost, costs, differing_settings, environment
from rag.report.queries import queries
from rag.report.results import Failure, Run
from rag.runtime.files import atomic_file
from rag.types import UserError

TITLE = "Evaluation report"
_SIGNIFICANT = {"baseline": "baseline", "better": "▲ better", "worse": "▼ worse", "open": "no"}


def page(
    runs: Sequence[Run], failures: Sequence[Failure], baseline: str | None = None, measure: str | None = None
) -> list[Block]:
    """Return the whole report. Raise UserError as `leaderboards` does."""
    boards = leaderboards(runs, baseline, measure)
    blocks: list[Block] = [Heading(1, TITLE), Paragraph(_summary(runs, failures, boards))]
    if failures:
        blocks += [
            Heading(2, "Failed jobs"),
            Bullets([f"{job.label} failed: {job.error}" for job in failures]),
        ]
    for position, table in enumerate(boards, 1):
        blocks += _dataset(table, f"{position}-{slug_of(table.dataset)}")
    if runs:
        blocks += [Heading(2, "How this was measured"), Paragraph(_method(boards[0])), *environment(runs)]
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


def _summary(runs: Sequence[Run], failures: Sequence[Failure], boards: Sequence[Leaderboard]) -> str:
    datasets = f"{len(boards)} dataset{'s' if len(boards) != 1 else ''}"
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
    yield Paragraph(f"{_judged(table)}{_legend(table)}")
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
    yield from every_measure(table)
    yield from answers(table)
    yield from error_breakdown(table, slug)
    yield from tuning(table)
    yield from costs(table)
    yield from differing_settings(table)
    yield from queries(table)


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


def _judged(table: Leaderboard) -> str:
    """Return a sentence about the queries that are left out, or ""."""
    left_out = max(run.unjudged for run in table.runs)
    return f"{table.queries} of {table.queries + left_out} queries are judged. " if left_out else ""


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


def _method(table: Leaderboard) -> str:
    options = table.options
    return (
        f"Intervals: {options.confidence:.0%}, bootstrap over queries (BCa), {options.resamples:,} resamples, seed "
        f"{options.seed}. Comparisons: two-sided paired randomisation test of the mean difference, "
        f"{options.resamples:,} resamples, seed {options.seed}, on the queries that both runs have; Holm's correction "
        f"over the comparisons of one dataset and measure. Smallest detectable difference: paired t-test's power "
        f"analysis, power {options.power:.0%}. The same seed gives the same figures."
    )
