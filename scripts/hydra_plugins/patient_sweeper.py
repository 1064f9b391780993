"""A Hydra sweeper that leaves out the combinations of settings that cannot be composed and runs the others."""

from collections.abc import Callable, Mapping, Sequence
from itertools import product
from pathlib import Path
from typing import Any, ClassVar

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.core.plugins import Plugins
from hydra.errors import HydraException
from hydra.plugins.sweeper import Sweeper
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException


class PatientSweeper(Sweeper):
    """Run a job for each combination of the values that a sweep lists; conf/shared.yaml chooses this sweeper."""

    # Called with the settings, the folder and the error of each combination left out; scripts/launch.py sets it.
    leave_out: ClassVar[Callable[[Sequence[str], Path, Exception], None]]
    # Called with the folder of all jobs when these are done; likewise.
    after_sweep: ClassVar[Callable[[Path], None]]

    def __init__(self, max_batch_size: int | None = None, params: Mapping[str, str] | None = None):
        """Take the settings of Hydra's own sweeper.

        Args:
            max_batch_size: The most jobs that the launcher is given together; None: all.
            params: Further settings and sweeps, by key.
        """
        self.max_batch_size, self.params = max_batch_size, dict(params or {})

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        """Take what Hydra hands to a sweeper before `sweep`."""
        self.hydra_context, self.config = hydra_context, config
        self.launcher = Plugins.instance().instantiate_launcher(
            hydra_context=hydra_context, task_function=task_function, config=config
        )

    def sweep(self, arguments: list[str]) -> list[Any]:
        """Launch the jobs and return their results. Raises the error of a combination where none can be composed."""
        parser = OverridesParser.create(config_loader=self.hydra_context.config_loader)
        params = [f"{key}={value}" for key, value in self.params.items()]
        folder = Path(self.config.hydra.sweep.dir)
        folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(self.config, folder / "multirun.yaml")
        jobs = self._composable(combinations(parser.parse_overrides([*params, *arguments])), folder)
        size, results = self.max_batch_size or len(jobs), []
        for start in range(0, len(jobs), size):
            batch = self.launcher.launch(jobs[start : start + size], initial_job_idx=start)
            for job in batch:
                _ = job.return_value  # raises what the job has raised
            results.append(batch)
        type(self).after_sweep(folder)
        return results

    def _composable(self, jobs: Sequence[Sequence[str]], folder: Path) -> list[Sequence[str]]:
        """Return the combinations that can be composed and report the others."""
        composable: list[Sequence[str]] = []
        wrong: list[tuple[Sequence[str], Exception]] = []
        for settings in jobs:
            try:
                self.validate_batch_is_legal([settings])
            except (HydraException, OmegaConfBaseException) as error:
                wrong.append((settings, error))
            else:
                composable.append(settings)
        if not composable:
            raise wrong[0][1]
        for number, (settings, error) in enumerate(wrong):
            type(self).leave_out(settings, folder / f"left_out_{number}", error)
        return composable


def combinations(overrides: Sequence[Override]) -> list[list[str]]:
    """Return the settings of each job: one value of every override, in all combinations."""
    values: dict[str, list[str]] = {}
    for override in overrides:
        key = override.get_key_element()
        if not override.is_sweep_override():
            values[key] = [f"{key}={override.get_value_element_as_str()}"]
        elif override.is_discrete_sweep():
            values[key] = [f"{key}={value}" for value in override.sweep_string_iterator()]
        else:
            raise HydraException(f"{key} is swept over a continuous interval: list its values")
    return [list(job) for job in product(*values.values())]
