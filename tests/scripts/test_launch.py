"""What scripts share: free text as typed, one sentence for mistakes, device, profile, run folders."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import launch as launch_module
import pytest
from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra_plugins.patient_sweeper import combinations
from hypothesis import given
from hypothesis import strategies as st
from launch import CONF, launch, quote_overrides
from omegaconf import OmegaConf
from quoting import quote
from settings import build

from rag.types import UserError
from tests.scripts.launch_settings import Settings, Stage

SPECIAL = [
    'What\'s attention, (really)? [yes=no] #1 "x" \U0001f916',
    "",
    " ",
    "  both ends  ",
    "null",
    "true",
    "123",
    "1e3",
    "???",
    "????",
    "${index.path}",
    "\\${index.path}",
    "\\\\${oc.env:HOME}",
    "a $ b ${ c } $} {$",
    "${???}",
    "'",
    '"',
    "\\'",
    "\\\\'",
    '\\"',
    "\\",
    "\\\\",
    "ends with \\",
    "'quoted'",
    '"quoted"',
    "line one\nline two\r\n\ttab",
    "a=b,c=d",
    "choice(a, b)",
    "range(1,3)",
    "[1,2]",
    "{a: 1}",
    "-m",
    "--multirun",
    "~x",
    "%s %(now)s {0}",
    "caf\u00e9 \u6ce8\u610f \u202etfel",
    "\udcff not UTF-8",
    "/path with spaces/and#sha256=0a",
    "pypi:name==1.2/file.gguf#sha256=0a",
]
# Characters that mean something to one of the grammars, often side by side.
TEXT = st.text(st.sampled_from("\\\\\\'\"${}$ab?,=[]() \n:\U0001f916")) | st.text(
    st.characters(exclude_characters="\0")
)


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


def through_hydra(text: str) -> object:
    """What a config holds after an override with the quoted text: Hydra's parser, OmegaConf's resolution."""
    override = OverridesParser.create().parse_override(f"question={quote(text)}")
    config = OmegaConf.create({"question": None, "overrides": [override.input_line]})  # Hydra keeps them too
    OmegaConf.update(config, "question", override.value(), merge=True)
    assert not OmegaConf.is_missing(config, "question")
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["question"]


@pytest.mark.parametrize("text", SPECIAL)
def test_special_text_arrives_as_typed(text):
    assert through_hydra(text) == text


@given(TEXT)
def test_any_text_arrives_as_typed(text):
    assert through_hydra(text) == text


@given(TEXT)
def test_a_sweep_passes_text_on_as_it_is(text):
    """The sweeper writes each job's overrides anew; a comma in the text must not split it."""
    override = OverridesParser.create().parse_override(f"question={quote(text)}")
    assert not override.is_sweep_override()
    [[job]] = combinations([override])
    assert OverridesParser.create().parse_override(job).value() == override.value()


def test_only_free_text_is_quoted():
    others = [
        "stage=large", "n=1,2", "chunker.size=128", "questions=[a,b]", "~question", "-m",
        "--cfg", "job", "pathx=1", "model=a,b",
    ]  # fmt: skip
    assert quote_overrides(others) == others
    assert quote_overrides(["question=a, b"]) == ["question='a, b'"]
    assert quote_overrides(["++question=x y", "+index.path=a=b"]) == ["++question='x y'", "+index.path='a=b'"]
    assert quote_overrides(["note=a b"], free_text=("note",)) == ["note='a b'"]


def test_a_sweep_over_paths_is_written_as_a_choice():
    assert quote_overrides(["-m", "index.path=choice(a,b)"]) == ["-m", "index.path=choice(a,b)"]
    assert quote_overrides(["index.path=choice(a,b)"]) == ["index.path='choice(a,b)'"]
    assert quote_overrides(["-m", "index.path=a,b"]) == ["-m", "index.path='a,b'"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (r'["\n\n"]', ["\n\n"]),  # in single quotes in a shell ...
        (r"[\n\n]", ["\n\n"]),  # ... and without any, which takes the double ones away
        (r"['\n',aaa, b]", ["\n", "aaa", "b"]),
        (r'["\\n"]', [r"\n"]),  # a backslash is two
        (r'["\\"]', ["\\"]),
        (r'["a\"b\tc"]', ['a"b\tc']),
        (r'["\d"]', [r"\d"]),
        ('["\n"]', ["\n"]),
        ("[]", []),
        (r'["a, b","[x]\n"]', ["a, b", "[x]\n"]),
        ("null", None),
    ],
)
@pytest.mark.parametrize("key", ["answer.stop", "bench.stop", "transform.stop", "chunker.separators"])
def test_escapes_in_lists_of_texts_mean_what_they_mean_in_yaml(key, typed, meant):
    [override] = quote_overrides([f"{key}={typed}"])
    assert OverridesParser.create().parse_override(override).value() == meant


@pytest.mark.parametrize(
    "key", ["prompt.user", "prompt.separator", "retriever.system", "reranker.prompt", "embedder.query_prompt"]
)
def test_escapes_in_templates_mean_what_they_mean_in_yaml(key):
    def value(text):
        return OverridesParser.create().parse_override(quote_overrides([f"{key}={text}"])[0]).value()

    assert value(r"Passages:\n\n{context}, [a]\t\\n \d") == "Passages:\n\n{context}, [a]\t\\n \\d"
    assert value("null") is None
    assert value("'null'") == "'null'"


@given(st.lists(TEXT))
def test_every_list_of_texts_can_be_typed(texts):
    """As YAML writes it: a backslash and the quotation mark behind a backslash, a line break as one."""
    escaped = [text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") for text in texts]
    [override] = quote_overrides(["answer.stop=[" + ",".join(f'"{text}"' for text in escaped) + "]"])
    assert resolved(override) == texts


def resolved(override: str) -> object:
    """What becomes of a list in a configuration that has a k to lead to."""
    value = OverridesParser.create().parse_override(override).value()
    config = OmegaConf.create({"k": 3, "stop": ["x"], "answer": {"stop": value}})
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)["answer"]["stop"]


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ('["${k}"]', ["${k}"]),
        (r'["${k}\n"]', ["${k}\n"]),
        ("['${k}',b]", ["${k}", "b"]),
        ("[${k}]", ["${k}"]),
        (r"[${k}\n]", ["${k}\n"]),
        (r'["\\${k}"]', ["\\${k}"]),
        ('["???"]', ["???"]),
        ("[???]", ["???"]),
        ("${stop}", ["x"]),  # in place of a list
        ("[3,null,true]", [3, None, True]),  # are refused later
    ],
)
def test_texts_in_a_list_lead_nowhere_with_a_backslash_or_without(typed, meant):
    assert resolved(quote_overrides([f"answer.stop={typed}"])[0]) == meant


def test_a_sweep_over_lists_of_texts_keeps_its_commas():
    sweep = quote_overrides(["-m", r'answer.stop=["\n"],[a,"\t"]'])
    parsed = OverridesParser.create().parse_overrides(sweep[1:])
    jobs = combinations(parsed)
    assert [OverridesParser.create().parse_override(job).value() for [job] in jobs] == [["\n"], ["a", "\t"]]


def test_null_is_no_choice_of_a_group(run):
    code, [config], _ = run("stage=null")
    assert code == 0 and "stage" not in config
    code, seen, _ = run("-m", "stage=small,null")
    assert code == 0
    assert [config.get("stage", {}).get("size") for config in seen] == [128, None]
    asked = []
    run("stage=null", "n=1", main=lambda config: asked.extend(launch_module.overrides()))
    assert asked == ["stage=null", "n=1"]


@pytest.mark.parametrize("value", ["3", "true", "[small,3]", "{a:1}", "1.5"])
def test_a_choice_that_is_no_name_is_one_sentence(run, value):
    code, seen, err = run(f"stage={value}")
    assert (code, seen, len(err.splitlines())) == (2, [], 1)
    assert "will not do: it must be one of large, small." in err


def test_settings_of_any_wrong_kind_are_told_before_main(run):
    for wrong in ("n=abc", "n=1.5", "n=null", "n=true", "index=3", "logged=yes", "stage.size=[1]", "+m=3"):
        code, seen, err = run(wrong)
        assert (code, seen, len(err.splitlines())) == (2, [], 1), wrong
    assert "There is no setting 'm': " in err
    code, seen, err = run("-m", "n=1,abc,2")
    assert code == 2 and [config["n"] for config in seen] == [1, 2]
    assert "n=abc will not do" in err


def test_text_arrives_through_the_whole_of_hydra(run):
    for a, b, c in zip(SPECIAL[::3], SPECIAL[1::3], SPECIAL[2::3], strict=True):
        code, [config], _ = run(f"question={a}", f"index.path={b}", f"corpus.path={c}", "stage.size=1")
        assert (code, config["stage"]["size"]) == (0, 1)
        paths = [None if text == "null" else text for text in (b, c)]  # null is null but for the question
        assert [config["question"], config["index"]["path"], config["corpus"]["path"]] == [a, *paths]


def test_sweeps_over_other_keys_stay(run):
    code, seen, _ = run("-m", "n=1,2", "stage=small,large", "question=a, b")
    assert code == 0
    assert [(c["n"], c["stage"]["size"], c["question"]) for c in seen] == [
        (1, 128, "a, b"), (1, 512, "a, b"), (2, 128, "a, b"), (2, 512, "a, b"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["stage.siz=1"], r"no setting 'stage\.siz': did you mean stage\.size"),
        (["stge=large"], r"no setting 'stge': did you mean stage\?"),
        (["zzz=1"], r"no setting 'zzz': there are corpus\.path, .*stage\.size"),
        (["indx.path=a b"], r"no setting 'indx\.path': did you mean index\.path"),
        (["stage=large", "stage.innr=1"], r"did you mean stage\.inner"),
        (["stage.siz=1", "stage.rato=1"], r"no setting 'stage\.siz'"),
        (["stage=medium"], r"no stage 'medium': choose one of large, small"),
        (["n=[1"], r"Cannot read the setting n=\[1"),
        (["n=1,2"], "--multirun"),
        (["n=${nowhere}"], "Cannot read the setting n: .*nowhere"),
        (["+n=4"], "already at 'n'"),
        (["device=tpu"], "device=tpu will not do: it must be auto, cpu or gpu"),
        (["profile=no"], "profile=no will not do: it must be true or false"),
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
    ("reading", "eval", []),
    ("certificate", "sensitivity", []),
    ("generator.", "generate", []),
    ("embedder.", "ingest", []),
    ("fusion.", "eval", ["fusion=dbsf"]),
    ("bench.drafting", "bench", ["bench=pipeline"]),
    ("bench.reading", "bench", ["bench=quality"]),
    ("bench.", "bench", ["bench=reading"]),
]


@pytest.mark.parametrize("old", [*launch_module.RENAMED, "reading.k", "bench.reading.path"])
def test_an_old_name_of_a_setting_is_answered_with_the_new_one(old, monkeypatch):
    script, choices = next(place for start, *place in OLD_NAMES if old.startswith(start))
    monkeypatch.setattr(sys, "argv", [f"{script}.py", *choices, f"{old}=1"])
    new = {**launch_module.RENAMED, "reading.k": "ablation.k", "bench.reading.path": "bench.questions.path"}
    sentence = launch_module._unknown_key(old, script, CONF)
    assert sentence == f"The setting {old!r} is called {new[old]!r} now."


def test_a_setting_that_another_benchmark_has_renamed_is_only_unknown(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["bench.py", "bench=attention", "bench.k=1"])
    assert "There is no setting 'bench.k': " in launch_module._unknown_key("bench.k", "bench", CONF)


def test_a_folder_that_cannot_be_made_is_one_sentence(run, tmp_path):
    (tmp_path / "file").write_text("")
    code, seen, err = run(f"hydra.run.dir={tmp_path}/file/run")
    assert (code, seen) == (2, [])
    assert "file/run (Not a directory): choose the run's folder with hydra.run.dir=DIR" in err


def test_all_that_is_missing_is_named_at_once(run):
    code, _, err = run(name="must")
    assert (code, err) == (2, "Please say which: corpus.path=... index.path=...\n")


def test_a_users_error_is_told_and_a_bug_keeps_its_traceback(run):
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


def composed(conf: Path, *overrides: str):
    with initialize_config_dir(str(conf), version_base="1.3"):
        return compose("tiny", list(overrides)).stage


def test_build_makes_plain_objects(conf):
    inner = Stage(size=1)
    stage = build(
        composed(conf, "stage.ratio=1", "+stage.words=[a,b]", "+stage.parts=[c]"), name="x", inner=inner
    )
    assert stage == Stage(128, 1, "x", inner, ["a", "b"], ["c"])
    assert stage.inner is inner  # handed on, not copied
    assert type(stage.words) is list
    assert build(composed(conf, "+stage.inner._target_=tests.scripts.launch_settings.Stage")).inner == Stage()


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("stage.size=many", "stage.size=many will not do: it must be a whole number"),
        ("stage.size=1.5", "stage.size=1.5 will not do: it must be a whole number"),
        ("stage.size=true", "stage.size=true will not do: it must be a whole number"),
        ("stage.size=null", "stage.size=null will not do: it must be a whole number"),
        ("stage.ratio=x", "stage.ratio=x will not do: it must be a number"),
        ("+stage.name=3", "stage.name=3 will not do: it must be text or null"),
        ("+stage.order=up", "stage.order=up will not do: it must be score or reverse"),
        ("+stage.colour=red", r"no setting 'stage\.colour': .*Stage takes size, ratio"),
        (
            "+stage.inner={_target_:tests.scripts.launch_settings.Stage,sise:1}",
            r"no setting 'stage\.inner\.sise'",
        ),
        (
            "+stage.inner={_target_:tests.scripts.launch_settings.Stage,size:-1}",
            "stage.size must be 0 or more",
        ),
        ("stage.size=-1", "stage.size must be 0 or more"),
    ],
)
def test_build_names_the_wrong_setting(conf, override, sentence):
    with pytest.raises(UserError, match=sentence):
        build(composed(conf, override))


# --- in a process of its own: signals, pipes, stdout, the profiler

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
