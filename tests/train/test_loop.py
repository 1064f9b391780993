"""The training loop: it learns, repeats itself bit for bit, and goes on after a kill as if there had been none."""

import json
import math
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import optax
import pytest

from rag.train import loop
from rag.train.loop import TrainOptions, product_type, train
from rag.train.optimizer import OptimizerOptions, learning_rate
from rag.types import UserError
from tests.train.readers import make, no_distractors, options

SETTINGS = {"of": "a test"}
RUN = """
import sys
from pathlib import Path
sys.path[:0] = sys.argv[3:]
from tests.train.test_loop import run
run(Path(sys.argv[1]), Path(sys.argv[2]))
"""


def run(model: Path, folder: Path, **changes):
    """Train a tiny reader for some steps, with a checkpoint after each."""
    objective, reader = make(model, options(seed=3))
    some = {"epochs": 4.0, "validate_every": 4, "checkpoint_minutes": 0.0} | changes
    return train(objective, reader, TrainOptions(OptimizerOptions(1e-2), **some), folder, SETTINGS)


def lines(folder: Path) -> list[dict]:
    """Return the metrics without the times in them."""
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k not in ("seconds", "tokens_per_s")} for row in rows]


def equal(one, other) -> bool:
    pairs = zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True)
    return all((np.asarray(a) == np.asarray(b)).all() for a, b in pairs)


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """Return the folder of the model, the folder of a training, and its result."""
    folder = tmp_path_factory.mktemp("reference")
    return folder / "model", folder / "run", run(folder / "model", folder / "run")


def test_a_training_repeats_itself_bit_for_bit(reference, tmp_path):
    model, folder, result = reference
    again = run(model, tmp_path / "again")
    assert equal(again.parameters, result.parameters)
    assert lines(tmp_path / "again") == lines(folder)
    losses = [row["loss"] for row in lines(folder) if "loss" in row]
    assert len(losses) == result.steps and losses[-1] < losses[0]
    validations = [row["validation_loss"] for row in lines(folder) if "validation_loss" in row]
    assert result.validation_loss == min(validations) and len(validations) == math.ceil(result.steps / 4)


@pytest.mark.parametrize("moments", [(3,), pytest.param((1, 2, 4, 5, 7), marks=pytest.mark.long)])
def test_killed_and_resumed(reference, tmp_path, moments):
    """SIGKILL at any moment costs no more than the steps since the last checkpoint, and changes no loss."""
    model, folder, result = reference
    target, kills = tmp_path / "killed", 0
    root = Path(__file__).parents[2]
    command = [sys.executable, "-c", RUN, str(model), str(target), str(root)]
    for steps in moments:
        process = subprocess.Popen(command, cwd=root, stderr=subprocess.DEVNULL)
        metrics = target / "metrics.jsonl"
        deadline = time.monotonic() + 240
        while process.poll() is None and time.monotonic() < deadline:
            if metrics.exists() and metrics.read_text().count('"loss"') >= steps:
                process.send_signal(signal.SIGKILL)
                break
            time.sleep(0.005)
        kills += process.wait() == -signal.SIGKILL
    final = run(model, target)
    assert kills == len(moments)
    assert equal(final.parameters, result.parameters) and lines(target) == lines(folder)


def test_in_parts_as_at_once(reference, tmp_path):
    model, folder, result = reference
    parts = [run(model, tmp_path, stop_after_minutes=0.0) for _ in range(result.steps)]
    assert [part.steps for part in parts] == list(range(1, result.steps + 1))
    assert [part.finished for part in parts] == [False] * (result.steps - 1) + [True]
    assert equal(parts[-1].parameters, result.parameters) and lines(tmp_path) == lines(folder)


def test_a_finished_training_is_found_finished(reference):
    """As after a kill between the last checkpoint and the files that are made of it."""
    model, folder, result = reference
    before = lines(folder)
    again = run(model, folder)
    assert again._replace(parameters=None) == result._replace(parameters=None)
    assert equal(again.parameters, result.parameters) and lines(folder) == before


@pytest.mark.parametrize("moment", ["before a step", "in a step", "after a step"])
def test_ctrl_c_leaves_a_checkpoint_to_go_on_from(reference, tmp_path, monkeypatch, moment):
    model, _, result = reference
    calls = []

    def interrupt(*_: object) -> None:
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if moment == "after a step":
            patch.setattr("rag.train.metrics_file.MetricsFile.write", interrupt)
        else:
            name = "add_gradients" if moment == "before a step" else "apply_gradients"
            function = getattr(loop, name)
            patch.setattr(loop, name, lambda *args, **kwargs: (interrupt(), function(*args, **kwargs))[1])
        with pytest.raises(KeyboardInterrupt):
            run(model, tmp_path, checkpoint_minutes=60.0)
    final = run(model, tmp_path)
    assert equal(final.parameters, result.parameters)
    steps = [row["step"] for row in lines(tmp_path) if "loss" in row]
    assert steps[-1] == result.steps and final.steps == result.steps


def test_a_damaged_checkpoint_is_named(tmp_path):
    model = tmp_path / "model"
    run(model, tmp_path / "run", stop_after_minutes=0.0)
    for file in (tmp_path / "run" / "checkpoints" / "1" / "arrays").rglob("*"):
        if file.is_file():
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 2])
    with pytest.raises(UserError, match=r"The checkpoint .*checkpoints/1 is damaged .*: remove this folder"):
        run(model, tmp_path / "run")


def test_accumulated_batches_are_one_larger_batch(tmp_path):
    """Two batches of one row in a step are the batch of both rows: the mean is over the answers of the step."""

    def losses(rows: int, accumulate: int) -> list[float]:
        few = options(rows=rows, row_tokens=96, contexts=no_distractors())
        objective, reader = make(tmp_path / "model", few, count=22)
        some = TrainOptions(OptimizerOptions(1e-2), accumulate=accumulate)
        train(objective, reader, some, tmp_path / f"{rows}", SETTINGS)
        return [row["loss"] for row in lines(tmp_path / f"{rows}") if "loss" in row]

    one, two = losses(2, 1), losses(1, 2)
    assert len(one) > 2
    np.testing.assert_allclose(one, two, rtol=1e-4)


def test_32_examples_are_learned_by_heart(tmp_path):
    objective, reader = make(
        tmp_path / "model", options(rank=0, rows=4, row_tokens=256, contexts=no_distractors()), count=34
    )
    some = TrainOptions(OptimizerOptions(1e-2), epochs=250.0, validate_every=10_000)
    result = train(objective, reader, some, tmp_path / "run", SETTINGS)
    last = [row["loss"] for row in lines(tmp_path / "run") if "loss" in row][-4:]
    assert max(last) < 0.01, result


def test_the_average_is_validated_and_returned(tmp_path):
    objective, reader = make(tmp_path / "model", options())
    start = jax.tree.map(np.asarray, reader.parameters)
    some = TrainOptions(OptimizerOptions(1e-2), average=1.0)  # nothing of the steps is taken over
    result = train(objective, reader, some, tmp_path / "run", SETTINGS)
    assert equal(result.parameters, start)


def test_early_stopping_returns_the_best(tmp_path):
    objective, reader = make(tmp_path / "model", options())
    rate = OptimizerOptions(0.3, warmup=0.0, constant=1.0)  # far too high: the loss rises
    some = TrainOptions(rate, epochs=50.0, validate_every=1, patience=3)
    result = train(objective, reader, some, tmp_path / "run", SETTINGS)
    found = [row["validation_loss"] for row in lines(tmp_path / "run") if "validation_loss" in row]
    assert result.finished and result.validation_loss == min(found)
    assert len(found) == found.index(min(found)) + 4


def test_other_settings_are_refused(reference):
    model, folder, _ = reference
    objective, reader = make(model, options(seed=3))
    with pytest.raises(UserError, match=r"holds a training with other settings: choose another output\.path"):
        train(objective, reader, TrainOptions(), folder, {"of": "another"})


def test_a_loss_that_is_no_number_ends_the_training(tmp_path):
    objective, reader = make(tmp_path / "model", options())
    broken = reader._replace(parameters=jax.tree.map(lambda a: a * np.nan, reader.parameters))
    with pytest.raises(UserError, match=r"loss of step 1 is nan .*lower train\.optimizer\.learning_rate"):
        train(objective, broken, TrainOptions(), tmp_path / "run", SETTINGS)


def test_trackers_get_every_line(tmp_path):
    objective, reader = make(tmp_path / "model", options())
    seen, reports = [], []
    train(
        objective,
        reader,
        TrainOptions(epochs=2.0),
        tmp_path / "run",
        SETTINGS,
        report=reports.append,
        track=lambda step, values: seen.append({"step": step, **values}),
    )
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert seen == rows
    assert [report.step for report in reports] == list(range(1, reports[0].steps + 1))


@pytest.mark.parametrize("warmup", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("constant", [0.0, 0.5])
@pytest.mark.parametrize("steps", [1, 7, 100])
def test_learning_rate_rises_stays_and_falls(warmup, constant, steps):
    some = OptimizerOptions(0.5, warmup=warmup, constant=constant, final=0.1)
    rates = [float(learning_rate(some, steps)(step)) for step in range(steps)]
    top, length = rates.index(max(rates)), max(1, round(warmup * steps))
    assert rates == sorted(rates[: top + 1]) + sorted(rates[top + 1 :], reverse=True)
    assert rates[0] == pytest.approx(0.5 / length) and min(rates) >= min(0.05, 0.4999 / length)
    if length + round(constant * steps) < steps:
        assert max(rates) == pytest.approx(0.5)
        decay = steps - length - round(constant * steps)
        last = optax.cosine_decay_schedule(0.5, decay, 0.1)(decay - 1)
        assert rates[-1] == pytest.approx(float(last))


def test_the_type_of_products_is_the_machines_or_as_asked(monkeypatch):
    assert product_type("float32") == "float32" and product_type("bfloat16") == "bfloat16"
    monkeypatch.setattr("rag.train.loop.cpu_flags", lambda: ("avx2", "avx512_bf16"))
    assert product_type("auto") == "bfloat16"
    monkeypatch.setattr("rag.train.loop.cpu_flags", lambda: ("avx2", "avx512f"))
    assert product_type("auto") == ("float32" if jax.default_backend() == "cpu" else "bfloat16")
