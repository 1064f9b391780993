"""Run-time shape checks: every jaxtyping annotation of rag is enforced by beartype while the tests run.

Also what every test shares: the default weights, and the variable that turns their tests off.
"""

import os
from pathlib import Path

import jax
import pytest
from hypothesis import settings
from jaxtyping import install_import_hook

import tests.typecheck  # noqa: F401 (the hook finds it as an attribute of the package)
from tests import trials

install_import_hook("rag", "tests.typecheck.check")  # before anything imports rag

from rag.runtime.compilation_cache import enable_compilation_cache  # noqa: E402 (behind the hook)

enable_compilation_cache()  # most of the suite's time goes into compiling: a second run takes a quarter of it

OFFLINE = "RAG_OFFLINE_TESTS"  # "1": skip the tests marked `weights`, which may need a network the first time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="long trials too: hours instead of minutes")


def pytest_configure(config: pytest.Config) -> None:
    trials.LONG = config.getoption("--long")
    settings.register_profile("suite", derandomize=not trials.LONG, deadline=None)
    settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Without weights these tests fail rather than skip, unless the variable says that this is meant."""
    if not trials.LONG:
        for item in items:
            if item.get_closest_marker("long"):
                item.add_marker(pytest.mark.skip(reason="a long trial: --long runs it"))
    if os.environ.get(OFFLINE) == "1":
        for item in items:
            if item.get_closest_marker("weights"):
                item.add_marker(pytest.mark.skip(reason=f"{OFFLINE}=1 turns tests of the real weights off"))


@pytest.fixture(scope="session")
def embedder_weights() -> Path:
    """The folder of the default embedder; fetched once, an error if it cannot be had."""
    from rag.models import hub

    return hub.local_path(hub.DEFAULT_EMBEDDER)


@pytest.fixture(scope="session")
def generator_weights() -> Path:
    """The GGUF file of the default generator; fetched once, an error if it cannot be had."""
    from rag.models import hub

    return hub.local_path(hub.DEFAULT_GENERATOR)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Compiled programs go with the module that asked for them: a process may map only so many of them."""
    yield
    jax.clear_caches()
