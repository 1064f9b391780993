"""Retrieval quality on a dataset in BEIR's layout.

python scripts/eval.py dataset.path=DIR
"""

import json
from pathlib import Path

from launch import build, launch, run_dir


def main(config) -> None:
    from terminal import print_problem, progress_bars

    from rag.evaluate import metrics
    from rag.evaluate.run import retrieve

    dataset, evaluation = build(config.dataset), build(config.evaluation)
    for problem in dataset.problems:
        print_problem(problem)
    with progress_bars() as update:
        run = retrieve(dataset, build(config.chunker), build(config.embedder), evaluation.depth, update)
    means, per_query = metrics.evaluate(dataset.qrels, run, evaluation.measures)
    write(run_dir(), config, means, per_query)
    metrics.write_trec_run(run_dir() / "run.trec", run)
    show(f"{dataset.name}: {len(dataset.queries)} queries, {len(dataset.corpus)} documents", means)
    print(f"-> {run_dir()}")


def write(folder: Path, config, means: dict[str, float], per_query: dict[str, dict[str, float]]) -> None:
    """metrics.json, per_query.jsonl and config.yaml, each whole or not at all."""
    from omegaconf import OmegaConf

    from rag.cache import atomic_file
    from rag.measure import environment

    rows = [json.dumps({"query": query} | values) for query, values in per_query.items()]
    texts = {
        "metrics.json": json.dumps(means | {"environment": environment()}, indent=1),
        "per_query.jsonl": "\n".join(rows),
        "config.yaml": OmegaConf.to_yaml(config, resolve=True).rstrip("\n"),
    }
    for name, text in texts.items():
        with atomic_file(folder / name, "w") as file:
            file.write(text + "\n")


def show(title: str, means: dict[str, float]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title=title)
    for name in means:
        table.add_column(name, justify="right")
    table.add_row(*(f"{value:.4f}" for value in means.values()))
    Console().print(table)


if __name__ == "__main__":
    launch(main, "eval")
