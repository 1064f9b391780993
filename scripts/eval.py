"""Evaluate a system on a dataset, or with -m a sweep of systems: metrics with their intervals, and costs.

python scripts/eval.py dataset=sample retriever=bm25
python scripts/eval.py -m dataset=sample retriever=dense,bm25,hybrid chunker=sentence chunker.size=64,128
"""

from __future__ import annotations  # the types below are imported in functions: a typo must not wait for JAX

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra_run import label, overrides, run_dir
from launch import launch
from settings import CorpusFolder, Part, build
from sweep_summary import show_leaderboards
from system import SystemSettings, build_method, check_dataset

from rag.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rag.evaluate.experiment import Experiment
    from rag.evaluate.result_files import Costs


@dataclass(frozen=True, kw_only=True)
class EvalSettings(SystemSettings):
    """The settings of conf/eval.yaml."""

    plan: bool
    dataset: Part
    corpus: CorpusFolder | None = None  # of dataset=synthetic
    chunker: Part
    metric: Part | None = None
    tuning: Part | None = None
    closed_book: Part
    evaluation: Part
    statistics: Part
    ablation: Part


def main(config: DictConfig) -> None:
    """Run the evaluation, or with plan=true print what it would compute."""
    from terminal import print_problem, progress_bars

    from rag.runtime.cache.entries import CHECKSUMS

    experiment = build_experiment(config)
    for problem in experiment.problems:
        print_problem(problem)
    if config.plan:
        return show_plan(experiment)
    with progress_bars() as update:
        cached = experiment.run(update)
    folder = run_dir()
    metrics, costs = read_result(cached)
    try:
        shutil.copytree(cached, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKSUMS))
    except shutil.Error as error:  # of each file: from, to, why
        why = error.args[0][0][2]
        raise UserError(
            f"Cannot copy {cached} to {folder} ({why}): choose another with hydra.run.dir=DIR."
        ) from error
    metrics = describe(folder, metrics, config, experiment)
    show(metrics)
    if costs.generator:
        print(f"generator: {costs.generator}")
    print(f"-> {folder}")


def read_result(cached: Path) -> tuple[dict[str, Any], Costs]:
    """Read the metrics and the costs from a result folder in the cache. Raise UserError where it is damaged."""
    from rag.evaluate.result_files import CachedMetrics, Costs
    from rag.runtime.records import fitted_record, read_json, read_record

    remedy = f"remove {cached} and run this again"
    try:
        metrics = dict(read_json(cached / "metrics.json", remedy))
        fitted_record(cached / "metrics.json", metrics, CachedMetrics, remedy)
        return metrics, read_record(cached / "costs.json", Costs, remedy)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {remedy}.") from error


def build_experiment(config: DictConfig) -> Experiment:
    """Build the evaluation that a configuration describes."""
    from rag.evaluate.experiment import Experiment

    metric, tuning = config.get("metric"), config.get("tuning")
    return Experiment(
        dataset=check_dataset(_shared(config.dataset), config.dataset),
        chunker=build(config.chunker),
        embedder=_shared(config.embedder),
        method=build_method(config),
        generator=lambda: _shared(config.generator),
        evaluation=build(config.evaluation),
        statistics=build(config.statistics),
        metric=build(metric) if metric else None,
        tuning=build(tuning) if tuning else None,
        ablation=build(config.ablation),
        prompt=build(config.prompt),
        closed_book=build(config.closed_book),
        context=build(config.context),
        sampling=build(config.sampling),
        options=build(config.answer),
    )


def _shared(config: DictConfig) -> Any:
    """Build a part; the jobs of a sweep that have the same configuration share it, since loading takes time."""
    from omegaconf import OmegaConf

    return _built(json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True))


@functools.lru_cache(maxsize=8)  # a sweep over many datasets or models need not hold all of them
def _built(settings: str) -> Any:
    from omegaconf import OmegaConf

    return build(OmegaConf.create(json.loads(settings)))


def describe(folder: Path, metrics: dict, config: DictConfig, experiment: Experiment) -> dict[str, Any]:
    """Write the run's label, dataset name and configuration into its folder; return the metrics with these names.

    Args:
        folder: The run's folder.
        metrics: The contents of the cached metrics.json, which has neither label nor name.
        config: The configuration.
        experiment: Its problems and the name of its dataset are added.
    """
    from omegaconf import OmegaConf

    from rag.evaluate.result_files import json_lines
    from rag.runtime.files import atomic_file

    dataset = experiment.dataset
    metrics = metrics | {"label": label()}
    names = {"name": dataset.name, "unjudged": 0 if dataset.limit else len(dataset.unjudged)}
    metrics["dataset"] = names | metrics["dataset"]
    metrics["warnings"] = [*experiment.problems, *metrics["warnings"]]
    texts = {
        "config.yaml": OmegaConf.to_yaml(config, resolve=True),
        "overrides.yaml": OmegaConf.to_yaml(overrides()),
        "metrics.json": json.dumps(metrics, indent=1, ensure_ascii=False) + "\n",
        "queries.jsonl": json_lines(
            {
                "query": query,
                "text": text,
                "relevant": {name: grade for name, grade in dataset.qrels[query].items() if grade > 0},
            }
            for query, text in dataset.queries.items()
        ),
    }
    for name, text in texts.items():
        with atomic_file(folder / name, "w") as file:
            file.write(text)
    return metrics


def show(metrics: dict[str, Any]) -> None:
    """Print a table of the metrics."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rag.evaluate.metrics import lower_is_better

    d = metrics["dataset"]
    judged = f"{d['queries']} of {d['queries'] + d['unjudged']} queries judged"
    queries = f"{d['queries']} queries, a sample by seed {d['seed']}" if d["limit"] else judged
    title = f"{metrics['label']}\n{d['name']}: {queries}"
    table = Table(title=Text(title))  # not rich's markup: a label has lists in brackets
    for heading in ("measure", "mean", f"{metrics['statistics']['confidence']:.0%} interval"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, mean in metrics["means"].items():
        bounds = metrics["intervals"].get(name)
        between = f"{bounds[0]:z.4f} to {bounds[1]:z.4f}" if bounds else "-"
        shown = f"{name} (lower is better)" if lower_is_better(name) else name
        table.add_row(shown, "-" if mean is None else f"{mean:z.4f}", between)
    Console().print(table)


def show_plan(experiment: Experiment) -> None:
    """Print each stage, and how much of it is cached."""
    print(label())
    for stage, items, reused in experiment.plan():
        todo = "reused" if reused == items else f"{items - reused} of {items} to run"
        print(f"  {stage}: {todo}")


if __name__ == "__main__":
    launch(main, "eval", EvalSettings, after_sweep=show_leaderboards)
