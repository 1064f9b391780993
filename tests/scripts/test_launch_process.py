"""A script in a process of its own: signals, pipes, stdout, the profiler."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator

import pytest
from launch import CONF

from tests.scripts.launch_settings import SPECIAL

SCRIPT = """
import json, logging, sys, time
from pathlib import Path
sys.path[:0] = {paths}
from launch import launch
from tests.scripts.launch_settings import Settings

def main(config):
    import jax.numpy as jnp
    logging.getLogger("stage").info("a log line")
    if config.n == 9:
        print("ready", flush=True)
        time.sleep(60)
    for _ in range(config.n * 1000 if config.n > 99 else 1):
        print(json.dumps(dict(question=config.question, sum=float(jnp.ones(3).sum()))))

if __name__ == "__main__":
    launch(main, "tiny", Settings, config_dir=Path(__file__).parent / "conf")
"""


@pytest.fixture
def command(conf, tmp_path, monkeypatch) -> Iterator[list[str]]:
    root = CONF.parent
    (tmp_path / "tiny.py").write_text(SCRIPT.format(paths=[str(root), str(root / "scripts")]))
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    # A shell's background jobs ignore Ctrl-C, and so would the scripts that they start.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield [sys.executable, str(tmp_path / "tiny.py")]
    signal.signal(signal.SIGINT, before)


def test_stdout_holds_the_result_and_nothing_else(command, tmp_path):
    done = subprocess.run(
        [*command, f"question={SPECIAL[0]}", "profile=true"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == {"question": SPECIAL[0], "sum": 3.0}
    assert "a log line" in done.stderr
    assert "JAX trace:" in done.stderr
    [folder] = (tmp_path / "elsewhere" / "outputs" / "tiny").iterdir()
    assert "a log line" in (folder / "tiny.log").read_text()
    assert list((folder / "profile").rglob("*.xplane.pb"))
    assert list((tmp_path / "cache" / "xla").glob("*/*"))


def test_ctrl_c_ends_cleanly(command):
    with subprocess.Popen(
        [*command, "n=9"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.splitlines()[-1] == "Interrupted."
    assert "Traceback" not in err


def test_ctrl_c_ends_an_import_that_would_swallow_it(command, tmp_path):
    (tmp_path / "swallower.py").write_text(
        "import signal\ntry: signal.raise_signal(signal.SIGINT)\nexcept KeyboardInterrupt: pass\n"
    )
    script = tmp_path / "tiny.py"
    script.write_text(script.read_text().replace("jax.numpy as jnp", "swallower"))
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "\nInterrupted.\n")


def test_a_reader_that_leaves_is_no_error(command):
    with subprocess.Popen(
        [*command, "n=100"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert json.loads(process.stdout.readline())["sum"] == 3.0
        process.stdout.close()
        err = process.stderr.read()
    assert process.returncode == 141
    assert "Traceback" not in err
    assert "BrokenPipe" not in err


def test_a_mistake_costs_no_jax(tmp_path):
    command = [sys.executable, str(CONF.parent / "scripts" / "generate.py"), "generator=medium"]
    environment = os.environ | {"PYTHONPATH": str(CONF.parent), "PYTHONPROFILEIMPORTTIME": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    assert done.returncode == 2
    assert done.stdout == ""
    assert "no generator 'medium'" in done.stderr.splitlines()[-1]
    assert not any(line.endswith(("| jax", "| flax")) for line in done.stderr.splitlines())
