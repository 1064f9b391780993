"""When the disk is full at any point of scripts/ingest.py, the old state stays, and the error is one sentence."""

import shutil
import subprocess

import pytest

from tests import trials
from tests.crash import campaign
from tests.crash.campaign import Summary

FAULTS = [("lost",), (*campaign.LOUD, "not one sentence"), ("rubbish",)]


@pytest.fixture(scope="module")
def refused() -> Summary:
    """Run with a full disk from each call of the writer on."""
    return campaign.run("full_disk", 1000 if trials.LONG else 20)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Summary:
    """Run with different numbers of free bytes on a tmpfs of 300 KiB, mounted only for this process."""
    folder = tmp_path_factory.mktemp("small")
    if shutil.which("unshare") is None:
        pytest.skip("there is no unshare to mount a small file system with")
    mounting = ["unshare", "--map-root-user", "--mount", "sh", "-c", _MOUNT, "sh", str(folder)]
    if (done := subprocess.run([*mounting, "true"], capture_output=True, text=True, check=False)).returncode:
        pytest.skip(f"this process may not mount a small file system: {done.stderr.strip()}")
    return campaign.run("full_disk", 48 if trials.LONG else 6, mounting, [str(folder)])


_MOUNT = 'mount -t tmpfs -o size=300k small "$1" && shift && exec "$@"'


@pytest.mark.parametrize("faults", FAULTS)
def test_no_room_for_any_call(refused, faults):
    refused.check(faults)


def test_a_small_file_system_holds_some(small):
    """Both outcomes were tried."""
    assert 0 < small.counts["new"] < len(small.trials)


@pytest.mark.parametrize("faults", FAULTS)
def test_a_small_file_system(small, faults):
    small.check(faults)
