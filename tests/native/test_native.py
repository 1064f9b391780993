"""The C++ decoder against the same maths in JAX."""

import os
import subprocess
import sys
from dataclasses import replace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from rag import native
from rag.generate.engine import Engine
from rag.models.checkpoint import quantized
from rag.models.llama import model as llama
from rag.runtime import cache as disk_cache
from tests.damage import WAYS
from tests.tiny import CONFIG, tiny_model

needs_compiler = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")


# Widths that AMX tiles divide, and CONFIG's, which they don't.
WIDE = replace(CONFIG, hidden_size=64, intermediate_size=128, head_dim=48, vocab_size=320)
SLOTS = 96  # more than one tile of attention


@pytest.fixture
def model():
    return quantized(tiny_model())


def filled_cache(config: llama.LlamaConfig, batch: int) -> llama.KVCache:
    rng = np.random.default_rng(0)
    shape = (batch, config.num_key_value_heads, SLOTS, config.head_dim)

    def arrays():
        count = config.num_hidden_layers
        return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float16) for _ in range(count))

    return llama.KVCache(arrays(), arrays())


@needs_compiler
@pytest.mark.parametrize("config", [CONFIG, WIDE], ids=["tiny", "wide"])
@pytest.mark.parametrize(
    "positions",
    [
        [[0]],
        [[SLOTS - 1]],
        [[70], [3], [40]],  # a batch, a token each
        [[12, 13, 14]],
        [list(range(60, 69))],  # one more than a block of tokens
        [[5, 2, 80, 77, 31], [90, 0, 1, 64, 63]],  # anywhere, in any order
        [list(range(30, 94))],
    ],
    ids=lambda positions: f"{len(positions)}x{len(positions[0])}",
)
def test_tokens_through_all_layers_equal_jax(config, positions):
    model = quantized(tiny_model(config=config))
    at, cache = np.asarray(positions, np.int32), filled_cache(config, len(positions))
    tokens = np.arange(at.size, dtype=np.int32).reshape(at.shape) * 7 % 300
    want, want_cache = jax.jit(llama.forward)(model, tokens, at, cache)
    want_logits = llama.logits(model, want[:, -1])
    llama.use_native(model)
    assert model.native
    got, got_cache = jax.jit(llama.forward)(model, tokens, at, cache)
    close(got, want)
    close(llama.logits(model, want[:, -1]), want_logits)
    for new, old in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        close(new, old)


@needs_compiler
@pytest.mark.parametrize("position", [-1, SLOTS, SLOTS + 7])
def test_a_position_outside_of_the_cache_is_refused(position):
    """It would be written in front of the cache's memory, or over its last slot."""
    model, cache = quantized(tiny_model()), filled_cache(CONFIG, 2)
    llama.use_native(model)
    at = np.asarray([[3], [position]], np.int32)
    with pytest.raises(jax.errors.JaxRuntimeError, match="outside of the cache"):
        jax.block_until_ready(jax.jit(llama.forward)(model, np.ones((2, 1), np.int32), at, cache))


@needs_compiler
@pytest.mark.parametrize("rows", [1, 3])
def test_prompts_longer_than_a_call_are_read_in_blocks(rows, monkeypatch):
    monkeypatch.setattr(native, "_AT_ONCE", 20)
    model = quantized(tiny_model(config=WIDE))
    tokens, starts = np.arange(rows * 40, dtype=np.int32).reshape(rows, 40), np.zeros(rows, np.int32)
    empty = jax.tree.map(lambda a: jnp.zeros_like(a[:, :, :40]), filled_cache(WIDE, rows))
    want, want_cache = jax.jit(llama.forward)(model, tokens, starts, empty)
    llama.use_native(model)
    got, got_cache = jax.jit(llama.forward)(model, tokens, starts)
    close(got, want, 5e-3)  # without AMX a prompt is read before it is rounded to float16
    for new, old in zip(jax.tree.leaves(got_cache), jax.tree.leaves(want_cache), strict=True):
        close(new, old, 5e-3)


def close(got, want, by: float = 2e-3) -> None:
    np.testing.assert_allclose(got, want, atol=by * np.abs(want).max())


@needs_compiler
@pytest.mark.parametrize(
    ("rows", "width", "outputs"),
    [(1, 64, 48), (1, 50, 7), (3, 64, 33), (20, 192, 80), (70, 128, 16), (9, 128, 37)],
)
def test_products_equal_numpy(rows, width, outputs):
    rng = np.random.default_rng(rows)
    x = (rng.standard_normal((rows, width)) * rng.exponential(size=width)).astype(np.float32)
    values = rng.integers(-127, 128, (outputs, width)).astype(np.int8)
    scale = rng.exponential(size=outputs).astype(np.float32)
    want = x.astype(np.float64) @ (values * scale[:, None].astype(np.float64)).T
    got = jax.jit(native.linear)(x, values, scale)
    np.testing.assert_allclose(got, want, atol=1e-4 * np.abs(want).max())


@needs_compiler
def test_rows_of_zeros_stay_zero():
    got = native.linear(jnp.zeros((3, 64)), jnp.ones((16, 64), jnp.int8), jnp.ones(16))
    np.testing.assert_array_equal(got, 0)


@needs_compiler
def test_decoding_writes_the_same_tokens(model):
    prompts = [[5, 9, 200, 31, 7], list(range(40, 120))]
    want = [Engine(model, ()).generate([prompt], 12)[0] for prompt in prompts]
    llama.use_native(model)
    engine = Engine(model, ())
    assert [engine.generate([prompt], 12)[0] for prompt in prompts] == want
    assert engine.generate(prompts, 12) == want


def test_what_it_cannot_read_is_left_to_xla():
    plain = tiny_model()
    llama.use_native(plain)
    assert not plain.native  # float weights
    biased = quantized(llama.Llama(replace(CONFIG, qkv_bias=True), nnx.Rngs(0)))
    llama.use_native(biased)
    assert not biased.native


def test_without_a_compiler_there_is_none(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(native.shutil, "which", lambda name: None)
    assert native._library() is None


def test_a_compiler_that_fails_leaves_nothing(monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    monkeypatch.setattr(native, "_FLAGS", ("--no-such-flag",))
    assert native._library() is None
    [log] = tmp_path.rglob("*.log")
    told = capsys.readouterr().err
    assert f"XLA does its work: {log}" in told and told.count("\n") == 1
    assert "no-such-flag" in log.read_text()
    assert not list(tmp_path.rglob("*.so"))
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("asked again"))
    assert native._library() is None and capsys.readouterr().err == ""


@pytest.fixture
def build(monkeypatch, tmp_path):
    """A build that takes no time; the paths of what it wrote."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(native.shutil, "which", lambda name: "g++")
    monkeypatch.setattr(native, "_version", lambda compiler: "g++ 1.0")
    built = []

    def write(compiler, path, log):
        built.append(path)
        disk_cache.write(path, b"\x7fELF" * 100)

    monkeypatch.setattr(native, "_build", write)
    return built


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_library_is_built_again(build, way, capsys):
    path = native._library()
    assert native._library() == path and build == [path] and capsys.readouterr().err == ""
    WAYS[way](path)
    assert native._library() == path and build == [path, path]
    assert (f"{path} " in capsys.readouterr().err) == (way != "gone")


def test_a_damaged_library_that_cannot_be_built_again_is_not_loaded(build, monkeypatch, capsys):
    path = native._library()
    WAYS["middle"](path)
    monkeypatch.undo()
    monkeypatch.setenv("RAG_CACHE", str(path.parents[1]))
    monkeypatch.setattr(native, "_FLAGS", ("--no-such-flag",))
    monkeypatch.setattr(native, "_version", lambda compiler: "g++ 1.0")
    native._build(native.shutil.which("g++") or "g++", path, path.with_suffix(".log"))
    assert not path.exists()
    assert "XLA does its work" in capsys.readouterr().err


def test_a_folder_that_others_may_write_to_is_refused(build, capsys):
    path = native._library()
    os.chmod(path.parent, 0o777)
    assert unloaded() is None
    told = capsys.readouterr().err
    assert (
        f"run `chmod -R go-w {path.parent}`" in told and "XLA does its work" in told and told.count("\n") == 1
    )


def unloaded():
    """What a process that has not loaded the library yet gets."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(native, "_WANTED", True)
        patch.setattr(native, "cpu_flags", lambda: ("avx2",))
        return native._loaded.__wrapped__()


@needs_compiler
@pytest.mark.parametrize(
    ("source", "reason"),
    [
        ("int Another() { return 0; }", "RagHasTiles"),
        ("bool RagHasTiles() { return true; }", "Rag"),
        (None, ""),
    ],
)
def test_a_library_that_lacks_a_symbol_is_left_alone(monkeypatch, tmp_path, source, reason, capsys):
    path = tmp_path / "library.so"
    if source:
        (tmp_path / "source.cc").write_text(f'extern "C" {{ {source} }}')
        subprocess.run(["g++", "-shared", "-fPIC", str(tmp_path / "source.cc"), "-o", str(path)], check=True)
    else:
        path.write_text("no library")
    monkeypatch.setattr(native, "_library", lambda: path)
    assert unloaded() is None
    told = capsys.readouterr().err
    assert told.startswith("The native library cannot be used, so XLA does its work: ") and reason in told
    assert told.count("\n") == 1


def test_it_can_be_switched_off():
    code = "from rag import native; raise SystemExit(native.available())"
    done = subprocess.run([sys.executable, "-c", code], env=os.environ | {"RAG_NATIVE": "0"}, check=False)
    assert done.returncode == 0


@needs_compiler
def test_small_numbers_stay_what_they_are():
    """A library linked with -ffast-math would flush them to zero in the whole process."""
    assert np.float32(1e-45) / np.float32(1) > 0 and np.float64(5e-324) * 1.0 > 0


@needs_compiler
def test_the_library_is_built_once(monkeypatch, tmp_path):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    built = native._library()
    monkeypatch.setattr(native, "_build", lambda *_: pytest.fail("built again"))
    assert built.is_file() and native._library() == built
