"""scripts/report.py: its settings, and where it writes."""

from pathlib import Path

import hydra
import pytest
import report as script
from launch import CONF
from quoting import quote

from rag.report import compose
from rag.report.page import Heading
from rag.types import UserError
from tests.report.result_folders import fail, save


def run_script(*overrides: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        script.main(hydra.compose("report", list(overrides)))


def test_the_script_writes_beside_the_runs(tmp_path, capsys):
    folder = tmp_path / "runs = one, two"
    save(folder / "a", "r=a", {"MAP": {"1": 0.5, "2": 0.6}})
    fail(folder / "b", "r=b", "No luck.")
    run_script(f"runs={quote(str(folder))}")
    out = capsys.readouterr().out
    assert "failed: r=b: No luck." in out
    assert f"1 finished evaluation, 1 failed -> {folder}/report.html" in out
    assert "0.5500" in (folder / "report.md").read_text()


def test_the_script_takes_a_list_of_files_and_an_output(tmp_path):
    first, second = (save(tmp_path / name, f"r={name}", {"MAP": {"1": 0.5, "2": 0.6}}) for name in "ab")
    run_script(
        f"runs=[{first},{second / 'per_query.jsonl'}]", f"output={tmp_path}/out", "baseline=b", "measure=MAP"
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **baseline** |" in text
    assert "the baseline, b," in text.replace("The difference is to ", "")


@pytest.mark.parametrize("name", ["a = b, c", "[x", "[x, y]", "it's", " "])
def test_runs_may_be_any_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(Path(name), "r=a", {"MAP": {"1": 0.5}})
    assert script.locations(name) == [Path(name)]


def test_runs_may_be_a_list_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.locations("[a/b=1, 'c, d', 007]") == [Path("a/b=1"), Path("c, d"), Path("007")]
    for wrong in ("[a", "[]", ""):
        with pytest.raises(UserError, match="runs"):
            script.locations(wrong)


def test_an_output_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/report\.md .*: choose output=DIR\."):
        compose.write(tmp_path / "file", [Heading(1, "x")])
