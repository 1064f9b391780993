"""Scripts under hostile conditions: streams that are closed or full, Ctrl-C at any time, little of everything.

The first tests start a process that has launch but neither Hydra nor JAX; --long walks the real scripts.
"""

import os
import signal
import subprocess
import sys

import pytest
from launch import CONF
from process import system_error

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
    later = ZeroDivisionError()  # raised while that one was handled
    later.__context__ = error
    assert system_error(later) == found
