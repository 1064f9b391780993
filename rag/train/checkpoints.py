"""Checkpoints of a training (orbax): complete or not there, the newest two kept."""

import dataclasses
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import numpy as np

from rag.runtime.cache.keys import content_key
from rag.runtime.records import reason
from rag.types import UserError

State = TypeVar("State")

_KEPT = 2


@dataclass
class Progress:
    """How far a training has come, besides its arrays."""

    step: int = 0  # finished ones
    epoch: int = 0  # position of the next batch: the epoch ...
    index: int = 0  # ... and its number there
    loss: float | None = None  # of the last step
    seconds: float = 0.0
    best_loss: float | None = None  # by validation
    worse: int = 0  # validations since the best one


class Checkpoints:
    """The checkpoints of one training in a folder. A context manager: at its end the last one is on the disk.

    Raises UserError on entering where the folder has checkpoints of a training with other settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]):
        self._folder, self._settings = folder.absolute(), content_key(settings)

    def __enter__(self) -> "Checkpoints":
        import orbax.checkpoint as ocp  # takes a second to import

        options = ocp.CheckpointManagerOptions(max_to_keep=_KEPT, enable_async_checkpointing=False)
        self._manager = ocp.CheckpointManager(
            self._folder, options=options, item_names=("arrays", "progress")
        )
        self._args = ocp.args
        return self

    def __exit__(self, *_: object) -> None:
        self._manager.close()

    def save(self, state: Any, progress: Progress) -> None:
        """Write a checkpoint of the state, a pytree of arrays; one of this step is there already if nothing changed."""
        if self._manager.latest_step() == progress.step:
            return
        arrays = {str(i): np.asarray(leaf) for i, leaf in enumerate(jax.tree.leaves(state))}
        values = dataclasses.asdict(progress) | {"settings": self._settings}
        self._manager.save(
            progress.step,
            args=self._args.Composite(
                arrays=self._args.StandardSave(arrays), progress=self._args.JsonSave(values)
            ),
        )

    def latest(self, state: State) -> tuple[State, Progress] | None:
        """Return the newest checkpoint, in the structure of `state`; None if there is none."""
        step = self._manager.latest_step()
        if step is None:
            return None
        values = dict(self._read(step, "progress", self._args.JsonRestore()))
        if values.pop("settings") != self._settings:
            raise UserError(
                f"{self._folder.parent} holds a training with other settings: choose another output.path, or continue "
                "it with its own settings."
            )
        leaves, structure = jax.tree.flatten(state)
        shapes = {str(i): jax.ShapeDtypeStruct(leaf.shape, leaf.dtype) for i, leaf in enumerate(leaves)}
        arrays = self._read(step, "arrays", self._args.StandardRestore(shapes))
        restored = jax.tree.unflatten(structure, [arrays[str(i)] for i in range(len(leaves))])
        return restored, Progress(**values)

    def _read(self, step: int, item: str, arguments: Any) -> Any:
        try:
            return self._manager.restore(step, args=self._args.Composite(**{item: arguments}))[item]
        except Exception as error:  # of any type: the libraries beneath have their own
            raise UserError(
                f"The checkpoint {self._folder / str(step)} is damaged ({reason(error)}): remove this folder to go on "
                "from the one before it."
            ) from error


def remove_checkpoints(folder: Path) -> None:
    """Remove the checkpoints of a finished training."""
    shutil.rmtree(folder / "checkpoints", ignore_errors=True)
