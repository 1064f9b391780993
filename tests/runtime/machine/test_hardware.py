"""The environment record, and the facts about this machine in it."""

import json
import os
import pathlib
import subprocess

import jax
import pytest

from rag.runtime.machine import hardware
from rag.runtime.machine.hardware import environment


def test_environment_says_what_ran_on_what():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"].keys() == {"jax", "jaxlib", "flax", "numpy"}
    assert record["device"] == jax.devices()[0].device_kind
    assert record["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert record["cores"] == hardware.cores() >= 1
    assert record["peak_memory_bytes"] > 10_000_000
    assert record["cpu_flags"] == sorted(set(record["cpu_flags"]))
    assert {"commit", "dirty", "python", "cpu", "load_average", "date"} <= record.keys()


def test_the_commit_is_this_checkouts():
    root = pathlib.Path(hardware.__file__).parents[3]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    if not (root / ".git").exists() or subprocess.run(command, capture_output=True).returncode:
        assert environment()["commit"] is None
    else:
        assert (
            environment()["commit"] == subprocess.run(command, capture_output=True, text=True).stdout.strip()
        )
        assert environment()["dirty"] in (True, False)


def test_an_installed_copy_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        hardware, "__file__", str(tmp_path / "site-packages" / "rag" / "runtime" / "machine" / "hardware.py")
    )
    assert hardware._revision() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    ("cpuinfo", "name", "flags"),
    [
        (
            "model name\t: Xeon\nflags\t\t: fpu sse4_2 avx2 avx512f fma ht\n",
            "Xeon",
            ["avx2", "avx512f", "fma", "sse4_2"],
        ),
        ("processor : 0\nFeatures : fp asimd i8mm crc32\n", None, ["asimd", "i8mm"]),
    ],
)
def test_cpu_flags_of_x86_and_arm(monkeypatch, cpuinfo, name, flags):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: cpuinfo)
    assert hardware._cpu() == (name or hardware.platform.machine(), tuple(flags))


def test_cpu_without_proc(monkeypatch):
    def no_proc(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(pathlib.Path, "read_text", no_proc)
    monkeypatch.setattr(
        hardware, "_output", lambda *command: {3: "Apple M4", 4: "AVX1.0 FMA"}.get(len(command))
    )
    assert hardware._cpu() == ("Apple M4", ("avx1.0", "fma"))
    monkeypatch.setattr(hardware, "_output", lambda *command: None)
    assert hardware._cpu() == (hardware.platform.machine(), ())


def test_a_missing_or_failing_command_gives_none():
    assert hardware._output("a-command-that-is-not-there") is None
    assert hardware._output("false") is None
    assert hardware._output("echo", "x") == "x"
