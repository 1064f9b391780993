"""The stages of docs/extending.md: taken from the page into a folder, and run as a user runs them."""

import importlib
import re
import shlex
import sys
from pathlib import Path

import pytest

from tests.docs.documents import ROOT, parse
from tests.run_script import launch_script

PAGE = ROOT / "docs" / "extending.md"
BLOCKS = parse(PAGE)[1]
FILES = {
    match[1]: block
    for block in BLOCKS
    if block.language in ("python", "yaml") and (match := re.match(r"# (\S+)\n", block.text))
}
COMMANDS = list(
    dict.fromkeys(
        line
        for block in BLOCKS
        if block.language == "bash"
        for line in re.sub(r"\\\n\s*", " ", block.text).splitlines()
    )
)
FOODS = {"seal": "fish", "whale": "krill", "gull": "all that it finds"}
# What a command must print, and the settings with which the same command prints something else.
PRINTS = {
    "reranker=coverage": ("nDCG@10", "reranker.min_length=100"),
    "chunker=paragraphs": ("nDCG@10", "chunker=whole"),
    "dataset=faq": ("faq: 3", "dataset.limit=2"),
    "retriever=trigrams": ("nDCG@10", "retriever=bm25"),
    "scripts/ingest.py": ("documents, ", "chunker=whole"),
    "prompt=letter": ("The letter asks: What is a glider?", "prompt=short"),
    "generator=echo": ("Question: What is a glider?", "generator.words=4"),
    "metric=patience": ("patience", "metric.skips=1"),
}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A folder with the files of the page, a CSV file, and documents."""
    folder = tmp_path_factory.mktemp("a user's folder")
    for name, block in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(block.text)
    rows = "".join(f"What does a {name} eat?,A {name} eats {food}.\n" for name, food in FOODS.items())
    (folder / "faq.csv").write_text("question,answer\n" + rows)
    (folder / "documents").mkdir()
    (folder / "documents" / "gliders.txt").write_text("A glider is a boat without a motor. " * 5)
    return folder


@pytest.fixture
def run(home, tmp_path_factory, monkeypatch, capsys):
    """Run a command of the page in this process; return what it prints."""
    monkeypatch.chdir(home)
    monkeypatch.setenv("RAG_CACHE", str(tmp_path_factory.getbasetemp() / "cache of own stages"))
    modules = set(sys.modules)

    def start(command: str) -> str:
        python, script, *arguments = shlex.split(command)
        name = Path(script).stem
        assert (python, script) == ("python", f"scripts/{name}.py")
        if "index.path=index" in arguments and name != "ingest" and not (home / "index").exists():
            start(next(other for other in COMMANDS if "scripts/ingest.py" in other))
        code, out, err = launch_script(monkeypatch, capsys, name, *arguments)
        assert code == 0, err
        return out

    yield start
    for name in set(sys.modules) - modules:
        if Path(getattr(sys.modules[name], "__file__", None) or "/").is_relative_to(home):
            del sys.modules[name]


def test_the_page_has_each_kind_of_stage_and_a_command_for_each():
    groups = {Path(name).parent.name for name in FILES if name.endswith(".yaml")}
    assert groups == {
        *("reranker", "chunker", "dataset", "retriever", "embedder", "generator", "prompt", "metric"),
    }
    for name, block in FILES.items():
        if name.endswith(".yaml"):
            assert any(f"{Path(name).parent.name}={Path(name).stem}" in command for command in COMMANDS)
            module = re.search(r"_target_: (\w+)\.\w+\n?", block.text)[1]
            assert module == "rag" or f"my_stages/{module}.py" in FILES


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith(".py")])
def test_an_example_has_at_most_25_lines_of_code(name):
    text = re.sub(r'"""[^"]*"""', "", FILES[name].text)
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    assert 1 < len(lines) <= 25


def test_a_table_of_questions_is_read_as_a_spreadsheet_writes_it(home, monkeypatch):
    monkeypatch.syspath_prepend(str(home / "my_stages"))
    text = 'question,answer\r\nWhat does a seal eat?,"Fish,\nand krill."\r\n'
    (home / "sheet.csv").write_text(text, encoding="utf-8-sig", newline="")
    dataset = importlib.import_module("faq").load_faq(str(home / "sheet.csv"))
    assert [document.text for document in dataset.corpus] == ["Fish,\nand krill."]
    sys.modules.pop("faq")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_of_the_page_runs_with_the_stage_of_the_page(run, command):
    wanted, other = next(value for key, value in PRINTS.items() if key in command)
    printed = run(command)
    assert wanted in printed
    key = other.partition("=")[0]
    words = [word for word in shlex.split(command) if not word.startswith(f"{key}=")]
    assert figures(run(shlex.join([*words, other]))) != figures(printed)


def figures(printed: str) -> list[str]:
    """Return the lines without the name of the run, its folder and its times."""
    lines = [line for line in printed.splitlines() if "=" not in line and "outputs" not in line]
    return [re.sub(r"\d+\.\d+ s|\d+ tokens/s", "", line) for line in lines]
