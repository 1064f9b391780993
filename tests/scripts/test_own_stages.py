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
CHUNKER = """
from dataclasses import dataclass

import numpy as np

@dataclass(frozen=True)
class Mine:
    def split(self, text, token_spans, encode=None):
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
        return launch_script(monkeypatch, capsys, "eval", *common, *data, *overrides)

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
        (RERANKER.replace("-hit.score", "hit.score"), "with finite scores that never rise"),
        (RERANKER.replace("(found, key", "([3, 4], key").replace("-hit.score", "0"), "5 lists of hits"),
        (RERANKER.replace("len(hit", "collection.embedder.dim + len(hit"), r'uses the embedder .* \("embedder",\)'),
        (RERANKER.replace("@dataclass(frozen=True)", "").replace("self.sign", "1.0"), "setting 'reranker.sign'"),
        (RERANKER.replace("frozen=True", ""), r"mine\.Mine in .*mine\.py is no frozen dataclass"),
        (RERANKER.replace("sign: float", "depends_on = ('embeder',)\n    sign: float"), r"mine\.py has depends_on = "),
        (RERANKER.replace("sign: float = 1.0", "depth: int = 3"), "no setting 'reranker.sign'"),
    ],
    ids=[
        *("no class", "another class", "missing import", "syntax", "None", "too few", "rising"),
        *("no hits", "undeclared model", "no dataclass", "not frozen", "misspelt", "unknown setting"),
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
        ("return [(0.0, 5.0)]", "[(0.0, 5.0)]"),
        ("return [('a', 'b')]", "[('a', 'b')]"),
    ],
)
def test_a_chunker_that_returns_no_spans_is_reported(evaluate, tmp_path, body, shown):
    folder = write(
        tmp_path / "mine", mine_py=f"{CHUNKER}        {body}\n", chunker__mine_yaml="_target_: mine.Mine\n"
    )
    exit_code, _, err = evaluate(f"stages={folder}", "chunker=mine")
    assert exit_code == 2
    assert f"mine.Mine in {folder}/mine.py: split returned " in err and shown in err


def test_spans_of_numpy_are_spans(evaluate, tmp_path):
    code = CHUNKER + "        return [(np.int64(0), np.int64(len(text.rstrip())))]\n"
    folder = write(tmp_path / "mine", mine_py=code, chunker__mine_yaml="_target_: mine.Mine\n")
    exit_code, _, err = evaluate(f"stages={folder}", "chunker=mine")
    assert exit_code == 0, err


@pytest.mark.parametrize(("body", "shown"), [("3", "None"), ("return [3]", "[3]; it must return a Dataset")])
def test_a_function_that_returns_no_dataset_is_reported(evaluate, tmp_path, body, shown):
    code = f"def load():\n    {body}\n"
    folder = write(tmp_path / "mine", mine_py=code, dataset__mine_yaml="_target_: mine.load\n")
    exit_code, _, err = evaluate(f"stages={folder}", "dataset=mine")
    assert exit_code == 2
    assert f"mine.load in {folder}/mine.py: mine.load returned {shown}" in err


@pytest.mark.parametrize("wrong", ["reranker=3", "reranker=plain"])
def test_a_wrong_choice_names_the_users_own_choices_too(evaluate, tmp_path, wrong):
    code, _, err = evaluate(f"stages={own_reranker(tmp_path / 'mine')}", wrong)
    assert code == 2
    assert "one of cross_encoder, likelihood, maxsim, mine, mmr" in err


def test_a_module_that_is_not_there_is_reported(evaluate, tmp_path):
    folder = write(tmp_path / "mine", reranker__mine_yaml="_target_: nowhere_to_be_found.Mine\n")
    code, _, err = evaluate(f"stages={folder}", "reranker=mine")
    assert code == 2
    assert f"No module named 'nowhere_to_be_found' is installed or in {folder}" in err


def found(folder: str | Path) -> Path | None:
    return own_stages.folder_in([f"stages={folder}"], CONF)


def test_a_wrong_folder_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere: give one"):
        found(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"has no stages: put a YAML file .*reranker/mine\.yaml"):
        found(write(tmp_path / "empty", reranks__mine_yaml="_target_: mine.Mine\n"))


BROKEN = {
    "a: 1\na: 2\n": r"mine\.yaml, line 2 is not YAML \(found duplicate key a\): correct it",
    "a:\n\tb: 1\n": r"mine\.yaml, line 2 is not YAML \(found character",
    "foo: [": r"mine\.yaml, line 1 is not YAML \(expected the node content",
    "\udcff\udcfe": r"mine\.yaml is not YAML \(.*codec can't decode",
    "a: \x01": r"mine\.yaml is not YAML \(unacceptable character",
    "3": r"mine\.yaml has no settings: correct it",
}


@pytest.mark.parametrize("text", BROKEN)
def test_a_broken_file_is_one_sentence(tmp_path, monkeypatch, capsys, text):
    file = own_reranker(tmp_path / "mine") / "reranker" / "mine.yaml"
    file.write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(UserError, match=BROKEN[text]):
        found(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for choice in ("reranker=mine", "reranker=mmr,mine", "+reranker=mine"):
        with pytest.raises(UserError, match=BROKEN[text]):
            own_stages.folder_in([choice], CONF)
    assert own_stages.folder_in(["reranker=mmr"], CONF) == tmp_path / "mine"  # it may be of another project
    assert len(capsys.readouterr().err.splitlines()) == 1


def test_only_files_are_choices(tmp_path):
    (tmp_path / "a" / "reranker" / "mine.yaml").mkdir(parents=True)
    (tmp_path / "a" / "reranker" / "loop.yaml").symlink_to("loop.yaml")
    with pytest.raises(UserError, match="has no stages: put a YAML file"):
        found(tmp_path / "a")


@pytest.mark.parametrize("sweep", ["a,b", "choice(a,b)", "[a,b]"])
def test_the_folder_cannot_be_swept(sweep):
    with pytest.raises(UserError, match=re.escape(f"stages={sweep} cannot be swept: give one folder")):
        own_stages.folder_in(["-m", f"stages={sweep}"], CONF)


def test_a_module_that_ends_the_program_is_a_mistake(evaluate, tmp_path):
    folder = own_reranker(tmp_path / "mine", RERANKER + "\nimport sys\nsys.exit(0)\n")
    code, _, err = evaluate(f"stages={folder}", "reranker=mine")
    assert code == 2
    assert f"{folder}/mine.py, line 13, ended the program with exit code 0: take that out.\n" == err
    code, _, err = evaluate("-m", f"stages={folder}", "reranker=mine,null", "hydra.sweep.dir=sweep")
    assert code == 2
    assert "line 13, ended the program with exit code 0" in err
    assert len(figures(Path("sweep"))) == 1
    folder = own_reranker(tmp_path / "mine", RERANKER.replace("scored = ", "raise SystemExit; scored = "))
    code, _, err = evaluate(f"stages={folder}", "reranker=mine")
    assert code == 2 and "mine.py, line 9, ended the program" in err


def test_files_that_would_never_be_used_are_reported(tmp_path):
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
