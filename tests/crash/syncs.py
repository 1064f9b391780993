"""Test whether every sync of the project is needed, by power cuts after runs without the syncs of one line.

A trial is a line. It is "needed" if without it some workload leaves a faulty disk, else "not needed". Only steps that
this line makes durable are missing on these disks, so that a fault is caused by this line.

    python -m tests.crash.syncs 100 0 all    reports it for every workload
"""

import random
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.crash import campaign
from tests.crash.campaign import Trial
from tests.crash.kills import Case
from tests.crash.power_loss import cut, record
from tests.crash.replay import Recording
from tests.crash.workloads import workloads

_DRAWN = 2  # sets of missing steps at each point
_FAULTS = ("lost", "wrong", "traceback")


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    cases = [Case.of(workload, folder) for workload in workloads(folder, 0)]
    runs = [(case, record(case, folder / "home")) for case in cases]
    sites = dict.fromkeys(site for _, run in runs for site in run.sites)
    everywhere = sys.argv[3:] == ["all"]
    for number, site in enumerate(list(sites)[first:count], first):
        campaign.begin(number, f"without {site}")
        found = {}
        for case, run in runs:
            if site in run.sites and (everywhere or not any(found.values())):
                found[case.workload.name] = _fault(case, run, site, folder / "home")
        outcome = "needed" if any(found.values()) else "not needed"
        yield Trial(
            number, outcome, f"without {site}", "; ".join(f"{name}: {fault}" for name, fault in found.items())
        )


def _fault(case: Case, run: Recording, site: str, home: Path) -> str | None:
    """Return the first fault without the syncs of a line, or None."""
    for ended, description, disk in run.without(site).states(random.Random(site), _DRAWN, than=run):
        outcome, detail = cut(case, disk, home, ended)
        if outcome in _FAULTS:
            return f"{outcome}, {description} ({detail[-200:]})"
    return None


if __name__ == "__main__":
    campaign.main(trials)
