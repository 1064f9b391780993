"""Made-up result folders, as evaluations leave them, and the tables of a report over them."""

import json
import math
from pathlib import Path

import numpy as np
import yaml

from rag.report.page import Details, Heading, Table

HOSTILE = "<b>bold</b> | *x* & $y$ [z](http://example.org)"
DATASET = {"name": "seals", "fingerprint": "f" * 64, "queries": 60, "limit": None, "seed": 0}
STATISTICS = {"confidence": 0.95, "resamples": 1000, "seed": 7}


def save(folder: Path, label: str, scores: dict[str, dict[str, float | None]], **extra) -> Path:
    """A result folder as an evaluation leaves it; `scores` is measure -> query -> value."""
    folder.mkdir(parents=True)
    dataset = DATASET | extra.pop("dataset", {})
    known = {name: [v for v in column.values() if v is not None] for name, column in scores.items()}
    means = {name: math.fsum(values) / len(values) for name, values in known.items()}
    metrics = {
        "label": label,
        "key": str(folder),
        "dataset": dataset,
        "means": means,
        "intervals": {name: [mean - 0.0123, mean + 0.0234] for name, mean in means.items()},
        "statistics": STATISTICS,
        "warnings": extra.pop("warnings", []),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics | extra.pop("metrics", {})))
    queries = dict.fromkeys(query for column in scores.values() for query in column)
    rows = [{"query": q} | {name: column.get(q) for name, column in scores.items()} for q in queries]
    (folder / "per_query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in extra.items():
        text = yaml.safe_dump(content) if name == "config" else json.dumps(content)
        (folder / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(text)
    return folder


def fail(folder: Path, label: str, error: str) -> None:
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text(json.dumps({"label": label, "overrides": [], "error": error}))


def column(values: np.ndarray, queries: range | None = None) -> dict[str, float]:
    return {f"q{q}": float(value) for q, value in zip(queries or range(len(values)), values, strict=True)}


def costs(p50: float | None, **more) -> dict:
    environment = {"commit": "abc123", "cpu": "Abacus 9", "versions": {"jax": "0.10.2"}, "date": "2026-01-02"}
    stages = {"embed": {"seconds": 1.5, "items": 40, "reused": 30}}
    return {"stages": stages, "query_p50_s": p50, "environment": environment, **more}


def better(scores: dict, values: np.ndarray) -> dict:
    """What the better system's folder holds beside its scores: answers, an error breakdown, tuning, a warning."""
    scores["retrieved/F1"], scores["closed_book/F1"] = column(values / 3), column(values / 9)
    errors = {"retrieval miss": 0.25, "truncation": -0.05, "distraction": 0.1, "reader": 0.4}
    fold = {"parameters": {"weight": 0.7}, "train": 0.5123, "test": 0.4987, "queries": 30}
    return {
        "warnings": ["Only few queries were asked."],
        "error_breakdown": {
            "measure": "F1",
            "n": 60,
            "ceiling": 1.0,
            "scores": {"retrieved": 0.3, "oracle": 0.6},
            "errors": errors,
            "intervals": {cause: [error - 0.02, error + 0.02] for cause, error in errors.items()},
        },
        "tuning": {
            "family": "convex",
            "measure": "nDCG@10",
            "folds": [fold, fold],
            "nested": 0.4987,
            "naive": 0.5201,
            "naive_parameters": {"weight": 0.75},
            "optimism": 0.0214,
        },
    }


def tables(blocks) -> dict[str, Table]:
    """The first table below each heading of the first dataset."""
    found, title = {}, ""
    for block in blocks:
        if isinstance(block, Heading):
            title = block.text
        elif isinstance(block, Table):
            found.setdefault(title, block)
    return found


def hidden(blocks) -> dict[str, list]:
    """The blocks of each Details of the first dataset, by its summary."""
    found = {}
    for block in blocks:
        if isinstance(block, Details):
            found.setdefault(block.summary, list(block.blocks))
    return found


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    """System -> heading -> cell (the first of headings that repeat)."""
    place = list(table.header).index("system")
    return {row[place]: dict(reversed(list(zip(table.header, row, strict=True)))) for row in table.rows}
