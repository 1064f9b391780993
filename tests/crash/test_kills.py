"""When a writer is killed, nothing is lost, states are not mixed, and the next writer cleans up."""

import pytest

from tests import trials
from tests.crash import campaign
from tests.crash.campaign import Summary


@pytest.fixture(scope="module")
def killed() -> Summary:
    return campaign.run("kills", 2000 if trials.LONG else 25)


@pytest.mark.parametrize("faults", [("lost",), ("wrong",), campaign.LOUD, ("rubbish",)])
def test_a_killed_writer_leaves_the_old_state_or_the_new(killed, faults):
    killed.check(faults)
    assert len(killed.trials) == (2000 if trials.LONG else 25)
