"""Kill ingest, add, prefill and a sweep with -9 at every call that changes files; half of the writes are torn in two.

After each kill a reader finds the old state or the new one. The writer, started again, ends with the new state and
leaves no other files.
"""

import itertools
import random
import re
import shutil
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from unittest import mock

from rag.types import UserError
from tests.crash import campaign
from tests.crash.campaign import Trial
from tests.crash.trap import trapped
from tests.crash.workloads import Found, Workload, workloads

_RANDOM = re.compile(r"[0-9a-f]{32}|segment-\d{6}-[0-9a-f]{8}")  # parts of names that differ from run to run


@dataclass(frozen=True)
class Case:
    """A workload with its homes before and after it, and what a reader finds in each."""

    workload: Workload
    before: Path
    after: Path
    old: Found
    new: Found
    calls: int  # that the writer makes

    @staticmethod
    def of(workload: Workload, folder: Path) -> "Case":
        """Run the workload undisturbed in `folder`, first in this process, so that this process is warmed up."""
        before, after, counted = (folder / workload.name / name for name in ("before", "after", "counted"))
        before.mkdir(parents=True)
        workload.before(before)
        shutil.copytree(before, after)
        shutil.copytree(before, counted)
        workload.write(after)
        ended = trapped(partial(workload.write, counted), counted)
        if ended.result is None:
            raise RuntimeError(f"{workload.name} fails undisturbed (signal {ended.signal}): {ended.text}")
        return Case(workload, before, after, workload.look(before), workload.look(after), ended.result[1])

    def fault(self, home: Path, *, ended: bool = False) -> str | None:
        """Return what is wrong in this home, or None. A reader must find the old or the new state; if `ended`, the new.

        It may raise whatever a reader raises.
        """
        found = self.workload.look(home)
        if not self.workload.whole:
            wrong = [name for name, value in found.items() if value != self.new.get(name)]
            return f"wrong: {wrong}" if wrong else None
        if found == self.new or (found == self.old and not ended):
            return None
        if found == self.old or not found:
            return "lost"
        return f"wrong: {[name for name, value in found.items() if value != self.new.get(name)]}"

    def rubbish(self, home: Path) -> list[str]:
        """Return names in the index that no undisturbed writer leaves; the cache has a size limit instead."""
        left = sorted((_names(home) - _names(self.after)).elements())
        return [name for name in left if name.startswith("index/")]


def _names(home: Path) -> Counter:
    paths = (path.relative_to(home).as_posix() for path in home.rglob("*"))
    return Counter(_RANDOM.sub("#", path) for path in paths)


def judge(case: Case, home: Path, *, ended: bool = False) -> tuple[str, str]:
    """Return (outcome, detail) for a home in which a writer was stopped, from a reader and from the next writer."""
    with mock.patch("os.fsync"):  # files written from here on are not needed after a power cut
        try:
            return _judged(case, home, ended)
        except UserError as error:
            return "lost", str(error)
        except Exception:  # of any kind: a user would get a traceback
            return "traceback", traceback.format_exc()


def _judged(case: Case, home: Path, ended: bool) -> tuple[str, str]:
    if fault := case.fault(home, ended=ended):
        return fault.partition(":")[0], fault
    state = "new" if case.workload.look(home) == case.new else "old"
    case.workload.write(home)
    if fault := case.fault(home, ended=case.workload.whole):
        return fault.partition(":")[0], f"after the next writer: {fault}"
    if case.workload.look(home) != case.new:
        return "lost", "after the next writer"
    if left := case.rubbish(home):
        return "rubbish", f"after the next writer: {left}"
    return state, ""


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    numbers = itertools.count()
    for seed in itertools.count():
        draw, trial_folder = random.Random(f"kills {seed}"), folder / str(seed)
        cases = [Case.of(workload, trial_folder) for workload in workloads(trial_folder, seed)]
        points = [(case, at) for case in cases for at in range(1, case.calls + 1)]
        draw.shuffle(points)
        for case, at in points:
            number, torn = next(numbers), draw.random() < 0.5
            if number >= count:
                return
            if number >= first:
                done = f"{case.workload.name} {seed}, killed at call {at} of {case.calls}{', torn' * torn}"
                campaign.begin(number, done)
                yield Trial(number, *_killed(case, folder / "home", at, torn, done))
        shutil.rmtree(trial_folder)


def _killed(case: Case, home: Path, at: int, torn: bool, done: str) -> tuple[str, str, str]:
    """Kill once; return (outcome, what was done, detail)."""
    shutil.copytree(case.before, home)
    try:
        ended = trapped(partial(case.workload.write, home), home, die_at=at, torn=torn)
        if not ended.signal:
            return "traceback", done, f"it was not killed: {ended.text}"
        outcome, detail = judge(case, home)
        return outcome, done, detail
    finally:
        shutil.rmtree(home)


if __name__ == "__main__":
    campaign.main(trials)
