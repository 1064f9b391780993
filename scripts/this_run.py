"""What a run knows of itself: its folder, what it was asked for, what to call it; and what it leaves when it fails."""

import json
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path

from rag.runtime.files import atomic_file


def run_dir() -> Path:
    """The folder that Hydra made for this run."""
    from hydra.core.hydra_config import HydraConfig

    return Path(HydraConfig.get().runtime.output_dir)


def overrides() -> list[str]:
    """The settings that this run was given on the command line, as Hydra spells them; no choice of a group is null."""
    from hydra.core.hydra_config import HydraConfig

    config = HydraConfig.get()
    [main] = [source.path for source in config.runtime.config_sources if source.provider == "main"]
    chosen = groups(Path(main))
    return [
        re.sub(r"=\[\]$", "=null", text) if re.split("[@=]", text.lstrip("+"))[0] in chosen else text
        for text in config.overrides.task
    ]


def groups(config_dir: Path) -> set[str]:
    """The folders of configurations that a setting chooses from."""
    return {path.parent.relative_to(config_dir).as_posix() for path in config_dir.glob("*/**/*.yaml")}


def label() -> str:
    """What tells this run from others: in a sweep the settings that are swept, else all but the dataset's place."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.core.override_parser.overrides_parser import OverridesParser

    given = overrides()
    if sweeping():
        typed = [argument for argument in sys.argv[1:] if "=" in argument and not argument.startswith("-")]
        parsed = OverridesParser.create().parse_overrides(typed)
        swept = {override.get_key_element() for override in parsed if override.is_sweep_override()}
        swept |= set(HydraConfig.get().sweeper.get("params") or {})
        given = [override for override in given if override.partition("=")[0] in swept]
    named = [o for o in given if not re.match(r"\+{0,2}dataset(\.(path|id|split))?=|plan=", o)]
    return " ".join(named) or "defaults"


def sweeping() -> bool:
    """Whether this run is one job of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    return HydraConfig.get().mode == RunMode.MULTIRUN


def record_failure(
    folder: Path, label: str, overrides: Sequence[str], error: Exception, sentence: str | None
) -> None:
    """Tell of a failed job of a sweep, and leave failure.json in its folder; without a sentence it is a bug."""
    if sentence is None:
        traceback.print_exception(error)
        sentence = f"{type(error).__name__}: {error}"
    sentence = " ".join(sentence.split())
    print(f"{label}: {sentence}", file=sys.stderr)
    with atomic_file(folder / "failure.json", "w") as file:
        json.dump({"label": label, "overrides": list(overrides), "error": sentence}, file, indent=1)
