"""What scripts share: one sentence for each mistake, device, run folders."""

import re
import sys
from pathlib import Path

import explain
import launch as launch_module
import pytest
from launch import CONF

from rag.types import UserError


def test_null_is_no_choice_of_a_group(run):
    code, [config], _ = run("stage=null")
    assert code == 0 and "stage" not in config
    code, seen, _ = run("-m", "stage=small,null")
    assert code == 0
    assert [config.get("stage", {}).get("size") for config in seen] == [128, None]
    asked = []
    run("stage=null", "n=1", main=lambda config: asked.extend(launch_module.overrides()))
    assert asked == ["stage=null", "n=1"]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_sweep_is_asked_for_anywhere_among_the_settings(run, flag):
    for arguments in (
        [flag, "n=1,2", "stage=small"],
        ["n=1,2", flag, "stage=small"],
        ["n=1,2", "stage=small", flag],
    ):
        code, seen, err = run(*arguments)
        assert code == 0, err
        assert [(config["n"], config["stage"]["size"]) for config in seen] == [(1, 128), (2, 128)]


@pytest.mark.parametrize("value", ["3", "true", "[small,3]", "{a:1}", "1.5"])
def test_a_choice_that_is_no_name_is_one_sentence(run, value):
    code, seen, err = run(f"stage={value}")
    assert (code, seen, len(err.splitlines())) == (2, [], 1)
    assert "is not valid: it must be one of large, small." in err


def test_settings_of_any_wrong_kind_are_reported_before_main(run):
    for wrong in ("n=abc", "n=1.5", "n=null", "n=true", "index=3", "logged=yes", "stage.size=[1]", "+m=3"):
        code, seen, err = run(wrong)
        assert (code, seen, len(err.splitlines())) == (2, [], 1), wrong
    assert "There is no setting 'm': " in err
    code, seen, err = run("-m", "n=1,abc,2")
    assert code == 2 and [config["n"] for config in seen] == [1, 2]
    assert "n=abc is not valid" in err


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stage.siz=1"], r"no setting 'stage\.siz': did you mean stage\.size"),
        (["stge=large"], r"no setting 'stge': did you mean stages? or stages?\?"),
        (["zzz=1"], r"no setting 'zzz': there are corpus\.path, .*stage\.size"),
        (["indx.path=a b"], r"no setting 'indx\.path': did you mean index\.path"),
        (["stage=large", "stage.innr=1"], r"did you mean stage\.inner"),
        (["stage.siz=1", "stage.rato=1"], r"no setting 'stage\.siz'"),
        (["stage=medium"], r"no stage 'medium': choose one of large, small"),
        (["n=[1"], r"Cannot read the setting n=\[1"),
        (["n=1,2"], "--multirun"),
        (["n=${nowhere}"], "Cannot read the setting n: .*nowhere"),
        (["+n=4"], "already at 'n'"),
        (["device=tpu"], "device=tpu is not valid: it must be auto, cpu or gpu"),
        (["profile=no"], "profile=no is not valid: it must be true or false"),
        (["--config-name=nowhere"], "nowhere"),
    ],
)
def test_a_mistake_is_one_sentence(run, arguments, sentence):
    code, seen, err = run(*arguments)
    assert code == 2
    assert seen == []
    assert len(err.splitlines()) == 1
    assert re.search(sentence, err), err


# Where the old names of settings were typed: their first words, the script, and its choices.
OLD_NAMES = [
    ("run.path", "eval", ["retriever=run"]),
    ("reading", "eval", []),
    ("certificate", "sensitivity", []),
    ("generator.", "generate", []),
    ("embedder.", "ingest", []),
    ("fusion.", "eval", ["fusion=dbsf"]),
    ("bench.drafting", "bench", ["bench=pipeline"]),
    ("bench.reading", "bench", ["bench=quality"]),
    ("bench.", "bench", ["bench=question_answering"]),
]


@pytest.mark.parametrize("old", [*explain.RENAMED, "reading.k", "bench.reading.path"])
def test_an_old_name_of_a_setting_is_answered_with_the_new_one(old, monkeypatch):
    script, choices = next(place for start, *place in OLD_NAMES if old.startswith(start))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *choices, f"{old}=1"])
    new = {**explain.RENAMED, "reading.k": "ablation.k", "bench.reading.path": "bench.questions.path"}
    sentence = explain.unknown_key(old, script, CONF)
    assert sentence == f"The setting {old!r} is called {new[old]!r} now."


def test_a_setting_that_another_benchmark_has_renamed_is_only_unknown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "bench=attention", "bench.k=1"])
    assert "There is no setting 'bench.k': " in explain.unknown_key("bench.k", "bench", CONF)


def test_a_folder_that_cannot_be_made_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, seen, err = run(f"hydra.run.dir={tmp_path}/file/run")
    assert (code, seen) == (2, [])
    assert "file/run (Not a directory): choose the run's folder with hydra.run.dir=DIR" in err


def test_all_that_is_missing_is_named_at_once(run):
    code, _, err = run(name="must")
    assert (code, err) == (2, "Please say which: corpus.path=... index.path=...\n")


def test_a_users_error_is_reported_and_a_bug_keeps_its_traceback(run):
    def fail(error):
        def main(config):
            raise error

        return main

    assert run(main=fail(UserError("no such folder: x"))) == (2, [], "no such folder: x\n")
    with pytest.raises(ZeroDivisionError) as caught:
        run(main=fail(ZeroDivisionError()))
    assert caught.traceback[-1].name == "main"
    assert run(main=fail(KeyboardInterrupt()))[0] == 130


def test_a_bug_that_looks_like_a_config_error_is_still_a_bug(run):
    with pytest.raises(Exception, match="nonsense"):
        run(main=lambda config: config.nonsense)


def test_runs_and_jobs_have_folders_of_their_own(run, tmp_path):
    folders = []
    for _ in range(2):
        run("-m", "n=1,2", main=lambda config: folders.append(launch_module.run_dir()))
    run(main=lambda config: folders.append(launch_module.run_dir()))
    assert len(set(folders)) == 5
    assert all(folder.is_relative_to(tmp_path / "outputs") and folder.is_dir() for folder in folders)
    assert Path.cwd() == tmp_path
    run("hydra.run.dir=chosen", main=lambda config: folders.append(launch_module.run_dir()))
    assert folders[-1] == tmp_path / "chosen"


def test_device_cpu_is_what_jax_runs_on(run):
    import jax

    if jax.default_backend() != "cpu":
        pytest.skip("JAX already runs on something else in this process")
    assert run("device=cpu")[0] == 0
    code, _, err = run("device=gpu")
    assert code == 2
    assert "device=gpu, but JAX runs on cpu" in err
