"""After a power cut, reported work is on the disk, and every sync in rag/ is needed. Recorded runs are replayed."""

import random
from pathlib import Path

import pytest

from tests import trials
from tests.crash import campaign
from tests.crash.campaign import Summary
from tests.crash.replay import Snapshot, recording, snapshot
from tests.crash.trap import Event


@pytest.fixture(scope="module")
def cut() -> Summary:
    return campaign.run("power_loss", 2000 if trials.LONG else 60)


@pytest.fixture(scope="module")
def without_syncs() -> Summary:
    return campaign.run("syncs", 100)


@pytest.mark.parametrize("faults", [("lost",), ("wrong",), campaign.LOUD, ("rubbish",)])
def test_a_power_cut_leaves_the_old_state_or_the_new(cut, faults):
    cut.check(faults)
    assert len(cut.trials) == (2000 if trials.LONG else 60)


def test_every_sync_is_needed(without_syncs):
    """Without any single one of them a faulty disk is found, so that removing one fails this suite."""
    without_syncs.check(["not needed", "crash", "hang"])
    assert len(without_syncs.trials) >= 5


# --- the replay itself, on runs that are written down here

ROOT = Path("/r")
CREATE, WRITE, SYNC, RENAME, SYNC_FOLDER = (
    Event("create", "/r/new", "", 7, 0, b"", ""),
    Event("write", "/r/new", "", 7, 0, b"text", ""),
    Event("fsync", "/r/new", "", 7, 0, b"", "a"),
    Event("rename", "/r/new", "/r/file", 7, 0, b"", ""),
    Event("fsync", "/r", "", 1, 0, b"", "b"),
)


def disks(tmp_path: Path, *events: Event, ended: bool = False) -> list[dict[str, bytes | None]]:
    """Return what may be on a disk that held one file, "old", before; with `ended` after the end of the run."""
    (tmp_path / "file").write_bytes(b"old")
    found = snapshot(tmp_path)
    start = Snapshot(found.disk, {1: 0})
    states = recording(ROOT, events, start).states(random.Random(0), 20)
    return [dict(disk.tree()) for over, _, disk in states if over or not ended]


def test_an_atomic_file_is_old_or_new(tmp_path):
    states = disks(tmp_path, CREATE, WRITE, SYNC, RENAME, SYNC_FOLDER)
    assert {state.get("file") for state in states} == {b"old", b"text"}
    assert {state.get("new") for state in states} == {None, b"", bytes(4), b"text"}
    assert disks(tmp_path, CREATE, WRITE, SYNC, RENAME, SYNC_FOLDER, ended=True) == [{"file": b"text"}]


@pytest.mark.parametrize(
    "events, files",
    [
        ((CREATE, WRITE, RENAME, SYNC_FOLDER), {b"", bytes(4), b"text"}),  # its bytes may be missing
        ((CREATE, WRITE, SYNC, RENAME), {b"old", b"text"}),  # and so its name
    ],
)
def test_what_is_not_synced_may_be_missing(tmp_path, events, files):
    assert {state["file"] for state in disks(tmp_path, *events, ended=True)} == files
