"""A sweep that is killed again and again, then let through, ends with the bytes of one that was never disturbed."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.tiny_models import write_encoder

EVAL = Path(__file__).resolve().parents[2] / "scripts" / "eval.py"
JOBS = 4


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A tiny encoder, and a dataset of 60 documents and 30 questions."""
    home, draw = tmp_path_factory.mktemp("home"), random.Random(0)
    write_encoder(home / "encoder")
    words = ["".join(draw.choices("abcdefgh", k=4)) for _ in range(80)]
    texts = {f"d{i}": " ".join(draw.choices(words, k=draw.randint(5, 40))) for i in range(60)}
    queries = {f"q{i}": " ".join(draw.sample(texts[f"d{i}"].split(), 3)) for i in range(30)}
    (home / "set" / "qrels").mkdir(parents=True)
    for name, rows in (("corpus", texts), ("queries", queries)):
        lines = [json.dumps({"_id": key, "text": text}) for key, text in rows.items()]
        (home / "set" / f"{name}.jsonl").write_text("\n".join(lines))
    judged = "".join(f"q{i}\td{i}\t1\n" for i in range(30))
    (home / "set" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return home


def sweep(home: Path, cache: str, kill_after: float | None = None) -> Path:
    """Run the sweep in a process of its own, or for `kill_after` seconds of it; the folder of its results."""
    command = [
        sys.executable, EVAL, "-m", "dataset.path=set", "embedder=bert", "embedder.uri=encoder",
        "chunker=fixed", "chunker.overlap=0", "chunker.size=16,24", "retriever=dense,hybrid",
        "statistics.resamples=200", "evaluation.probes=1", f"hydra.sweep.dir={cache}-out",
    ]  # fmt: skip
    environment = os.environ | {"RAG_CACHE": str(home / cache), "HYDRA_FULL_ERROR": "1"}
    with open(home / f"{cache}.log", "ab") as log:
        process = subprocess.Popen(command, cwd=home, env=environment, stdout=log, stderr=log)
        if kill_after is not None:
            time.sleep(kill_after)
            process.send_signal(signal.SIGKILL)
            process.wait()
        else:
            assert process.wait() == 0, (home / f"{cache}.log").read_text()
    return home / f"{cache}-out"


def results(folder: Path) -> dict[str, bytes]:
    names = ("metrics.json", "per_query.jsonl", "run.trec")
    return {f"{job}/{name}": (folder / str(job) / name).read_bytes() for job in range(JOBS) for name in names}


@pytest.mark.long  # tests/crash kills a sweep at its system calls, without the start of a process each
def test_a_killed_sweep_resumes_to_the_same_bytes(home):
    begin = time.monotonic()
    wanted = results(sweep(home, "whole"))
    whole_s = time.monotonic() - begin
    draw = random.Random(1)
    for _ in range(10):
        sweep(home, "killed", kill_after=draw.uniform(0.2, 1.0) * whole_s)
    assert results(sweep(home, "killed")) == wanted


def test_what_fails_in_a_sweep_is_named_and_the_rest_runs(home):
    """A choice that does not exist, and one that does not go with the others' settings."""
    command = [
        sys.executable, EVAL, "-m", "dataset.path=set", "embedder=bag_of_words", "statistics.resamples=200",
        "retriever=bm25,nowhere,dense", "tuning=bm25", "hydra.sweep.dir=failing",
    ]  # fmt: skip
    environment = os.environ | {"RAG_CACHE": str(home / "failing-cache")}
    done = subprocess.run(command, cwd=home, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert (home / "failing" / "0" / "metrics.json").exists()
    failures = [json.loads(path.read_text()) for path in (home / "failing").rglob("failure.json")]
    errors = {failure["label"].split(" ")[0]: failure["error"] for failure in failures}
    assert "takes retriever=bm25" in errors["retriever=dense"]
    assert any("no retriever 'nowhere'" in error for error in errors.values())
    assert "2 of the sweep's jobs failed" in done.stderr
    assert "python scripts/report.py runs=failing" in done.stdout
