"""scripts/cache.py, and how scripts/prefill.py says beforehand what it will take."""

import os
import time

import cache as cache_script
import ingest
import numpy as np
import prefill
import pytest

from rag.generate.kv import chunk_cache
from rag.runtime.cache import eviction
from rag.runtime.cache.folder import cache_root
from rag.runtime.files import locked
from rag.types import UserError
from tests.run_script import run_script
from tests.tiny_models import write_decoder

KEYS = [f"{i:064x}" for i in range(4)]


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))

    def run(script, *overrides):
        run_script(script, *overrides)
        return capsys.readouterr().out

    return run


def put(name, days, size):
    path = cache_root() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(bytes(size))
    then = time.time() - days * 86_400
    os.utime(path, (then, then))
    return path


@pytest.fixture
def entries(run):
    found = [
        put(f"vectors/{KEYS[0]}/{KEYS[1]}.npy", 10, 2_000_000),
        put(f"vectors/{KEYS[0]}/{KEYS[2]}.npy", 1, 1_000_000),
        put(f"stages/search/{KEYS[0]}/{KEYS[1]}.json", 10, 500_000),
    ]
    with locked(cache_root() / "weights/tiny-1.0"):
        put("weights/tiny-1.0/model.gguf", 99, 4_000_000)
    return [*found, cache_root() / "weights/tiny-1.0"]


def test_info_is_a_line_a_kind(run, entries):
    out = run(cache_script)
    lines = {line.split()[1]: line.split() for line in out.splitlines() if line.startswith("│")}
    assert lines["vectors"][3:7:2] == ["2", "3.0"] and lines["weights"][5] == "4.0"
    day = time.strftime("%Y-%m-%d", time.localtime(time.time() - 86_400))
    assert day in lines["vectors"]
    assert out.splitlines()[-1] == f"7.5 MB of at most 20 GB (RAG_CACHE_GB) in {cache_root()}"
    assert all(path.exists() for path in entries)


@pytest.mark.parametrize(
    ("overrides", "gone"),
    [
        ([], [0, 1, 2]),  # the weights would have to be fetched
        (["kind=vectors"], [0, 1]),
        (["older_than_days=5"], [0, 2]),
        (["kind=vectors", "older_than_days=5"], [0]),
        (["kind=weights"], [3]),
        (["kind=xla"], []),
    ],
)
def test_clean_removes_what_it_is_asked_to(run, entries, overrides, gone):
    out = run(cache_script, "action=clean", *overrides)
    assert [i for i, path in enumerate(entries) if not path.exists()] == gone
    assert out.startswith(f"removed {len(gone)} entr") and str(cache_root()) in out


def test_what_is_cleaned_is_made_again(run, monkeypatch):
    from rag.runtime.cache.memo import Memo

    assert Memo(cache_root() / "stages").map("s", "v", [1], lambda items: items) == [1]
    assert [entry.kind for entry in eviction.entries(["stages"])] == ["stages"]
    run(cache_script, "action=clean")
    assert eviction.entries(["stages"]) == []
    assert Memo(cache_root() / "stages").map("s", "v", [1], lambda items: items) == [1]


def computed(packed, tokens):
    """What stands in for the model, whose programs take seconds to make."""
    c = packed.module.config
    shape = (c.num_hidden_layers, 2, c.num_key_value_heads, tokens.shape[1], c.head_dim)
    return np.ones((len(tokens), *shape), np.float16)


def test_prefill_tells_its_size_first_and_asks_above_a_limit(run, tmp_path, capsys, monkeypatch):
    (tmp_path / "documents").mkdir()
    (tmp_path / "decoder").mkdir()
    (tmp_path / "documents" / "seal.txt").write_text("A seal eats fish on the ice.")
    write_decoder(tmp_path / "decoder")
    run(
        ingest,
        "corpus.path=documents",
        "index.path=index",
        "embedder=bag_of_words",
        "chunker.size=16",
        "chunker.overlap=0",
    )
    monkeypatch.setattr(chunk_cache, "prefill_passages", computed)
    ask = ("index.path=index", "generator.weights=decoder", "generator.dtype=float32")
    with pytest.raises(UserError, match=r"GB, more than limit_gb=1e-05: add force=true .*int8"):
        run(prefill, *ask, "limit_gb=1e-5")
    told = capsys.readouterr().out
    assert "tokens to prefill, at 0.1 kB a token: about " in told
    assert not list((tmp_path / "index" / "chunk_kv").glob("*.npy"))
    out = run(prefill, *ask, "limit_gb=1e-5", "force=true")
    [estimate] = [line for line in out.splitlines() if "to prefill" in line]
    assert estimate == told.splitlines()[-1]
    assert "computed)" in out and list((tmp_path / "index" / "chunk_kv").glob("*.npy"))
    out = run(prefill, *ask, "limit_gb=1e-5")  # nothing is left to write
    assert out.startswith("0 texts of 0 tokens to prefill") and "(0 computed)" in out
