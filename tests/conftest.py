"""Check every jaxtyping annotation of rag with beartype while the tests run.

It also has the fixtures of the default weights, and reads the variable that turns their tests off.
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

from rag.runtime.cache.compilation_cache import enable_compilation_cache  # noqa: E402 (behind the hook)

enable_compilation_cache()  # most of the suite's time goes into compiling: a second run takes a quarter of it

OFFLINE = "RAG_OFFLINE_TESTS"  # "1": skip the tests marked `weights`, which may need a network the first time


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="long trials too: hours instead of minutes")


def pytest_configure(config: pytest.Config) -> None:
    trials.LONG = config.getoption("--long")
    settings.register_profile("suite", derandomize=not trials.LONG, deadline=None)
    settings.load_profile("suite")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip long tests, and tests of the real weights if the variable says so; otherwise these fail without weights."""
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
    """Return the folder of the default embedder; fetch it once, or fail."""
    from rag.models import hub

    return hub.local_path(hub.DEFAULT_EMBEDDER)


@pytest.fixture(scope="session")
def generator_weights() -> Path:
    """Return the GGUF file of the default generator; fetch it once, or fail."""
    from rag.models import hub

    return hub.local_path(hub.DEFAULT_GENERATOR)


@pytest.fixture(scope="module", autouse=True)
def programs_of_one_module():
    """Free the compiled programs of each test module: a process can map only a limited number of them."""
    yield
    jax.clear_caches()
