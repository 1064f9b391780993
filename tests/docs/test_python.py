"""docs/python.md and docs/python.ipynb hold the same code, which runs from top to bottom."""

import json
from pathlib import Path

import pytest

from tests.docs.documents import ROOT, parse

BLOCKS = [block.text for block in parse(ROOT / "docs" / "python.md")[1] if block.language == "python"]
NOTEBOOK = json.loads((ROOT / "docs" / "python.ipynb").read_text(encoding="utf-8"))
CELLS = ["".join(cell["source"]) for cell in NOTEBOOK["cells"] if cell["cell_type"] == "code"]


@pytest.fixture
def home(tmp_path, monkeypatch) -> Path:
    """A folder with data/, in which the code may write."""
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_notebook_holds_the_code_of_the_page():
    assert (NOTEBOOK["nbformat"], len(CELLS)) == (4, 4)
    assert CELLS == BLOCKS
    assert not any(cell.get("outputs") for cell in NOTEBOOK["cells"])


@pytest.mark.parametrize("code", BLOCKS)
def test_a_step_takes_at_most_ten_lines(code):
    assert len([line for line in code.splitlines() if line.strip()]) <= 10


@pytest.mark.weights
def test_the_notebook_runs_from_top_to_bottom(home, capsys):
    names: dict[str, object] = {}
    for cell in CELLS:
        exec(compile(cell, "python.ipynb", "exec"), names)
    printed = capsys.readouterr().out.splitlines()
    assert printed[0].startswith("34 documents, ")
    assert (home / "index" / "manifest.json").is_file()
    assert names["result"].answer and len(names["result"].sources) == 3
    assert 0.8 < ndcg(printed) < 1


def test_an_evaluation_needs_no_weights_and_no_language_model(home, capsys):
    exec(compile(CELLS[-1], "python.ipynb", "exec"), {})
    assert 0.8 < ndcg(capsys.readouterr().out.splitlines()) < 1


def ndcg(lines: list[str]) -> float:
    [value] = [line.removeprefix("nDCG@10 ") for line in lines if line.startswith("nDCG@10 ")]
    return float(value)
