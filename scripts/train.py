"""Train a part of the laboratory on questions: an adapter of the reader, or all its weights.

python scripts/train.py task=reader dataset.path=questions.jsonl output.path=READER
python scripts/generate.py index.path=.demo/index generator.adapter=READER question="..."
"""

from __future__ import annotations  # the types below are imported in functions: a typo must not wait for JAX

import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launch import launch
from settings import CorpusFolder, Part, Shared, build
from system import build_method, check_dataset

from rag.runtime.options import Count, Filled, Share
from rag.types import UserError

if TYPE_CHECKING:
    from omegaconf import DictConfig

    from rag.evaluate.datasets import Dataset
    from rag.train.examples import ExampleSet


@dataclass(frozen=True)
class Output:
    """The folder that the training writes."""

    path: Filled
    overwrite: bool


@dataclass(frozen=True)
class Leakage:
    """What the training data may have in common with evaluation sets."""

    against: Sequence[Filled]
    passages: Share


@dataclass(frozen=True, kw_only=True)
class TrainSettings(Shared):
    """The settings of conf/train.yaml."""

    task: Part
    dataset: Part
    corpus: CorpusFolder | None = None  # of dataset=synthetic
    chunker: Part
    embedder: Part
    vector_index: Part
    analyzer: Part
    fusion: Part
    retriever: Part
    output: Output
    more: Sequence[Filled]
    depth: Count
    leakage: Leakage
    licences: Sequence[Filled]
    train: Part
    trackers: Sequence[Filled]


def main(config: DictConfig) -> None:
    """Make the examples, train, and write the result with its card."""
    from omegaconf import OmegaConf
    from terminal import print_problem, training_bar

    from rag.runtime.machine.hardware import environment
    from rag.train.checkpoints import remove_checkpoints
    from rag.train.examples import hold_out
    from rag.train.loop import train
    from rag.train.trackers import trackers

    folder = prepare_folder(Path(config.output.path).expanduser(), config.output.overwrite)
    task, options = build(config.task), build(config.train)
    paths = [config.dataset.get("path"), *config.more]
    datasets = [check_dataset(build(config.dataset), config.dataset), *map(load_path, config.more)]
    for problem in (problem for dataset in datasets for problem in dataset.problems):
        print_problem(problem)
    leakage = check_leakage(datasets, config.leakage)
    examples = examples_of(datasets, config)
    gold = {e.id: examples.passages[e.gold] for e in examples.examples if e.id in datasets[0].queries}
    held_out = hold_out(gold, task.options.holdout)
    print(
        f"{len(examples.examples)} questions on {len(examples.passages)} passages; {len(held_out)} held out"
    )
    for why, count in examples.left_out.items():
        print(f"{count} left out: {why}")
    objective, trainable = task.prepare(examples, held_out)
    whole = OmegaConf.to_container(config, resolve=True)
    settings = {name: whole[name] for name in ("task", "train", "chunker", "embedder", "retriever", "depth")}
    settings |= {"base": task.base, "data": [dataset.fingerprint for dataset in datasets]}
    del settings["train"]["stop_after_minutes"], settings["train"]["checkpoint_minutes"]  # change no result
    with training_bar() as report, trackers(config.trackers, folder, settings) as track:
        result = train(objective, trainable, options, folder, settings, report=report, track=track)
    if not result.finished:
        print(f"stopped after {result.steps} steps; the same command goes on -> {folder}")
        return
    card = {
        "base": task.base,
        "data": [describe(*pair) for pair in zip(datasets, paths, strict=True)],
        "licences": list(config.licences),
        "metrics": {"steps": result.steps, "loss": result.loss, "validation_loss": result.validation_loss},
        "commit": environment()["commit"],
        "seconds": round(result.seconds, 1),
        "settings": settings,
        "leakage": leakage,
        "held_out": sorted(held_out),
        "environment": environment(),
    }
    path = task.save(folder, result.parameters, card)
    remove_checkpoints(folder)
    print(
        f"{result.steps} steps in {result.seconds:.0f} s, validation loss {result.validation_loss} -> {path}"
    )


def prepare_folder(folder: Path, overwrite: bool) -> Path:
    """Return the folder to train in. Raises UserError where it holds a finished training, or something else."""
    if (folder / "card.json").is_file():
        if not overwrite:
            raise UserError(
                f"{folder} holds a finished training: choose another output.path, or add output.overwrite=true."
            )
        shutil.rmtree(folder)
    elif folder.exists() and not ((folder.is_dir() and (folder / "checkpoints").is_dir()) or _empty(folder)):
        raise UserError(f"{folder} exists and holds no training: choose another output.path.")
    return folder


def _empty(folder: Path) -> bool:
    return folder.is_dir() and not any(folder.iterdir())


def load_path(path: str) -> Dataset:
    """Load a dataset by what its path is: a folder in BEIR's layout, a SQuAD file (.json) or JSON lines."""
    from rag.evaluate.datasets.beir import load_beir
    from rag.evaluate.datasets.jsonl import load_jsonl
    from rag.evaluate.datasets.squad import load_squad

    found = Path(path).expanduser()
    if found.is_dir() and (found / "queries.jsonl").is_file():
        return load_beir(found)
    return load_squad(found) if found.suffix == ".json" else load_jsonl(found)


def check_leakage(datasets: Sequence[Dataset], config: DictConfig) -> dict[str, Any]:
    """Print and return what the training data have in common with each evaluation set.

    Raises UserError above the limit.
    """
    from rag.train import leakage

    reports = {}
    for path in config.against:
        report = leakage.measure_leakage(datasets, [load_path(path)])
        print(f"{path}: {report}")
        leakage.check_leakage(report, config.passages)
        reports[path] = report.as_json()
    return reports


def examples_of(datasets: Sequence[Dataset], config: DictConfig) -> ExampleSet:
    """Return the examples of all datasets, with distractors that the retriever finds in their own passages."""
    from terminal import progress_bars

    from rag.evaluate.retrieval import build_collection, chunk_all
    from rag.runtime.cache.folder import cache_root
    from rag.runtime.cache.memo import Memo
    from rag.train.examples import concatenated, make_examples

    chunker, embedder, method = build(config.chunker), build(config.embedder), build_method(config)
    sets = []
    for dataset in datasets:
        memo = Memo(cache_root() / "stages")
        chunks = chunk_all(dataset, chunker, embedder, memo)
        with progress_bars() as update:
            collection = build_collection(dataset, chunks, embedder, memo=memo, progress=update)
            sets.append(make_examples(dataset, collection, method, config.depth))
    return concatenated(sets)


def describe(dataset: Dataset, path: str | None) -> dict[str, Any]:
    """Return what the card says about a dataset; the digest of its file, if it is one, or else of its contents."""
    from rag.runtime.cache.file_hash import file_sha256

    file = Path(path).expanduser() if path else None
    digest = file_sha256(file) if file and file.is_file() else dataset.fingerprint
    return {
        "name": f"{file.parent.name}/{file.name}" if file else dataset.name,
        "questions": len(dataset.queries),
        "sha256": digest,
    }


if __name__ == "__main__":
    launch(main, "train", TrainSettings)
