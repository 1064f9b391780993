"""Retrieval quality on a dataset in BEIR's layout.

python scripts/eval.py dataset.path=DIR
"""

import json
from pathlib import Path

from ingest import console, progress_bars
from launch import build, launch, run_dir
from rich.console import Console
from rich.table import Table

from rag.cache import atomic_file
from rag.evaluate import metrics
from rag.evaluate.datasets import Dataset, load_beir
from rag.evaluate.run import retrieve
from rag.measure import environment


def main(config) -> None:
    dataset = load_beir(config.dataset.path, config.dataset.split)
    for problem in dataset.problems:
        console.print(problem, style="yellow", highlight=False, markup=False)
    with progress_bars() as update:
        run = retrieve(dataset, build(config.chunker), build(config.embedder), config.depth, update)
    means, per_query = metrics.evaluate(
        dataset.qrels, run, tuple(config.measures), drop_self_hits=dataset.drop_self_hits
    )
    write(run_dir(), config, means, per_query, run)
    show(dataset, means)


def write(folder: Path, config, means: dict, per_query: dict, run: dict) -> None:
    """metrics.json, per_query.jsonl, run.trec and config.yaml, each whole or not at all."""
    from omegaconf import OmegaConf

    texts = {
        "metrics.json": json.dumps(means | {"environment": environment()}, indent=1),
        "per_query.jsonl": "\n".join(
            json.dumps({"query": query} | values) for query, values in per_query.items()
        ),
        "config.yaml": OmegaConf.to_yaml(config, resolve=True),
    }
    for name, text in texts.items():
        with atomic_file(folder / name) as file:
            file.write(text.rstrip("\n").encode() + b"\n")
    metrics.write_trec_run(folder / "run.trec", run)


def show(dataset: Dataset, means: dict[str, float]) -> None:
    table = Table(title=f"{dataset.name}: {len(dataset.queries)} queries, {len(dataset.corpus)} documents")
    for name in means:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" for value in means.values()))
    Console().print(table)
    console.print(f"-> {run_dir()}", highlight=False, markup=False)


if __name__ == "__main__":
    launch(main, "eval")
