"""Hydra's sweeper, but one combination of settings that cannot be composed does not cancel all the others."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import ClassVar

from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException


class PatientSweeper(BasicSweeper):
    """Leaves out, and tells of, what cannot be composed; conf/shared.yaml chooses it."""

    # Told of each combination: its settings, its folder, the error. scripts/launch.py sets it.
    left_out: ClassVar[Callable[[Sequence[str], Path, Exception], None]]

    def validate_batch_is_legal(self, batch: list[Sequence[str]]) -> None:
        """Keep in `batch`, whose jobs are launched next, what composes. Raises the error where nothing does."""
        wrong: list[tuple[Sequence[str], Exception]] = []
        for settings in list(batch):
            try:
                super().validate_batch_is_legal([settings])
            except (HydraException, OmegaConfBaseException) as error:
                wrong.append((settings, error))
                batch.remove(settings)
        if not batch:
            raise wrong[0][1]
        for number, (settings, error) in enumerate(wrong):
            type(self).left_out(settings, Path(self.config.hydra.sweep.dir) / f"left_out_{number}", error)
