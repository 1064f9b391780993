"""Run a script in this process, without what launch adds."""

import importlib
from types import ModuleType

from hydra import compose, initialize_config_dir
from launch import CONF, quote_overrides
from settings import check


def run_script(script: ModuleType, *overrides: str) -> None:
    """Compose and check a configuration as a command line does, and run the script's `main`."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        config = compose(script.__name__, quote_overrides(overrides))
    check(config, settings_class(script.__name__))
    script.main(config)


def settings_class(script: str) -> type:
    """Return the class that declares a script's settings, such as GenerateSettings of scripts/generate.py."""
    return getattr(importlib.import_module(script), f"{script.capitalize()}Settings")
