"""Compiled programs are found by the next process, and damaged ones are compiled again."""

import json
import os
import subprocess
import sys

import pytest

from tests.damage import WAYS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def test_a_second_process_finds_what_the_first_compiled(tmp_path):
    program = """
import jax, jax.numpy as jnp
from rag.runtime.cache.compilation_cache import enable_compilation_cache
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event.endswith("/cache_hits")))
enable_compilation_cache()
jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5))).block_until_ready()
print(sum(hits))
"""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    runs = [
        subprocess.run(
            [sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True
        )
        for _ in range(2)
    ]
    assert int(runs[0].stdout) == 0
    assert int(runs[1].stdout) >= 1
    assert list((tmp_path / "cache" / "xla").glob("*/*"))


def test_a_damaged_program_is_compiled_again_and_replaced(tmp_path):
    """One process clears its programs after each kind of damage."""
    program = """
import json, pathlib, sys
import jax, jax.numpy as jnp
from rag.runtime.cache.compilation_cache import enable_compilation_cache
from tests.damage import WAYS
enable_compilation_cache()
def value():
    jax.clear_caches()
    return float(jax.jit(lambda x: jnp.sin(x) @ x)(jnp.ones((5, 5))).sum())
right = value()
[entry] = pathlib.Path(sys.argv[1]).glob("xla/*/jit__lambda-*-cache")
for way in WAYS:
    print(way, file=sys.stderr)
    WAYS[way](entry)
    assert value() == right, way
    print(json.dumps([way, entry.stat().st_size]))
"""
    environment = {key: value for key, value in os.environ.items() if key != "JAX_COMPILATION_CACHE_DIR"}
    done = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path / "cache")],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    sizes = dict(map(json.loads, done.stdout.splitlines()))
    assert sizes.keys() == WAYS.keys() and min(sizes.values()) > 1000  # each way the entry is whole again
    printed = [line for line in done.stderr.splitlines() if line not in WAYS]
    assert len(printed) == len(WAYS) - 1 and all("it is compiled again" in line for line in printed), (
        done.stderr
    )
