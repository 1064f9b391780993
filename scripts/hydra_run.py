"""Facts about the current Hydra run: its folder, its overrides, its label; and the record of a failed job."""

import functools
import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rag.runtime.files import atomic_file


def run_dir() -> Path:
    """Return the folder that Hydra made for this run."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def overrides() -> list[str]:
    """Return the overrides of this run's command line in Hydra's spelling; a group without a choice is "null"."""
    from hydra.core.hydra_config import HydraConfig

    config = HydraConfig.get()
    [main] = [source.path for source in config.runtime.config_sources if source.provider == "main"]
    chosen = groups(Path(main))
    return [
        re.sub(r"=\[\]$", "=null", text) if re.split("[@=]", text.lstrip("+"))[0] in chosen else text
        for text in config.overrides.task
    ]


@functools.cache
def groups(config_dir: Path) -> set[str]:
    """Return the names of all config groups: folders below `config_dir` with YAML files, and those in defaults lists.

    Only the second kind may be without a choice of ours, such as `metric`.
    """
    folders = {path.parent.relative_to(config_dir).as_posix() for path in config_dir.glob("*/**/*.yaml")}
    listed = (re.findall(r"^  - (\w+): ", path.read_text(), re.M) for path in config_dir.glob("*.yaml"))
    return folders.union(*listed)


def label() -> str:
    """Return the name of this run in reports.

    For a job of a sweep it is the overrides that the sweep varies, otherwise all overrides except those that say
    where the dataset is.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = overrides()
    if sweeping():
        typed = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
        parsed = OverridesParser.create().parse_overrides(typed)
        swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
        swept |= set(HydraConfig.get().sweeper.get("params") or {})
        given = [override for override in given if override.partition("=")[0] in swept]
    named = [o for o in given if not re.match(r"\+{0,2}dataset(\.(path|id|split))?=|(plan|stages)=", o)]
    return " ".join(named) or "defaults"


def sweeping() -> bool:
    """Return whether this run is one job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def record_failure(
    folder: Path, label: str, overrides: Sequence[str], error: Exception, sentence: str | None
) -> None:
    """Print why a job of a sweep failed, and write failure.json into its folder.

    Args:
        folder: The job's folder.
        label: The job's name.
        overrides: The job's settings.
        error: What was raised.
        sentence: The explanation for the user; None for a bug, whose traceback is printed.
    """
    if sentence is None:
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {error}"
    sentence = " ".join(sentence.split())
    print(f"{label}: {sentence}", file=sys.stderr)
    with atomic_file(folder / "failure.json", "w") as file:
        json.dump({"label": label, "overrides": list(overrides), "error": sentence}, file, indent=1)
