"""One evaluation, or with -m a sweep of them, on a dataset: quality with its uncertainty, and what it cost.

python scripts/eval.py dataset=sample retriever=bm25
python scripts/eval.py -m dataset=sample retriever=dense,bm25,hybrid chunker=sentence chunker.size=64,128
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import functools
import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import launch
from settings import Part, build
from stages import System, method_of
from this_run import label, overrides, run_dir

from rag.types import UserError

if TYPE_CHECKING:
    from rag.evaluate.result_files import Costs


@dataclass(frozen=True, kw_only=True)
class Settings(System):
    """conf/eval.yaml."""

    plan: bool
    dataset: Part
    chunker: Part
    tuning: Part | None = None
    closed_book: Part
    evaluation: Part
    statistics: Part
    ablation: Part


def main(config) -> None:
    from terminal import print_problem, progress_bars

    from rag.runtime.cache import CHECKSUMS

    job = job_of(config)
    for problem in job.dataset.problems:
        print_problem(problem)
    if config.plan:
        return show_plan(job)
    with progress_bars() as update:
        kept = job.done(update)
    folder = run_dir()
    metrics, costs = kept_result(kept)
    try:
        shutil.copytree(kept, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns(CHECKSUMS))
    except shutil.Error as error:  # of each file: from, to, why
        why = error.args[0][0][2]
        raise UserError(
            f"Cannot copy {kept} to {folder} ({why}): choose another with hydra.run.dir=DIR."
        ) from error
    metrics = describe(folder, metrics, config, job.dataset)
    show(metrics)
    if costs.generator:
        print(f"generator: {costs.generator}")
    print(f"-> {folder}")


def kept_result(kept: Path) -> tuple[dict, Costs]:
    """The metrics and the costs of a finished job, of its folder in the cache. UserError where that is damaged."""
    from rag.evaluate.result_files import Costs, Measured
    from rag.runtime.records import fitted_record, read_json, read_record

    remedy = f"remove {kept} and run this again"
    try:
        metrics = dict(read_json(kept / "metrics.json", remedy))
        fitted_record(kept / "metrics.json", metrics, Measured, remedy)
        return metrics, read_record(kept / "costs.json", Costs, remedy)
    except FileNotFoundError as error:
        raise UserError(f"{error.filename} is missing: {remedy}.") from error


def job_of(config):
    """The evaluation that a config describes."""
    from rag.evaluate.experiment import Experiment

    tuning = config.get("tuning")
    return Experiment(
        dataset=_shared(config.dataset),
        chunker=build(config.chunker),
        embedder=_shared(config.embedder),
        method=method_of(config),
        generator=lambda: _shared(config.generator),
        evaluation=build(config.evaluation),
        statistics=build(config.statistics),
        tuning=build(tuning) if tuning else None,
        ablation=build(config.ablation),
        prompt=build(config.prompt),
        closed_book=build(config.closed_book),
        context=build(config.context),
        sampling=build(config.sampling),
        options=build(config.answer),
    )


def _shared(config):
    """What a config builds; the jobs of a sweep that ask for the same get the same, since loading takes its time."""
    from omegaconf import OmegaConf

    return _built(json.dumps(OmegaConf.to_container(config, resolve=True), sort_keys=True))


@functools.lru_cache(maxsize=8)  # a sweep over many datasets or models need not hold all of them
def _built(settings: str):
    from omegaconf import OmegaConf

    return build(OmegaConf.create(json.loads(settings)))


def describe(folder, metrics, config, dataset) -> dict:
    """Add to a result the names that this run gives it and how it was asked for; return its metrics with them."""
    from omegaconf import OmegaConf

    from rag.runtime.files import atomic_file

    metrics = metrics | {"label": label()}
    metrics["dataset"] = {"name": dataset.name} | metrics["dataset"]
    metrics["warnings"] = [*dataset.problems, *metrics["warnings"]]
    texts = {
        "config.yaml": OmegaConf.to_yaml(config, resolve=True),
        "overrides.yaml": OmegaConf.to_yaml(overrides()),
        "metrics.json": json.dumps(metrics, indent=1, ensure_ascii=False) + "\n",
    }
    for name, text in texts.items():
        with atomic_file(folder / name, "w") as file:
            file.write(text)
    return metrics


def show(metrics: dict) -> None:
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from rag.evaluate.metrics.answers import lower_is_better

    d = metrics["dataset"]
    sample = f", a sample by seed {d['seed']}" if d["limit"] else ""
    title = f"{metrics['label']}\n{d['name']}: {d['queries']} queries{sample}"
    table = Table(title=Text(title))  # not rich's markup: a label has lists in brackets
    for heading in ("measure", "mean", f"{metrics['statistics']['confidence']:.0%} interval"):
        table.add_column(heading, justify="left" if heading == "measure" else "right")
    for name, mean in metrics["means"].items():
        bounds = metrics["intervals"].get(name)
        between = f"{bounds[0]:.4f} to {bounds[1]:.4f}" if bounds else "-"
        shown = f"{name} (lower is better)" if lower_is_better(name) else name
        table.add_row(shown, "-" if mean is None else f"{mean:.4f}", between)
    Console().print(table)


def show_plan(job) -> None:
    """Each stage, and how much of it is there already."""
    print(label())
    for stage, items, reused in job.plan():
        todo = "reused" if reused == items else f"{items - reused} of {items} to run"
        print(f"  {stage}: {todo}")


if __name__ == "__main__":
    launch(main, "eval", Settings)
