"""Run hundreds of trials in a process that this one watches: a crash or a hang of that process is a result too.

    python -m tests.crash.kills 2000     or damage_index, damage_cache, power_loss, syncs, full_disk

A campaign prints a line of JSON for each trial: its outcome and what was done.
"""

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
_SILENT_S = (
    180  # a process that prints nothing for so long counts as a hang; it includes importing and compiling
)
_SHOWN, _LAST = 8, 400  # the number of faults that a failing test prints, and the last characters of each

# Outcomes of a trial: the old state or the new one is found, the answer is the same, or an error names the file, ...
GOOD = frozenset({"old", "new", "same", "refused", "needed"})
FAULTS = frozenset({
    "lost",  # the old data cannot be read, or the written data is missing
    "wrong",  # a wrong answer without an error
    *("traceback", "crash", "hang"),
    "unnamed",  # an error that does not name the file
    "not one sentence",
    "rubbish",  # files that the next writer did not remove from the index
    "not needed",
})  # fmt: skip
LOUD = ("traceback", "crash", "hang")


@dataclass(frozen=True, slots=True)
class Trial:
    """The result of one trial."""

    number: int
    outcome: str
    done: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """The results of a campaign."""

    trials: Sequence[Trial]

    @property
    def counts(self) -> Counter:
        return Counter(trial.outcome for trial in self.trials)

    def check(self, faults: Sequence[str]) -> None:
        """Fail the test if a trial ended in one of these faults. Raises ValueError for an unknown outcome."""
        if unknown := self.counts.keys() - GOOD - FAULTS:
            raise ValueError(f"a trial's outcome is {min(unknown)!r}")
        if found := [trial for trial in self.trials if trial.outcome in faults]:
            lines = [
                f"trial {t.number}, {t.outcome}: {t.done} -> {t.detail[-_LAST:]}" for t in found[:_SHOWN]
            ]
            counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
            pytest.fail("\n".join([f"{len(self.trials)} trials: {counts}", *lines]), pytrace=False)


def print_trials(trials: Iterable[Trial]) -> None:
    """Print the results of trials, one line each, for the watching process."""
    for trial in trials:
        print(json.dumps([trial.number, trial.outcome, trial.done, trial.detail]), flush=True)


def begin(number: int, done: str) -> None:
    """Print what is about to be tried, in case the process dies or hangs."""
    print(json.dumps([number, "begun", done, ""]), flush=True)


def main(trials: Callable[[int, int, Path], Iterator[Trial]]) -> None:
    """Run `trials(first, count, folder)` with the arguments of the command line; each campaign's module calls this."""
    from tests.crash.trap import Unavailable

    count, first = (int(argument) for argument in (*sys.argv[1:], "0")[:2])
    with tempfile.TemporaryDirectory() as folder:
        try:
            print_trials(trials(first, count, Path(folder).resolve()))
        except Unavailable as error:
            print(json.dumps([0, "unavailable", "", str(error)]), flush=True)


def run(name: str, count: int, before: Sequence[str] = (), after: Sequence[str] = ()) -> Summary:
    """Run the trials of tests/crash/<name>.py and return their results.

    The test is skipped where the machine cannot do this. After a crash or a hang the process is started again with the
    next trial.

    Args:
        name: the campaign's module.
        count: the number of trials.
        before: words of the command line before the interpreter.
        after: words of the command line after the arguments.
    """
    memory = Path("/dev/shm")  # if it exists, because thousands of small folders are made and removed
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return Summary(_watched(name, count, before, after, os.environ | {"TMPDIR": folder}))


def _watched(
    name: str, count: int, before: Sequence[str], after: Sequence[str], environment: Mapping[str, str]
) -> list[Trial]:
    trials: list[Trial] = []
    first = 0
    while first < count:
        begun, code, errors = None, None, ""
        command = [*before, sys.executable, "-m", f"tests.crash.{name}", str(count), str(first), *after]
        for line in _lines(command, environment):
            if not isinstance(line, str):
                code, errors = line
                break
            number, outcome, done, detail = json.loads(line)
            if outcome == "unavailable":
                pytest.skip(detail)
            begun = Trial(number, outcome, done, detail) if outcome == "begun" else None
            if begun is None:
                trials.append(Trial(number, outcome, done, detail))
        if code == 0:
            break
        if begun is None:
            raise RuntimeError(f"tests.crash.{name} failed (exit code {code}): {errors[-3000:]}")
        outcome = "hang" if code is None else "crash"
        trials.append(Trial(begun.number, outcome, begun.done, f"exit code {code}: {errors[-300:]}"))
        first = begun.number + 1
    return trials


def _lines(command: Sequence[str], environment: Mapping[str, str]) -> Iterator[str | tuple[int | None, str]]:
    """Yield the lines of a process, then its exit code (None if it printed nothing for too long) and its stderr."""
    lines: queue.Queue[str | None] = queue.Queue()
    with tempfile.TemporaryFile("w+") as errors:
        process = subprocess.Popen(
            command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=errors, text=True
        )

        def read() -> None:
            for line in process.stdout:
                lines.put(line)
            lines.put(None)

        reader = threading.Thread(target=read)
        reader.start()
        silent = False
        try:
            while (line := lines.get(timeout=_SILENT_S)) is not None:
                yield line
        except queue.Empty:
            silent = True
            process.kill()
        except GeneratorExit:
            process.kill()
            raise
        finally:
            code = process.wait()
            reader.join()
            process.stdout.close()
            errors.seek(0)
        yield (None if silent else code), errors.read()
