"""Stages of the user's own: found in a folder of any name, in sweeps too, and one sentence for each mistake."""

import importlib
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import own_stages
import pytest
from launch import CONF

from rag.types import UserError
from tests.run_script import launch_script

RERANKER = """
from dataclasses import dataclass, replace

@dataclass(frozen=True)
class Mine:
    sign: float = 1.0

    def rerank(self, collection, questions, hits):
        scored = [[replace(hit, score=self.sign * len(hit.chunk.text)) for hit in found] for found in hits]
        return [sorted(found, key=lambda hit: -hit.score) for found in scored]
"""
NAMES = ["plain", "with spaces, a comma", 'it\'s "quoted"', "a=b#1", "ünïcode 文"]


def write(folder: Path, **files: str) -> Path:
    """Write files, named with `__` for `/` and `_` for the last dot."""
    for name, text in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def own_reranker(folder: Path, code: str = RERANKER) -> Path:
    return write(folder, mine_py=code, reranker__mine_yaml="_target_: mine.Mine\nsign: 1.0\n")


@pytest.fixture(autouse=True)
def forget_modules(monkeypatch):
    monkeypatch.setattr(sys, "dont_write_bytecode", True)  # an edit within a second, of the same size
    yield
    sys.modules.pop("mine", None)


@pytest.fixture
def evaluate(tmp_path, monkeypatch, capsys):
    """evaluate(*overrides) -> exit code, stdout, stderr of eval.py on the sample, in a folder of its own."""
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    common = ["embedder=bag_of_words", "retriever=bm25", "statistics.resamples=100", "evaluation.probes=1"]
    sample = ["dataset=sample", "dataset.limit=5"]

    def start(*overrides: str):
        sys.modules.pop("mine", None)
        importlib.invalidate_caches()
        data = [] if any(text.startswith("dataset=") for text in overrides) else sample
        sweep = ["-m"] if "-m" in overrides else []  # Hydra takes it before or behind all settings
        settings = [text for text in overrides if text != "-m"]
        return launch_script(monkeypatch, capsys, "eval", *sweep, *common, *data, *settings)

    return start


def figures(folder: Path) -> list[float]:
    """Return the figure of each result below a folder, in the order in which they were made."""
    found = sorted(folder.rglob("metrics.json"), key=lambda path: path.stat().st_mtime_ns)
    return [json.loads(path.read_text())["nDCG@10"] for path in found]


@pytest.mark.parametrize("name", NAMES)
def test_a_folder_of_any_name_is_found_by_a_sweep(evaluate, tmp_path, name):
    folder = own_reranker(tmp_path / name)
    code, out, err = evaluate("-m", f"stages={folder}", "reranker=mine,null", "hydra.sweep.dir=sweep")
    assert code == 0, err
    assert "reranker=mine" in out
    own, none = figures(Path("sweep"))
    assert own != none


def test_the_current_folder_is_used_where_it_has_stages(evaluate, tmp_path, monkeypatch):
    monkeypatch.chdir(own_reranker(tmp_path / "mine"))
    assert evaluate("reranker=mine", "reranker.sign=-1.0")[0] == 0
    code, _, err = evaluate("reranker=mine", "stages=null")
    assert code == 2
    assert "There is no reranker 'mine': choose one of cross_encoder, likelihood" in err


def test_edited_code_is_run_again_and_old_results_are_not(evaluate, tmp_path):
    folder = own_reranker(tmp_path / "mine")
    for code in (RERANKER, RERANKER.replace("self.sign *", "-self.sign *"), RERANKER):
        write(folder, mine_py=code)
        assert evaluate(f"stages={folder}", "reranker=mine")[0] == 0
    first, edited, undone = figures(Path("outputs"))
    assert first == undone != edited


def in_another_process(folder: Path, *overrides: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(CONF.parent / "scripts" / "eval.py"), "dataset=sample", "dataset.limit=5"]
    command += ["embedder=bag_of_words", "retriever=bm25", f"stages={folder}", "reranker=mine", *overrides]
    environment = os.environ | {"RAG_CACHE": str(folder / "cache")}
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)


def test_another_process_finds_the_stages_too(tmp_path):
    folder = own_reranker(tmp_path / "my stages", RERANKER + "\n\nprint('imported')\n")
    done = in_another_process(folder, "plan=true")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported\n")
    assert "retriever=bm25 reranker=mine\n" in done.stdout


@pytest.mark.parametrize(
    ("old", "new", "code", "sentence"),
    [
        (
            "def rerank",
            "def other",
            2,
            r"mine\.Mine in .*mine\.py has no 'rerank': add it \(see docs/extending\.md\)\.$",
        ),
        (
            "self.sign",
            "self.sine",
            1,
            r"mine\.py\", line \d+, in [\s\S]*'Mine' object has no attribute 'sine'",
        ),
    ],
    ids=["a missing method", "a bug of the user's own"],
)
def test_a_missing_method_is_a_sentence_and_a_bug_of_the_users_own_a_traceback(
    tmp_path, old, new, code, sentence
):
    done = in_another_process(own_reranker(tmp_path / "mine", RERANKER.replace(old, new)))
    assert done.returncode == code
    assert re.search(sentence, done.stderr.strip()), done.stderr
    assert ("Traceback" in done.stderr) == (code == 1)


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        ("Mine = 3\n", "is nothing that can be built"),
        ("class Other: pass\n", r"mine\.py has no 'Mine'"),
        ("import no_such_module\n", r"mine\.py, line 1: No module named 'no_such_module'"),
        ("def Mine(:\n", r"SyntaxError in .*mine\.py, line 1"),
        (RERANKER.replace("return [sorted", "[sorted"), r"mine\.py: rerank returned None; it must return 5 lists"),
        (RERANKER.replace("in scored]", "in scored[:1]]"), r"mine\.py: rerank returned .*; it must return 5 lists"),
        (RERANKER.replace("-hit.score", "hit.score"), "with scores that never rise"),
        (RERANKER.replace("(found, key", "([3, 4], key").replace("-hit.score", "0"), "5 lists of hits"),
        (RERANKER.replace("len(hit", "collection.embedder.dim + len(hit"), r'uses the embedder .* \("embedder",\)'),
        (RERANKER.replace("sign: float = 1.0", "depth: int = 3"), "no setting 'reranker.sign'"),
    ],
    ids=[
        *("no class", "another class", "missing import", "syntax", "None", "too few", "rising"),
        *("no hits", "undeclared model", "unknown setting"),
    ],
)  # fmt: skip
def test_a_mistake_in_a_stage_is_one_sentence_that_names_the_file(evaluate, tmp_path, code, sentence):
    exit_code, _, err = evaluate(f"stages={own_reranker(tmp_path / 'mine', code)}", "reranker=mine")
    assert exit_code == 2
    assert len(err.strip().splitlines()) == 1, err
    assert re.search(sentence, err), err
    assert not figures(Path("outputs"))


@pytest.mark.parametrize(
    ("body", "shown"),
    [
        ("pass", "None"),
        ("return [(0, 5), (0, 9)]", "(0, 9)"),
        ("return [(0, 10**6)]", "1000000"),
        ("return [3]", "[3]"),
    ],
)
def test_a_chunker_that_returns_no_spans_is_told(evaluate, tmp_path, body, shown):
    code = f"class Mine:\n    def split(self, text, token_spans, encode=None):\n        {body}\n"
    code = f"from dataclasses import dataclass\n\n@dataclass(frozen=True)\n{code}"
    folder = write(tmp_path / "mine", mine_py=code, chunker__mine_yaml="_target_: mine.Mine\n")
    exit_code, _, err = evaluate(f"stages={folder}", "chunker=mine")
    assert exit_code == 2
    assert f"mine.Mine in {folder}/mine.py: split returned " in err and shown in err


def test_a_function_that_forgets_to_return_is_told(evaluate, tmp_path):
    folder = write(
        tmp_path / "mine", mine_py="def load():\n    3\n", dataset__mine_yaml="_target_: mine.load\n"
    )
    exit_code, _, err = evaluate(f"stages={folder}", "dataset=mine")
    assert exit_code == 2
    assert f"mine.load in {folder}/mine.py: mine.load returned None" in err


def test_a_module_that_is_not_there_is_told(evaluate, tmp_path):
    folder = write(tmp_path / "mine", reranker__mine_yaml="_target_: nowhere_to_be_found.Mine\n")
    code, _, err = evaluate(f"stages={folder}", "reranker=mine")
    assert code == 2
    assert f"No module named 'nowhere_to_be_found' is installed or stands in {folder}" in err


def found(folder: str | Path) -> Path | None:
    return own_stages.folder_in([f"stages={folder}"], CONF)


def test_a_wrong_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere: give one"):
        found(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no stages: put a YAML file .*reranker/mine\.yaml"):
        found(write(tmp_path / "empty", reranks__mine_yaml="_target_: mine.Mine\n"))


def test_files_that_would_never_be_used_are_told(tmp_path):
    ours = write(tmp_path / "a", reranker__mmr_yaml="_target_: mine.Mine\n", mine_py="")
    with pytest.raises(
        UserError, match=r"mmr\.yaml is never used, because this project has reranker=mmr already"
    ):
        found(ours)
    for name in ("json", "numpy", "settings"):
        hidden = write(tmp_path / name, **{"reranker__x_yaml": f"_target_: {name}.Mine\n", f"{name}_py": ""})
        with pytest.raises(
            UserError, match=rf"{name}\.py is never used, because Python finds another module {name}"
        ):
            found(hidden)


def test_in_the_current_folder_such_files_are_only_printed(tmp_path, monkeypatch, capsys):
    folder = write(tmp_path, reranker__mmr_yaml="a: 3\n", prompt__other_yaml="b: 3\n")
    monkeypatch.chdir(folder)
    assert own_stages.folder_in([], CONF) == folder
    [line] = capsys.readouterr().err.splitlines()
    assert line.endswith("mmr.yaml is never used, because this project has reranker=mmr already.")


def test_the_repository_and_its_configuration_are_no_stages_of_a_user(monkeypatch):
    for folder in (CONF.parent, CONF, CONF.parent / "scripts", CONF.parent / "data"):
        monkeypatch.chdir(folder)
        assert own_stages.folder_in([], CONF) is None


def test_the_last_folder_counts_and_null_turns_the_current_one_off(tmp_path, monkeypatch):
    monkeypatch.chdir(own_reranker(tmp_path / "mine"))
    other = own_reranker(tmp_path / "other")
    assert own_stages.folder_in(["reranker=mine"], CONF) == tmp_path / "mine"
    assert own_stages.folder_in(["stages=nowhere", f"stages={other}"], CONF) == other
    assert own_stages.folder_in(["stages=null"], CONF) is None
