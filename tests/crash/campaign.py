"""Trials by the hundreds in a process of its own, which is watched: one that dies or hangs in a trial is a result too.

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
_SILENT_S = 180  # a process that says nothing for so long hangs; importing and compiling included
_SHOWN, _LAST = 8, 400  # faults that a failing test tells of, and characters of each: the last

# Outcomes of a trial: the old state or the new one stands, the answer is the same or is refused by name, ...
GOOD = frozenset({"old", "new", "same", "refused", "needed"})
FAULTS = frozenset({
    "lost",  # what was there cannot be read, or what was written is gone
    "wrong",  # silently
    *("traceback", "crash", "hang"),
    "unnamed",  # refused without naming the file
    "not one sentence",
    "rubbish",  # left behind in the index by the next writer too
    "not needed",
})  # fmt: skip
LOUD = ("traceback", "crash", "hang")


@dataclass(frozen=True, slots=True)
class Trial:
    """One trial: its number, its outcome, what was done, and what came of it."""

    number: int
    outcome: str
    done: str
    detail: str = ""


@dataclass(frozen=True)
class Summary:
    """A campaign's trials."""

    trials: Sequence[Trial]

    @property
    def counts(self) -> Counter:
        return Counter(trial.outcome for trial in self.trials)

    def check(self, faults: Sequence[str]) -> None:
        """Fail the test where a trial ended in one of these faults, or in an outcome that is not known."""
        if unknown := self.counts.keys() - GOOD - FAULTS:
            raise ValueError(f"a trial's outcome is {min(unknown)!r}")
        if found := [trial for trial in self.trials if trial.outcome in faults]:
            lines = [
                f"trial {t.number}, {t.outcome}: {t.done} -> {t.detail[-_LAST:]}" for t in found[:_SHOWN]
            ]
            counts = ", ".join(f"{count} {outcome}" for outcome, count in self.counts.most_common())
            pytest.fail("\n".join([f"{len(self.trials)} trials: {counts}", *lines]), pytrace=False)


def tell(trials: Iterable[Trial]) -> None:
    """Print trials as they end, for the watching process."""
    for trial in trials:
        print(json.dumps([trial.number, trial.outcome, trial.done, trial.detail]), flush=True)


def begin(number: int, done: str) -> None:
    """Say what is about to be tried, in case that nothing more is said."""
    print(json.dumps([number, "begun", done, ""]), flush=True)


def main(trials: Callable[[int, int, Path], Iterator[Trial]]) -> None:
    """What a campaign's module runs: trials(first, count, folder) by the command line."""
    from tests.crash.trap import Unavailable

    count, first = (int(argument) for argument in (*sys.argv[1:], "0")[:2])
    with tempfile.TemporaryDirectory() as folder:
        try:
            tell(trials(first, count, Path(folder).resolve()))
        except Unavailable as error:
            print(json.dumps([0, "unavailable", "", str(error)]), flush=True)


def run(name: str, count: int, before: Sequence[str] = (), behind: Sequence[str] = ()) -> Summary:
    """The trials of tests/crash/<name>.py; `before` and `behind` are more words of the command line.

    Skips the test where the machine cannot do this. A process that ends in the midst of a trial is started again
    behind it.
    """
    memory = Path("/dev/shm")  # where it is there: thousands of small folders are made and removed
    with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as folder:
        return Summary(_watched(name, count, before, behind, os.environ | {"TMPDIR": folder}))


def _watched(
    name: str, count: int, before: Sequence[str], behind: Sequence[str], environment: Mapping[str, str]
) -> list[Trial]:
    trials: list[Trial] = []
    first = 0
    while first < count:
        begun, code, errors = None, None, ""
        command = [*before, sys.executable, "-m", f"tests.crash.{name}", str(count), str(first), *behind]
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
    """A process's lines, then its exit code, None if it was silent for too long, and what it wrote to stderr."""
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
