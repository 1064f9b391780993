"""With damaged files an answer is the same as with undamaged files, or an error names the file."""

import pytest

from tests import trials
from tests.crash import campaign
from tests.crash.campaign import Summary


@pytest.fixture(scope="module")
def index() -> Summary:
    return campaign.run("damage_index", 2000 if trials.LONG else 25)


@pytest.fixture(scope="module")
def cache() -> Summary:
    return campaign.run("damage_cache", 2000 if trials.LONG else 27)


@pytest.mark.parametrize("faults", [("wrong",), campaign.LOUD, ("unnamed",)])
def test_damage_to_an_index_is_never_answered_from(index, faults):
    index.check(faults)
    assert len(index.trials) == (2000 if trials.LONG else 25)


@pytest.mark.parametrize("faults", [("wrong",), campaign.LOUD, ("unnamed",)])
def test_damage_to_the_cache_is_never_computed_with(cache, faults):
    cache.check(faults)
    assert len(cache.trials) == (2000 if trials.LONG else 27)


@pytest.mark.long
def test_damage_to_the_native_library_is_never_run():
    """It needs one process a trial, and sometimes a compiler, so it is not in the suite."""
    campaign.run("damage_native", 200).check(["wrong", *campaign.LOUD, "unnamed"])
