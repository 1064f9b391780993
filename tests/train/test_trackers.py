"""Metrics reach other programs through their own interfaces; a missing package is named in one sentence."""

import json
import sys
from types import ModuleType

import pytest

from rag.train.metrics_file import MetricsFile
from rag.train.trackers import trackers
from rag.types import UserError

SETTINGS = {"train": {"epochs": 2}, "base": "x"}


def module(**functions) -> ModuleType:
    made = ModuleType("fake")
    made.__dict__.update(functions)
    return made


class FakeWriter:
    """tensorboardX.SummaryWriter: what it was told."""

    def __init__(self, folder: str):
        self.folder, self.told, self.closed = folder, [], False

    def add_text(self, name: str, text: str) -> None:
        self.told.append((name, text))

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.told.append((name, value, step))

    def flush(self) -> None:
        self.told.append("flush")

    def close(self) -> None:
        self.closed = True


def test_tensorboard_gets_settings_and_scalars(monkeypatch, tmp_path):
    made = []
    fake = module(SummaryWriter=lambda folder: made.append(FakeWriter(folder)) or made[-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with trackers(["tensorboard"], tmp_path, SETTINGS) as track:
        track(3, {"loss": 0.5})
    [writer] = made
    assert writer.folder == str(tmp_path / "tensorboard") and writer.closed
    assert writer.told[0] == ("settings", "    train.epochs: 2\n    base: x")
    assert writer.told[1:] == [("loss", 0.5, 3), "flush"]


def test_a_tracker_is_closed_when_training_fails(monkeypatch, tmp_path):
    made = []
    fake = module(SummaryWriter=lambda folder: made.append(FakeWriter(folder)) or made[-1])
    monkeypatch.setitem(sys.modules, "tensorboardX", fake)
    with pytest.raises(RuntimeError, match="in training"), trackers(["tensorboard"], tmp_path, SETTINGS):
        raise RuntimeError("in training")
    assert made[0].closed


def test_mlflow_and_wandb_get_every_value(monkeypatch, tmp_path):
    told = []

    class Run:
        def __enter__(self):
            told.append("started")

        def __exit__(self, *_):
            told.append("ended")

        def log(self, values, step):
            told.append(("wandb", step, values))

        def finish(self):
            told.append("finished")

    mlflow = module(
        start_run=lambda run_name: Run(),
        log_params=lambda values: told.append(values),
        log_metrics=lambda values, step: told.append(("mlflow", step, values)),
    )
    wandb = module(init=lambda **settings: told.append(settings["config"]) or Run())
    monkeypatch.setitem(sys.modules, "mlflow", mlflow)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    with trackers(["mlflow", "wandb"], tmp_path, SETTINGS) as track:
        track(1, {"loss": 2.0})
    flat = {"train.epochs": "2", "base": "x"}
    values = [("mlflow", 1, {"loss": 2.0}), ("wandb", 1, {"loss": 2.0})]
    assert told == ["started", flat, SETTINGS, *values, "finished", "ended"]


@pytest.mark.parametrize(
    "name, package", [("tensorboard", "tensorboardX"), ("mlflow", "mlflow"), ("wandb", "wandb")]
)
def test_a_missing_package_is_named(monkeypatch, tmp_path, name, package):
    monkeypatch.setitem(sys.modules, package, None)
    with (
        pytest.raises(
            UserError, match=rf"trackers has {name}, which needs the package {package}: pip install {package}"
        ),
        trackers([name], tmp_path, SETTINGS),
    ):
        raise AssertionError("it must not begin")


def test_an_unknown_tracker_is_refused(tmp_path):
    with (
        pytest.raises(UserError, match="no tracker 'comet': choose from tensorboard, mlflow, wandb"),
        trackers(["comet"], tmp_path, SETTINGS),
    ):
        raise AssertionError("it must not begin")


def test_metrics_go_on_from_the_checkpoint(tmp_path):
    """Lines of later steps, and a line that was cut by a kill, are removed; the earlier ones stay as they were."""
    file = tmp_path / "run" / "metrics.jsonl"
    first = MetricsFile(file, 0, lambda *_: None)
    for step in (1, 2, 3):
        first.write(step, {"loss": step / 2})
    with open(file, "a") as opened:
        opened.write('{"step": 4, "lo')
    seen = []
    again = MetricsFile(file, 2, lambda step, values: seen.append((step, values)))
    again.write(3, {"validation_loss": 9.0})
    lines = [json.loads(line) for line in file.read_text().splitlines()]
    assert lines == [{"step": 1, "loss": 0.5}, {"step": 2, "loss": 1.0}, {"step": 3, "validation_loss": 9.0}]
    assert seen == [(3, {"validation_loss": 9.0})]
