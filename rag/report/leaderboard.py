"""Leaderboards: the runs on one dataset, sorted, named, and compared with one of them, the baseline.

Runs of different datasets are never compared. Two runs are compared on the queries that both have, so a run on a
sample of the queries is compared on its sample.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rag.evaluate import statistics
from rag.evaluate.metrics import lower_is_better
from rag.evaluate.statistics import Comparison, Statistics
from rag.report.plots import Significance
from rag.report.results import Run
from rag.types import UserError

_MAIN = "nDCG@10"  # the main metric where every run has it and none is named
# One setting of a label: up to a space or comma outside quotes and brackets.
_PART = re.compile(r"""(?:'[^']*'|"[^"]*"|\[[^\]]*\]|\{[^}]*\}|\([^)]*\)|[^\s,])+""")


@dataclass(frozen=True)
class Leaderboard:
    """The runs on one dataset, best first by the main metric, `measure`."""

    dataset: str
    runs: Sequence[Run]  # their labels all differ
    baseline: Run
    measure: str
    options: Statistics
    names: Mapping[str, str]  # label -> the part in which it differs from the other labels here
    comparisons: Mapping[str, Mapping[str, Comparison]]  # metric -> label -> with the baseline
    queries: int  # of the dataset: the most that a run has
    notes: Sequence[str] = ()

    def name(self, run: Run) -> str:
        """Return the run's label, as short as it can be here."""
        return self.names[run.label]

    def comparison(self, run: Run) -> Comparison | None:
        """Return the comparison on the main metric; None for the baseline, and for a run with no query in common."""
        return self.comparisons[self.measure].get(run.label)

    def significance(self, run: Run) -> Significance:
        """Return whether the run differs from the baseline on the main metric, after Holm's correction."""
        own = self.comparison(run)
        return "baseline" if run is self.baseline else significance(own, self.measure, self.options)


def significance(comparison: Comparison | None, measure: str, options: Statistics) -> Significance:
    """Return "better" or "worse" by a metric if the corrected p is below the level, otherwise "open"."""
    if comparison is None or comparison.p_holm >= 1 - options.confidence:
        return "open"
    return "better" if (comparison.difference > 0) != lower_is_better(measure) else "worse"


def leaderboards(
    runs: Sequence[Run], baseline: str | None = None, measure: str | None = None
) -> list[Leaderboard]:
    """Return one leaderboard for each dataset, in the order of the runs.

    Args:
        runs: The finished evaluations.
        baseline: A run's label, folder, folder's name, or a part of exactly one label of a dataset; None: the first.
        measure: The main metric; None: nDCG@10 if all runs have it, else the first that all have.

    Raises:
        UserError: for a baseline that is none or several of the runs, and for a metric that a dataset lacks.
    """
    if not runs:
        return []
    groups = _groups(runs)
    versions = [dataset for dataset, _ in groups]
    titles = [name if versions.count(name) == 1 else f"{name} (content {mark[:8]})" for name, mark in groups]
    names = [_names([run.label for run in group]) for group in groups.values()]
    chosen = _baselines(list(groups.values()), names, baseline)
    return [
        _leaderboard(title, group, base, measure, shown, [] if named else [_unnamed(baseline, base, shown)])
        for title, group, shown, (base, named) in zip(titles, groups.values(), names, chosen, strict=True)
    ]


def _groups(runs: Sequence[Run]) -> dict[tuple[str, str], list[Run]]:
    """Return (name, fingerprint) of each dataset -> its runs; a sample belongs to the set that has its queries."""
    whole = {(run.dataset, run.fingerprint): _asked(run) for run in runs if run.limit is None}
    groups: dict[tuple[str, str], list[Run]] = {}
    for run in runs:
        key = (run.dataset, run.fingerprint)
        if run.limit is not None and key not in whole:
            of = [key for key, queries in whole.items() if key[0] == run.dataset and _asked(run) <= queries]
            key = of[0] if of else (run.dataset, "sample")
        groups.setdefault(key, []).append(run)
    return groups


def _asked(run: Run) -> set[str]:
    return {query for column in run.per_query.values() for query in column}


def _unnamed(wanted: str | None, base: Run, names: Mapping[str, str]) -> str:
    return f'No run here is called "{wanted}": the first, {names[base.label]}, is the baseline instead.'


def _leaderboard(
    dataset: str,
    runs: Sequence[Run],
    baseline: Run,
    measure: str | None,
    names: Mapping[str, str],
    notes: Sequence[str],
) -> Leaderboard:
    options = statistics_of(runs)
    measured = {run.label: run if run.means else _measured(run, options) for run in runs}
    runs, baseline = list(measured.values()), measured[baseline.label]
    main = _main_measure(runs, measure)
    measures = dict.fromkeys([main, *(name for run in runs for name in run.means if "/" not in name)])
    ranked = sorted(runs, key=lambda run: _rank(run.means.get(main), main))
    return Leaderboard(
        dataset=dataset,
        runs=ranked,
        baseline=baseline,
        measure=main,
        options=options,
        names=names,
        comparisons={name: _compared(runs, baseline, name, options) for name in measures},
        queries=max(run.queries for run in runs),
        notes=notes,
    )


def _rank(value: float | None, measure: str) -> float:
    """Return a sort key: the best first, a run without a value last."""
    if value is None:
        return float("inf")
    return value if lower_is_better(measure) else -value


def asked(run: Run) -> int:
    """Return how many of the dataset's queries the run was evaluated on."""
    return run.queries if run.limit is None else min(run.queries, run.limit)


def defined(run: Run, measure: str) -> int:
    """Return for how many queries the run has a metric."""
    return sum(value is not None for value in run.per_query.get(measure, {}).values())


def statistics_of(runs: Sequence[Run]) -> Statistics:
    """Return the statistics options of the first run that has any, or the defaults."""
    found = next((run.statistics for run in runs if run.statistics), None)
    if found is None:
        return Statistics()
    return Statistics(int(found["resamples"]), float(found["confidence"]), seed=int(found["seed"]))


def _measured(run: Run, options: Statistics) -> Run:
    """Add means, intervals and warnings to a run that was given as per-query values alone."""
    measures = list(run.per_query)
    queries = dict.fromkeys(query for column in run.per_query.values() for query in column)
    rows = {query: {name: run.per_query[name].get(query) for name in measures} for query in queries}
    values = statistics.table(rows, measures)
    known = [[value for value in run.per_query[name].values() if value is not None] for name in measures]
    means = {name: sum(v) / len(v) if v else None for name, v in zip(measures, known, strict=True)}
    bounds = zip(measures, statistics.intervals(values, options).tolist(), known, strict=True)
    return replace(
        run,
        queries=len(queries),
        means=means,
        intervals={name: pair for name, pair, v in bounds if len(v) > 1},
        warnings=statistics.warnings(values, measures, options),
    )


def _main_measure(runs: Sequence[Run], wanted: str | None) -> str:
    shared = [name for name in runs[0].means if all(name in run.means for run in runs)]
    known = dict.fromkeys(name for run in runs for name in run.means)
    if wanted is not None and wanted not in known:
        raise UserError(
            f"No run on {runs[0].dataset} has measure={wanted}: choose one of {', '.join(known)}."
        )
    if wanted is not None:
        return wanted
    if not known:
        raise UserError(f"{runs[0].folder} and the runs beside it name no measure: run the evaluation again.")
    return _MAIN if _MAIN in shared else next(iter(shared or known))


def _compared(runs: Sequence[Run], baseline: Run, measure: str, options: Statistics) -> dict[str, Comparison]:
    """Compare the runs that share a query with the baseline for which both have the metric."""
    base = baseline.per_query.get(measure, {})
    columns = {run.label: run.per_query.get(measure, {}) for run in runs if run is not baseline}
    comparable = {
        label: column
        for label, column in columns.items()
        if any(value is not None and base.get(query) is not None for query, value in column.items())
    }
    return statistics.compare(base, comparable, options)


def common(run: Run, baseline: Run, measure: str) -> list[tuple[float, float]]:
    """Return (the run's value, the baseline's) for each query that both have."""
    column = run.per_query.get(measure, {})
    pairs = [(column.get(query), value) for query, value in baseline.per_query.get(measure, {}).items()]
    return [(own, base) for own, base in pairs if own is not None and base is not None]


# --- baseline and names


def _baselines(
    groups: Sequence[Sequence[Run]], names: Sequence[Mapping[str, str]], wanted: str | None
) -> list[tuple[Run, bool]]:
    """Return each dataset's baseline, and whether `wanted` named it; otherwise it is the dataset's first run.

    The first way of naming that finds a run in any dataset is used for all of them.
    """
    if wanted is None:
        return [(group[0], True) for group in groups]
    path = Path(wanted).expanduser().resolve()
    ways: list[Callable[[Run, Mapping[str, str]], bool]] = [
        lambda run, _: run.label == wanted,
        lambda run, shown: shown[run.label] == wanted,
        lambda run, _: run.folder == path,
        lambda run, _: run.folder.name == wanted,
        lambda run, _: wanted in run.label,
    ]
    for way in ways:
        found = [
            [run for run in group if way(run, shown)] for group, shown in zip(groups, names, strict=True)
        ]
        if several := next((matching for matching in found if len(matching) > 1), None):
            labels = ", ".join(run.label for run in several)
            raise UserError(f"baseline={wanted} could be any of {labels}: write one of them in full.")
        if any(found):
            return [(f[0], True) if f else (group[0], False) for f, group in zip(found, groups, strict=True)]
    labels = ", ".join(dict.fromkeys(run.label for group in groups for run in group))
    raise UserError(f"No run is called baseline={wanted}: choose one of {labels}.")


def _names(labels: Sequence[str]) -> dict[str, str]:
    """Shorten each label to the settings that differ, each with the last word of its key, the first without a key."""
    parts = [[part.partition("=") for part in _PART.findall(label)] for label in labels]
    if any(not sign for found in parts if len(found) > 1 for _, sign, _ in found):  # prose
        return {label: label for label in labels}
    shared = {part for part in parts[0] if all(part in found for found in parts)}
    parts = [[part for part in found if part not in shared] for found in parts]
    keys = list(dict.fromkeys(key for found in parts for key, sign, _ in found if sign))
    first = next(
        (key for key in keys if all(sum(key == part[0] for part in found) == 1 for found in parts)), None
    )
    last = [key.rpartition(".")[2] for key in keys]
    short = {key: word if last.count(word) == 1 else key for key, word in zip(keys, last, strict=True)}
    names = [
        ", ".join(
            value if sign and key == first else f"{short.get(key, key)}{sign}{value}"
            for key, sign, value in found
        )
        for found in parts
    ]
    usable = all(names) and len(set(names)) == len(names)
    return dict(zip(labels, names if usable else labels, strict=True))
