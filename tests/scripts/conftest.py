"""A tiny configuration and a function that launches a script with it; a small folder in which scripts run."""

import signal
import sys
from pathlib import Path

import ingest
import launch as launch_module
import pytest
from launch import CONF, launch
from omegaconf import OmegaConf

from tests.run_script import run_script
from tests.scripts.commands import FILES, INDEX
from tests.scripts.launch_settings import Settings
from tests.tiny_models import write_decoder


@pytest.fixture
def conf(tmp_path) -> Path:
    """A configuration like those of conf/, with the real shared.yaml."""
    folder = tmp_path / "conf"
    (folder / "stage").mkdir(parents=True)
    (folder / "shared.yaml").write_text((CONF / "shared.yaml").read_text())
    (folder / "tiny.yaml").write_text(
        "defaults: [shared, {stage: small}, _self_]\n"
        "question: null\nn: 3\nindex:\n  path: here\ncorpus:\n  path: there\nlogged: false\n"
    )
    (folder / "stage" / "small.yaml").write_text(
        "_target_: tests.scripts.launch_settings.Stage\nsize: 128\nratio: 0.5\n"
    )
    (folder / "stage" / "large.yaml").write_text(
        "_target_: tests.scripts.launch_settings.Stage\nsize: 512\ninner: null\n"
    )
    (folder / "must.yaml").write_text(
        "defaults: [shared, _self_]\nindex:\n  path: ???\ncorpus:\n  path: ???\n"
    )
    return folder


@pytest.fixture
def run(conf, tmp_path, monkeypatch, capsys):
    """Launch in this process and return (exit code, the configs that main saw, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    monkeypatch.setenv("RAG_RUN", "")
    monkeypatch.setattr(launch_module, "enable_compilation_cache", lambda: None)

    def start(*arguments, name="tiny", main=None):
        seen = []
        signal.signal(signal.SIGINT, signal.default_int_handler)  # launch ends with the system's own
        monkeypatch.setattr(
            sys, "argv", ["tiny.py", *arguments, "hydra/job_logging=none", "hydra/hydra_logging=none"]
        )
        with pytest.raises(SystemExit) as exit:
            launch(
                main or (lambda config: seen.append(OmegaConf.to_container(config, resolve=True))),
                name,
                Settings,
                config_dir=conf,
            )
        return exit.value.code, seen, capsys.readouterr().err

    before = signal.getsignal(signal.SIGINT)
    yield start
    signal.signal(signal.SIGINT, before)


# --- a small folder, in which the mains of scripts run


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with documents, an index of them, and a tiny decoder."""
    home = tmp_path_factory.mktemp("home")
    (home / "documents").mkdir()
    (home / "decoder").mkdir()
    for name, text in FILES.items():
        (home / "documents" / name).write_text(text)
    write_decoder(home / "decoder")
    return home


@pytest.fixture
def run_main(home, monkeypatch, capsys):
    """run(script, *overrides) -> stdout, stderr. What launch adds has its own tests (test_launch.py)."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("RAG_CACHE", str(home / "cache"))

    def run_main(script, *overrides):
        run_script(script, *overrides)
        return capsys.readouterr()

    return run_main


@pytest.fixture
def index(home, run_main):
    if not (home / "index").exists():
        out, _ = run_main(ingest, "corpus.path=documents", *INDEX)
        assert "2 documents, 2 chunks" in out
        assert "1 skipped: 1 png; corpus.list_skipped=true lists them" in out
    return home / "index"
