"""Building and loading the native library: without a compiler, with a failing one, and damaged."""

import os
import subprocess
import sys

import numpy as np
import pytest

from rag import native
from rag.native import build
from rag.runtime.cache import entries
from tests.damage import WAYS

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")


def test_without_a_compiler_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(build.shutil, "which", lambda name: None)
    assert build.library() is None


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(build, "_FLAGS", ("--no-such-flag",))
    assert build.library() is None
    [log] = tmp_path.rglob("*.log")
    printed = capsys.readouterr().err
    assert f"XLA does its work: {log}" in printed and printed.count("\n") == 1
    assert "no-such-flag" in log.read_text()
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("asked again"))
    assert build.library() is None and capsys.readouterr().err == ""


@pytest.fixture
def built(monkeypatch, tmp_path):
    """Replace the compiler by one that takes no time; return the list of paths that it writes."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(build.shutil, "which", lambda name: "g++")
    monkeypatch.setattr(build, "_version", lambda compiler: "g++ 1.0")
    built = []

    def write(compiler, path, log):
        built.append(path)
        entries.write(path, b"\x7fELF" * 100)

    monkeypatch.setattr(build, "_build", write)
    return built


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_library_is_built_again(built, way, capsys):
    path = build.library()
    assert build.library() == path and built == [path] and capsys.readouterr().err == ""
    WAYS[way](path)
    assert build.library() == path and built == [path, path]
    assert (f"{path} " in capsys.readouterr().err) == (way != "gone")


def test_a_damaged_library_that_cannot_be_built_again_is_not_loaded(built, monkeypatch, capsys):
    path = build.library()
    WAYS["middle"](path)
    monkeypatch.undo()
    monkeypatch.setenv("RAG_CACHE", str(path.parents[1]))
    monkeypatch.setattr(build, "_FLAGS", ("--no-such-flag",))
    monkeypatch.setattr(build, "_version", lambda compiler: "g++ 1.0")
    build._build(build.shutil.which("g++") or "g++", path, path.with_suffix(".log"))
    assert not path.exists()
    assert "XLA does its work" in capsys.readouterr().err


def test_a_folder_that_others_may_write_to_is_refused(built, capsys):
    path = build.library()
    os.chmod(path.parent, 0o777)
    assert unloaded() is None
    printed = capsys.readouterr().err
    assert (
        f"run `chmod -R go-w {path.parent}`" in printed
        and "XLA does its work" in printed
        and printed.count("\n") == 1
    )


def unloaded():
    """Return what a process gets that has not loaded the library yet."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(build, "_WANTED", True)
        patch.setattr(build, "cpu_flags", lambda: ("avx2",))
        return build.load.__wrapped__()


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int Another() { return 0; }", "RagHasTiles"),
        ("bool RagHasTiles() { return true; }", "Rag"),
        (None, ""),
    ],
)
def test_a_library_that_lacks_a_symbol_is_left_alone(monkeypatch, tmp_path, source, reason, capsys):
    path = tmp_path / "library.so"
    if source:
        (tmp_path / "source.cc").write_text(f'extern "C" {{ {source} }}')
        subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "source.cc"), "-o", str(path)], check=True)
    else:
        path.write_text("no library")
    monkeypatch.setattr(build, "library", lambda: path)
    assert unloaded() is None
    printed = capsys.readouterr().err
    assert (
        printed.startswith("The native library cannot be used, so XLA does its work: ") and reason in printed
    )
    assert printed.count("\n") == 1


def test_it_can_be_switched_off():
    code = "from rag import native; raise SystemExit(native.available())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"RAG_NATIVE": "0"}, check=False)
    assert done.returncode == 0


@needs_compiler
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    path = build.library()
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    assert path.is_file() and build.library() == path


@needs_compiler
def test_small_numbers_stay_what_they_are():
    """A library linked with -ffast-math would flush them to zero in the whole process."""
    assert np.float32(1e-45) / np.float32(1) > 0 and np.float64(5e-324) * 1.0 > 0
