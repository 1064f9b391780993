"""Choose how many random cases a property test tries: few in the suite, many with pytest's option --long."""

from hypothesis import HealthCheck, settings

LONG = False  # set by conftest.py


def tries(suite: int, long: int) -> settings:
    """Return hypothesis settings: the `suite` cases are the same at every run, the `long` cases are drawn anew."""
    return settings(
        max_examples=long if LONG else suite,
        derandomize=not LONG,
        deadline=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
    )
