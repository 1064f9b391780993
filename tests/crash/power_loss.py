"""Cut the power: record the runs of kills.py, and judge every disk that they may leave as after a kill."""

import itertools
import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from tests.crash import campaign
from tests.crash.campaign import Trial
from tests.crash.kills import Case, judge
from tests.crash.replay import Disk, Recording, recording, snapshot
from tests.crash.trap import recorded
from tests.crash.workloads import workloads

_EACH = 400  # power cuts of one draw of corpora


def record(case: Case, home: Path) -> Recording:
    """Record a run of the workload from its old state."""
    shutil.copytree(case.before, home)
    before = snapshot(home)
    events = recorded(partial(case.workload.write, home), home)
    shutil.rmtree(home)
    return recording(home, events, before)


def cut(case: Case, disk: Disk, home: Path, ended: bool) -> tuple[str, str]:
    """Return (outcome, detail) for a disk after a power cut; `ended`: the writer had reported that it was done."""
    home.mkdir()
    try:
        disk.write(home)
        return judge(case, home, ended=ended and case.workload.whole)
    finally:
        shutil.rmtree(home)


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    number = 0
    for seed in itertools.count():
        draw, trial_folder = random.Random(f"power {seed}"), folder / str(seed)
        cases = [Case.of(workload, trial_folder) for workload in workloads(trial_folder, seed)]
        runs = [(case, record(case, folder / "home")) for case in cases]
        for _ in range(_EACH):
            case, run = draw.choice(runs)
            ended, description, disk = run.drawn(draw)
            if number >= first:
                done = f"{case.workload.name} {seed}, {description}"
                campaign.begin(number, done)
                outcome, detail = cut(case, disk, folder / "home", ended)
                yield Trial(number, outcome, done, detail)
            number += 1
            if number >= count:
                return
        shutil.rmtree(trial_folder)


if __name__ == "__main__":
    campaign.main(trials)
