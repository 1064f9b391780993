"""Scripts under hostile conditions: streams that are closed or full, Ctrl-C at any time, little of everything.

The first tests start a process that has launch but neither Hydra nor JAX; --long walks the real scripts.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys

import pytest
from launch import CONF
from process import system_error

from rag.types import UserError
from tests import trials
from tests.report.result_folders import save
from tests.tiny_models import write_decoder

ROOT = CONF.parent
CHILD = f"""
import sys
sys.path[:0] = {[str(ROOT), str(ROOT / "scripts")]}
import time, launch, os, io, gc
def body():
{{body}}
launch._run_hydra = lambda *_: body()
launch.launch(body, "tiny", dict)
"""


def child(body: str, shell: str = "{}", **more) -> subprocess.CompletedProcess:
    """What becomes of a script with that body, started by the shell line in the place of {}."""
    source = CHILD.format(body="".join(f"    {line}\n" for line in body.splitlines()))
    line = shell.format('"$PYTHON" -c "$SOURCE"')
    more["env"] = os.environ | {"PYTHON": sys.executable, "SOURCE": source} | more.get("env", {})
    return subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=60, errors="surrogateescape", **more
    )


def sentences(done: subprocess.CompletedProcess) -> list[str]:
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr, done.stderr
    return done.stderr.strip().splitlines()


MANY = "for i in range(100_000): print('a line of the result', i)"


@pytest.mark.parametrize(
    ("body", "shell", "code", "sentence"),
    [
        ("print(1)", "{} >&-", 2, "Stdout is closed"),
        ("print(1)", "{} >/dev/full", 2, "Cannot write to stdout (No space left on device)"),
        ("print(1, flush=True)", "{} >/dev/full", 2, "Cannot write to stdout"),
        (MANY, "{} >/dev/full", 2, "Cannot write to stdout"),
        ("print(1); raise launch.UserError('no')", "{} >/dev/full", 2, "Cannot write to stdout"),
        ("input('> '); print(1)", "echo question | {} >/dev/full", 2, "Cannot write to stdout"),
        (MANY, "{} | head -1 >/dev/null; exit ${{PIPESTATUS[0]}}", 141, None),
        ("time.sleep(.1); print(1)", "{} | true; exit ${{PIPESTATUS[0]}}", 141, None),
        ("import rich; time.sleep(.1); rich.print(1)", "{} | true; exit ${{PIPESTATUS[0]}}", 141, None),
        ("print(1, file=sys.stderr)", "{} 2>/dev/full", 0, None),
        ("print(1, file=sys.stderr); print(2)", "{} 2>&-", 0, None),
        ("raise launch.UserError('no')", "{} 2>&-", 2, None),
        ("print(1); print(2, file=sys.stderr)", "{} <&-", 0, "2"),
        ("assert sys.stdin is None and open(os.devnull).fileno() > 2", "{} <&- 2>&-", 0, None),
        ("raise launch.UserError('no')", "{} <&- >&- 2>&-", 2, None),
        ("print(1)", "mkdir gone; cd gone; rmdir ../gone; {}", 2, "The current folder is gone"),
        ("files = [open(os.devnull) for _ in range(30)]", "ulimit -n 20; {}", 2, "this process may have 20."),
        ("bytearray(1 << 50)", "{}", 2, "Not enough memory"),
        ("launch.explain = lambda *_: bytearray(1 << 50)\n1 / 0", "{}", 2, "Not enough memory: use"),
        ("os.kill(os.getpid(), 15); time.sleep(9)", "{}; exit $?", 143, None),
    ],
)
def test_a_condition_has_one_sentence_or_none(tmp_path, body, shell, code, sentence):
    done = child(body, shell, cwd=tmp_path)
    told = [line for line in sentences(done) if "Terminated" not in line]
    assert (done.returncode, len(told)) == (code, int(sentence is not None)), done.stderr
    assert sentence is None or sentence in told[0]


def test_what_an_encoding_cannot_spell_is_escaped():
    ascii = {"PYTHONIOENCODING": "ascii"}
    done = child("print('caf\\u00e9 \\u6ce8 \\udcff'); print('\\u6ce8', file=sys.stderr)", env=ascii)
    assert (done.returncode, done.stdout) == (0, "caf\\xe9 \\u6ce8 \\udcff\n")
    assert sentences(done) == ["\\u6ce8"]
    done = child("print('caf\\u00e9', 'bad \\udcff')", env={"PYTHONIOENCODING": "utf-8"})
    assert done.stdout == "caf\u00e9 bad \\udcff\n"
    done = child("print(input())", "printf 'caf\\xff\\n' | {}", env={"PYTHONIOENCODING": "utf-8"})
    assert (done.returncode, done.stdout) == (0, "caf\ufffd\n")


def test_what_was_printed_before_a_mistake_is_there():
    done = child("print('before'); raise launch.UserError('no')")
    assert (done.returncode, done.stdout, done.stderr) == (2, "before\n", "no\n")


def test_as_many_files_may_be_open_as_the_system_allows():
    body = "import resource; print(resource.getrlimit(resource.RLIMIT_NOFILE)[0])"
    assert child(body, "ulimit -Sn 300; ulimit -Hn 400; {}").stdout == "400\n"


# --- Ctrl-C


def interrupted(body: str) -> subprocess.CompletedProcess:
    """What becomes of a script that says "ready" when Ctrl-C may come."""
    command = [
        sys.executable,
        "-c",
        CHILD.format(body="".join(f"    {line}\n" for line in body.splitlines())),
    ]
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    signal.signal(signal.SIGINT, before)
    with process:
        assert process.stdout.readline() == "ready\n"
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=30)
    return subprocess.CompletedProcess(command, process.returncode, out, err)


READY = "print('ready', flush=True); "
SLEEP = "time.sleep(30)"


@pytest.mark.parametrize(
    ("body", "codes", "told"),
    [
        (READY + SLEEP, [130], ["Interrupted."]),
        # after the result, in what libraries do at the end
        (f"import atexit; atexit.register(lambda: ({READY.strip('; ')}, {SLEEP}))", [-signal.SIGINT], []),
        # where Python would print it and go on
        (f"class A:\n    def __del__(self): {READY}{SLEEP}\nA(); {SLEEP}", [130], ["Interrupted."]),
        # a library makes an error of its own out of it
        (
            f"try: {READY}{SLEEP}\nexcept KeyboardInterrupt as error: raise RuntimeError('x') from None",
            [130],
            ["Interrupted."],
        ),
        (f"try: {READY}{SLEEP}\nexcept KeyboardInterrupt: pass", [130], ["Interrupted."]),
        # cleaning up hangs, and there is a second one
        (
            f"try: {READY}{SLEEP}\nfinally: os.kill(os.getpid(), 2); {SLEEP}",
            [-signal.SIGINT],
            [],
        ),
    ],
)
def test_ctrl_c_is_the_end_wherever_it_comes(body, codes, told):
    done = interrupted(body)
    assert done.returncode in codes
    assert sentences(done) in ([], told)


# --- errors of the system


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError(24, "Too many open files"), "Too many open files: "),
        (
            ImportError("libx.so: cannot open shared object file: Too many open files"),
            "Too many open files: ",
        ),
        (UserError("There is no index at too many open files."), None),
        (OSError(28, "No space left on device", "/x"), "Cannot write /x (No space left on device)"),
        (OSError(12, "Cannot allocate memory"), "Not enough memory"),
        (ImportError("x.so: failed to map segment from shared object"), "Not enough memory"),
        (MemoryError(), "Not enough memory (no reason given)"),
        (
            RuntimeError("RESOURCE_EXHAUSTED: Out of memory\nallocating 5 bytes"),
            "memory (RESOURCE_EXHAUSTED: Out",
        ),
        (RuntimeError("can't start new thread"), "Not enough memory"),
        (PermissionError(13, "Permission denied", "/x"), "Cannot use /x (Permission denied)"),
        (OSError(36, "File name too long", "a" * 5000), "Cannot use aaa"),
        (RuntimeError("Could not determine home directory."), "no home folder"),
        (FileNotFoundError(2, "No such file or directory", "/x"), None),
        (RuntimeError("the pipeline ended"), None),
        (ValueError("out of memory"), None),
    ],
)
def test_errors_of_the_system_are_told_from_bugs(error, sentence):
    found = system_error(error)
    assert found is None if sentence is None else sentence in found
    later = UserError("the index is damaged, ingest again")
    later.__cause__ = error
    assert system_error(later) == found


def test_a_bug_while_an_error_of_the_system_is_handled_stays_a_bug():
    done = child("try: open('/proc/self/mem/x')\nexcept OSError: raise ZeroDivisionError")
    assert done.returncode == 1 and "ZeroDivisionError" in done.stderr


def test_too_many_open_files_come_before_what_was_made_of_them():
    done = child("raise launch._Raised from launch.UserError('ingest again')")
    assert (done.returncode, done.stderr) == (2, "ingest again\n")
    cause = "error = launch.UserError('ingest again'); error.__cause__ = OSError(24, 'Too many open files')"
    done = child(f"{cause}\nraise launch._Raised from error")
    assert (done.returncode, done.stderr[:20]) == (2, "Too many open files:")


# --- the scripts themselves, each under each condition: some in the suite, all with --long

WORDS = "embedder=bag_of_words"
ASK = f"index.path=$H/index {WORDS} generator.weights=$H/decoder answer.max_new_tokens=8"
SCRIPTS = {
    "ingest": f"corpus.path=$H/documents index.path=$H/new {WORDS}",
    "generate": f"{ASK} question='What eats krill?'",
    "json": f"{ASK} question='What eats krill?' output=json",
    "session": ASK,
    "eval": f"dataset.path=$H/beir {WORDS}",
    "report": "runs=$H/results output=$H/page",
    "sensitivity": f"dataset.path=$H/beir {WORDS} sensitivity.answers=0 sensitivity.vector_dtypes=[float16]",
    "prefill": "index.path=$H/index generator.weights=$H/decoder",
    "bench": "bench=nothing",
}
DEAD = (134, 139, -6, -11)  # C++ without memory, as a shell reports it and as the system does
CONDITIONS = {  # the shell line, the exit codes that are right; a session ends with its input
    "as usual": ("{}", {0}),
    "stdout closed": ("{} >&-", {2}),
    "stdout full": ("{} >/dev/full", {2}),
    "stdin closed": ("{} <&-", {0, 2}),
    "stderr closed": ("{} 2>&-", {0}),
    "stderr full": ("{} 2>/dev/full", {0}),
    "all closed": ("{} <&- >&- 2>&-", {2}),
    "reader gone": ("{} | true; exit ${{PIPESTATUS[0]}}", {141}),
    "20 open files": ("ulimit -n 20; {}", {0, 2}),
    "1 GB of memory": ("ulimit -v 1000000; {}", {0, 2, *DEAD}),
    "3 GB of memory": ("ulimit -v 3000000; {}", {0, 2, *DEAD}),
    "ascii": ("export LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 PYTHONIOENCODING=ascii; {}", {0}),
    "no home": ("export HOME=/proc/none; unset RAG_CACHE; {}", {2}),
    "folder gone": ("mkdir $H/gone; cd $H/gone; rmdir $H/gone; {}", {2}),
    "no TMPDIR": ("export TMPDIR=/none; {}", {0}),
    "one column": ("export COLUMNS=1; {}", {0}),
}


def prepare(home) -> None:
    """Documents, a dataset and results of two evaluations."""
    for folder in ("documents", "beir/qrels", "results", "cwd"):
        (home / folder).mkdir(parents=True)
    texts = {"seal": "a seal eats fish", "krill": "Caf\u00e9: a whale eats krill \u6ce8"}
    for name, text in texts.items():
        (home / "documents" / f"{name}.txt").write_text(text)
        save(home / "results" / name, f"r={name} \u6ce8", {"MAP": {"1": 0.5, "2": len(name) / 10}})
    (home / "documents" / os.fsdecode(b"\xff.png")).write_text("")
    rows = [{"_id": name, "text": text} for name, text in texts.items()]
    for file in ("corpus", "queries"):
        (home / "beir" / f"{file}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    judged = "".join(f"{name}\t{name}\t1\n" for name in texts)
    (home / "beir" / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)


def prepare_to_ask(home) -> None:
    """An index and a tiny decoder: what takes its time."""
    (home / "decoder").mkdir()
    write_decoder(home / "decoder")
    assert walk(home, "ingest", "{}").returncode == 0
    (home / "new").rename(home / "index")


def walk(home, script: str, line: str) -> subprocess.CompletedProcess:
    """Run a script with its settings by a shell line."""
    file = ROOT / "scripts" / f"{'generate' if script in ('json', 'session') else script}.py"
    command = f"{sys.executable} {file} {SCRIPTS[script]} hydra.run.dir=$H/run"
    if script == "session" and "<&-" not in line:
        command = f"{command} < $H/questions"
        (home / "questions").write_text("What eats krill \u6ce8?\n/sources\n/nothing\n")
    return subprocess.run(
        ["bash", "-c", line.format(command)],
        cwd=home / "cwd",
        env=os.environ | {"H": str(home), "RAG_CACHE": str(home / "cache"), "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=300,
    )


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("streams") / "home"
    prepare(home)
    if trials.LONG:
        prepare_to_ask(home)
    return home


SOME = [("ingest", "stdout full"), ("session", "stdin closed"), ("ingest", "no home")]


@pytest.mark.parametrize(
    ("script", "condition"),
    [
        *SOME,
        *(
            pytest.param(script, condition, marks=pytest.mark.long)
            for script in SCRIPTS
            for condition in CONDITIONS
            if (script, condition) not in SOME
        ),
    ],
)
def test_a_script_under_a_condition(home, script, condition):
    line, codes = CONDITIONS[condition]
    shutil.rmtree(home / "new", ignore_errors=True)
    done = walk(home, script, line)
    assert done.returncode in ({2} if script == "bench" else codes), done.stderr
    if done.returncode not in DEAD:  # whose last words are not ours
        assert not re.search("Traceback|Exception ignored", done.stderr), done.stderr


@pytest.mark.long
@pytest.mark.parametrize("script", ["ingest", "session", "eval"])
def test_ctrl_c_at_any_time(home, script):
    """From behind Python's own start on; what comes after the last line of output is the libraries' end."""
    for tenth in range(5, 300):
        shutil.rmtree(home / "new", ignore_errors=True)
        done = walk(home, script, f"timeout --preserve-status --signal=INT {tenth / 10} {{}}")
        told = done.stderr.replace("\r", "\n")
        assert "Traceback" not in told and "Exception ignored" not in told, (tenth, told)
        assert done.returncode in (0, 130)
        if done.returncode == 0:
            return
    pytest.fail("it never came to an end")
