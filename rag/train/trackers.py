"""Hand the metrics of a training to other programs: TensorBoard, MLflow, Weights & Biases, each an extra package."""

import contextlib
import importlib
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from rag.types import UserError

Track = Callable[[int, Mapping[str, float]], None]  # (step, values by name)


@contextlib.contextmanager
def trackers(names: Sequence[str], folder: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    """Open the named programs' records of a training, and yield the function that writes a step's values to all.

    Args:
        names: of the programs.
        folder: of the training; TensorBoard's files are in `tensorboard/` there, and W&B's in `wandb/`. MLflow writes
            to where its own environment variables say, by default into the current folder.
        settings: shown with the training.

    Raises:
        UserError: a program is not known, or not installed.
    """
    if unknown := [name for name in names if name not in _TRACKERS]:
        raise UserError(f"There is no tracker {unknown[0]!r}: choose from {', '.join(_TRACKERS)}.")
    with contextlib.ExitStack() as stack:
        writers = [stack.enter_context(_TRACKERS[name](folder, settings)) for name in dict.fromkeys(names)]

        def track(step: int, values: Mapping[str, float]) -> None:
            for write in writers:
                write(step, values)

        yield track


@contextlib.contextmanager
def _tensorboard(folder: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    writer = _imported("tensorboardX", "tensorboard").SummaryWriter(str(folder / "tensorboard"))
    writer.add_text("settings", "\n".join(f"    {name}: {value}" for name, value in _flat(settings)))

    def write(step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, step)
        writer.flush()

    try:
        yield write
    finally:
        writer.close()


@contextlib.contextmanager
def _mlflow(folder: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    mlflow = _imported("mlflow", "mlflow")
    with mlflow.start_run(run_name=folder.name):
        mlflow.log_params(
            {re.sub(r"[^\w./ -]", "_", name): str(value)[:500] for name, value in _flat(settings)}
        )
        yield lambda step, values: mlflow.log_metrics(dict(values), step=step)


@contextlib.contextmanager
def _wandb(folder: Path, settings: Mapping[str, Any]) -> Iterator[Track]:
    wandb = _imported("wandb", "wandb")
    run = wandb.init(dir=str(folder), name=folder.name, config=dict(settings))
    try:
        yield lambda step, values: run.log(dict(values), step=step)
    finally:
        run.finish()


_TRACKERS: dict[str, Callable[[Path, Mapping[str, Any]], contextlib.AbstractContextManager[Track]]] = {
    "tensorboard": _tensorboard,
    "mlflow": _mlflow,
    "wandb": _wandb,
}


def _imported(package: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise UserError(
            f"train.trackers has {name}, which needs the package {package}: pip install {package}."
        ) from error


def _flat(settings: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in settings.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value
