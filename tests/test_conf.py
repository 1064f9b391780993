"""Every file of conf/ composes, begins with a command to paste, and fits what its `_target_` takes."""

import re

import pytest
from hydra import compose, initialize_config_dir
from launch import CONF, check
from omegaconf import OmegaConf

PRIMARY = sorted(path.stem for path in CONF.glob("*.yaml") if path.stem != "shared")


def groups(primary: str) -> list[str]:
    defaults = OmegaConf.load(CONF / f"{primary}.yaml").defaults
    return [key for entry in defaults if OmegaConf.is_dict(entry) for key in entry]


CHOICES = [
    (primary, group, path.stem)
    for primary in PRIMARY
    for group in groups(primary)
    for path in sorted((CONF / group).glob("*.yaml"))
]


def composed(primary: str, *overrides: str):
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(primary, list(overrides))


def test_there_is_something_to_check():
    assert {"ingest", "generate", "eval", "bench"} <= set(PRIMARY)
    assert {group for _, group, _ in CHOICES} >= {
        "embedder",
        "chunker",
        "retriever",
        "generator",
        "sampling",
        "bench",
    }


@pytest.mark.parametrize("primary", PRIMARY)
def test_a_script_takes_the_shared_settings_and_fits_its_targets(primary):
    config = composed(primary)
    assert config.device == "auto"
    assert config.profile is False
    check(config)


@pytest.mark.parametrize(("primary", "group", "choice"), CHOICES)
def test_a_choice_fits_its_target(primary, group, choice):
    stage = composed(primary, f"{group}={choice}")[group]
    assert "_target_" in stage
    check(stage)


@pytest.mark.parametrize(
    "path", sorted(CONF.rglob("*.yaml")), ids=lambda path: path.relative_to(CONF).as_posix()
)
def test_a_file_begins_with_a_command(path):
    head = re.match(r"(#.*\n)+", path.read_text())
    assert head, "the first line is no comment"
    assert "python scripts/" in head[0]
