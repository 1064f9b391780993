"""A sweep of made-up results, and its report."""

import json
from pathlib import Path

import numpy as np
import pytest

from rag.report import compose, results
from tests.report.result_folders import HOSTILE, better, column, costs, fail, save


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A sweep: a baseline, a clearly better, a clearly worse and an equal system, a sample, a failure; two datasets."""
    home = tmp_path_factory.mktemp("sweep = one, two")
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.6, 60)
    noise = rng.normal(0, 0.05, 60)
    noise -= noise.mean()  # a difference of exactly nothing
    rows = {"base": base, "better": base + 0.1 + noise, "worse": base - 0.1 + noise, "equal": base + noise}
    for place, (name, values) in enumerate(rows.items()):
        scores = {"nDCG@10": column(values), "MAP": column(values / 2)}
        more = {}
        if name == "better":
            more = better(scores, values)
        config = {"retriever": {"_target_": f"rag.x.{name.title()}", "depth": 100, "path": f"/tmp/{name}"}}
        config |= {"seed": 3, "prompt": f"{'word ' * 30}{name}{' word' * 30}"}
        save(
            home / str(place),
            f"retriever={name},k=10",
            scores,
            config=config,
            costs=costs(0.004 * 3**place),
            **more,
        )
    rankings = [
        f"q{q}\tQ0\t{name}\t1\t{score}\tx\n"
        for q in range(60)
        for name, score in ((f"d{q + 1}", 1.5), (f"d{q}", "-0.0"))
    ]
    (home / "0" / "run.trec").write_text("".join(rankings))
    queries = [{"query": f"q{q}", "text": f"{HOSTILE} {q}", "relevant": {f"d{q}": 2}} for q in range(60)]
    (home / "0" / "queries.jsonl").write_text("".join(json.dumps(query) + "\n" for query in queries))
    sample = range(0, 60, 3)
    scores = {"nDCG@10": column(rows["better"][sample], sample)}
    drawn = {"limit": 20, "seed": 5, "queries": 20, "fingerprint": "a" * 64}
    save(home / "10", f"retriever=sampled,k='{HOSTILE}'", scores, dataset=drawn)
    save(home / "11", "retriever=other", {"Recall@5": column(base)}, dataset={"name": "krill"})
    fail(home / "12", "retriever=broken", "There is no model M: give a path.")
    return home


@pytest.fixture(scope="module")
def runs(home):
    return results.read([home])[0]


@pytest.fixture(scope="module")
def blocks(home):
    return compose.page(*results.read([home]), baseline="base")


@pytest.fixture(scope="module")
def output(blocks, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("page")
    compose.write(output, blocks)
    return output
