"""Run a script in this process, with or without what launch adds."""

import importlib
import signal
import sys
from types import ModuleType

import launch as launch_module
import own_stages
import pytest
from hydra import compose, initialize_config_dir
from hydra_plugins.own_stages_path import OwnStagesPath
from launch import CONF, launch, quote_overrides
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


def launch_script(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], name: str, *arguments: str
) -> tuple[int, str, str]:
    """Run a script with all that launch adds but logs, and return exit code, stdout and stderr."""
    before = signal.getsignal(signal.SIGINT)
    no_logs = ["hydra/job_logging=none", "hydra/hydra_logging=none", "hydra.job_logging.root=null"]
    with monkeypatch.context() as patch:
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setenv("RAG_RUN", "")
        patch.setattr(launch_module, "enable_compilation_cache", lambda: None)
        patch.setattr(OwnStagesPath, "folder", None)
        patch.setattr(own_stages, "_imported", set())
        patch.setattr(sys, "path", [*sys.path])
        patch.setattr(sys, "argv", [f"{name}.py", *arguments, *no_logs])
        with pytest.raises(SystemExit) as exit:
            launch(importlib.import_module(name).main, name, settings_class(name))
    signal.signal(signal.SIGINT, before)
    printed = capsys.readouterr()
    return exit.value.code, printed.out, printed.err
