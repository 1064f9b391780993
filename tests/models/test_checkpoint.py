"""Tables are strict, GGUF and safetensors files give the same weights, and conversion happens once."""

import errno
import json
import os
from functools import partial

import gguf
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from rag.models import checkpoint
from rag.models.checkpoint import Rule
from rag.models.gguf_file import Tensor
from rag.runtime import cache, files
from rag.types import UserError


class Block(nnx.Module):
    def __init__(self):
        self.weight = nnx.Param(jnp.zeros((3, 2)))


class Toy(nnx.Module):
    def __init__(self):
        self.layers = nnx.List([Block(), Block()])
        self.norm = nnx.Param(jnp.zeros(5))


TABLE = (Rule("blk.{i}.w", "layers.{i}.weight", np.negative), Rule("n", "norm"), Rule("buffer.{i}", None))


@pytest.fixture
def tensors():
    values = np.arange(12, dtype=np.float32).reshape(2, 3, 2)
    return {"blk.0.w": values[0], "blk.1.w": values[1], "n": np.ones(5, np.float32), "buffer.7": np.zeros(1)}


@pytest.fixture
def toy():
    return nnx.eval_shape(Toy)


def test_fill_maps_names_and_transforms(toy, tensors):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    np.testing.assert_array_equal(filled.layers[1].weight[...], -tensors["blk.1.w"])
    np.testing.assert_array_equal(filled.norm[...], tensors["n"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("n"), "1 missing .norm."),
        (lambda t: t.update(extra=np.zeros(1)), "1 unknown .extra."),
        (lambda t: t.update({"blk.2.w": np.zeros((3, 2))}), "unknown .layers.2.weight."),
        (lambda t: t.update(n=np.zeros(4, np.float32)), r"shape \(4,\)"),
        (lambda t: t.update(n_=np.zeros(5)), "unknown .n_."),
    ],
)
def test_fill_is_strict(toy, tensors, change, message):
    change(tensors)
    with pytest.raises(UserError, match=message):
        checkpoint.fill(toy, tensors, TABLE, "toy")


def test_copied_layers_are_what_tracing_each_gives(toy, tensors):
    copied = nnx.eval_shape(Toy)
    copied.layers = checkpoint.copies(copied.layers[0], 2)
    assert nnx.split(copied)[0] == nnx.split(toy)[0]
    filled = checkpoint.fill(copied, tensors, TABLE, "toy")  # each layer has a place of its own
    np.testing.assert_array_equal(filled.layers[0].weight[...], -tensors["blk.0.w"])
    np.testing.assert_array_equal(filled.layers[1].weight[...], -tensors["blk.1.w"])


def test_saved_parameters_come_back_memory_mapped(toy, tensors, tmp_path):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    checkpoint.save_module(filled, tmp_path)
    loaded = checkpoint.load_module(toy, tmp_path)
    assert isinstance(loaded.norm.get_value(), np.memmap)
    on_device = checkpoint.to_device(loaded, jnp.dtype("bfloat16"))
    assert on_device.norm[...].dtype == jnp.bfloat16
    for a, b in zip(
        jax.tree.leaves(filled),
        jax.tree.leaves(checkpoint.to_device(loaded, jnp.dtype("float32"))),
        strict=True,
    ):
        np.testing.assert_array_equal(a, b)


def test_huge_pages_hold_the_same(toy, tensors):
    filled = checkpoint.fill(toy, tensors, TABLE, "toy")
    copied = checkpoint.in_huge_pages(filled)
    for new, old in zip(jax.tree.leaves(copied), jax.tree.leaves(filled), strict=True):
        np.testing.assert_array_equal(new, old)
        assert new is not old and new.ctypes.data % 64 == 0
    assert jax.tree.structure(copied) == jax.tree.structure(filled)


def test_gguf_round_trip(tmp_path):
    rng = np.random.default_rng(0)
    arrays = {
        "plain": rng.normal(size=(4, 32)).astype(np.float32),
        "half": rng.normal(size=(4, 32)).astype(np.float16),
    }
    dense = rng.normal(size=(8, 64)).astype(np.float32)
    quantised = gguf.quants.quantize(dense, gguf.GGMLQuantizationType.Q8_0)
    path = tmp_path / "toy"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint32("llama.block_count", 3)
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    for name, array in arrays.items():
        writer.add_tensor(name, array)
    writer.add_tensor("q8", quantised, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    assert checkpoint.is_gguf(path)
    metadata, tensors = checkpoint.read_gguf(path)
    assert metadata["general.architecture"] == "llama"
    assert metadata["llama.block_count"] == 3
    assert metadata["tokenizer.ggml.tokens"] == ["a", "b"]
    assert set(tensors) == {"plain", "half", "q8"}
    np.testing.assert_array_equal(tensors["plain"], arrays["plain"])
    np.testing.assert_array_equal(tensors["half"], arrays["half"].astype(np.float32))
    np.testing.assert_allclose(tensors["q8"], dense, atol=np.abs(dense).max() / 127)
    assert all(tensor.dtype == np.float32 for tensor in tensors.values())


def test_to_ask_whether_a_gguf_has_a_tensor_does_not_read_it(monkeypatch):
    tensor = Tensor("here", gguf.GGMLQuantizationType.F32, (1,), np.zeros(4, np.uint8))
    tensors = checkpoint.GgufTensors({"here": tensor}, "a file")
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("it was dequantised"))
    assert "here" in tensors
    assert "there" not in tensors


def test_a_file_that_is_no_gguf_is_told(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 3)
    with pytest.raises(UserError, match=r"cannot read .*model.gguf as GGUF"):
        checkpoint.read_gguf(path)
    path.write_bytes(b"something else")
    assert not checkpoint.is_gguf(path)


def test_safetensors_of_one_file_and_of_shards(tmp_path):
    one = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    save_file({"one": one, "half": half}, tmp_path / "model.safetensors")
    read = checkpoint.read_safetensors(tmp_path)
    np.testing.assert_array_equal(read["one"], one)
    np.testing.assert_array_equal(read["half"].astype(np.float32), [1.5, -2.0])

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file({"a": one}, sharded / "model-1.safetensors")
    save_file({"b": one + 1}, sharded / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(checkpoint.read_safetensors(sharded)["b"], one + 1)


def test_safetensors_that_are_missing_or_damaged_are_told(tmp_path):
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        checkpoint.read_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="fetch the file again"):
        checkpoint.read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "told"),
    [
        ("{", "is not valid JSON"),
        ("[]", "holds no JSON object"),
        ("{}", "holds no weight_map"),
        ('{"weight_map": {"a": 1}}', "holds no weight_map"),
        (
            '{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}',
            r"1 missing \(two\.safetensors\)",
        ),
    ],
)
def test_a_shard_index_that_is_wrong_is_told(tmp_path, index, told):
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=told):
        checkpoint.read_safetensors(tmp_path)


def test_a_configuration_that_is_missing_or_incomplete_is_told(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        checkpoint.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        checkpoint.read_config(tmp_path)


def test_the_same_bytes_are_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source, calls = tmp_path / "source", []

    def convert(label, folder):
        calls.append(label)
        (folder / "out").write_text(label)

    source.write_text("weights")
    first = checkpoint.keep("toy", [source], partial(convert, "first"))
    assert checkpoint.keep("toy", [source], partial(convert, "second")) == first
    assert (first / "out").read_text() == "first"
    source.write_text("other weights")
    assert (checkpoint.keep("toy", [source], partial(convert, "third")) / "out").read_text() == "third"
    other = checkpoint.keep("another toy", [source], partial(convert, "as another"))
    assert (other / "out").read_text() == "as another"
    assert calls == ["first", "third", "as another"]


def test_what_other_code_converted_is_not_found_and_what_is_equal_takes_no_room(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source, code = tmp_path / "source", ["one"]
    source.write_text("weights")
    monkeypatch.setattr(checkpoint, "code_version", lambda convert: code[0])

    def convert(folder):
        (folder / "same.npy").write_text("as before")
        (folder / "other.npy").write_text(code[0])

    first = checkpoint.keep("toy", [source], convert)
    code[0] = "two"
    second = checkpoint.keep("toy", [source], convert)
    assert [(folder / "other.npy").read_text() for folder in (first, second)] == ["one", "two"]
    assert (first / "same.npy").samefile(second / "same.npy")
    assert not (first / "other.npy").samefile(second / "other.npy")
    assert sorted(path.name for path in second.iterdir()) == [cache.CHECKSUMS, "other.npy", "same.npy"]


def test_a_file_of_a_folder_that_is_renamed_is_another_checkpoint(tmp_path, monkeypatch):
    """In a folder a name says what a file is; a file that is all of a checkpoint may be called anything."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    for folder, name in (("one", "a.json"), ("two", "b.json"), ("three", "a.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
        (tmp_path / folder / "model").write_text("weights")
    one, two, three = (
        checkpoint.contents(sorted((tmp_path / folder).iterdir())) for folder in ("one", "two", "three")
    )
    assert one != two and one == three
    alone = (checkpoint.contents([tmp_path / path]) for path in ("one/a.json", "two/b.json", "one/model"))
    first, renamed, other = alone
    assert first == renamed != other


def test_a_cache_that_cannot_be_written_is_told_unless_all_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_text("weights")

    def fill_the_disk(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cache folder .*cache \(No space left.*RAG_CACHE"):
        checkpoint.keep("toy", [source], fill_the_disk)
    folder = checkpoint.keep("toy", [source], lambda folder: None)
    monkeypatch.setattr(files, "locked", lambda path: pytest.fail("a lock is a file in the cache"))
    assert checkpoint.keep("toy", [source], fill_the_disk) == folder


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_text("weights")

    def fail(folder):
        (folder / "half").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        checkpoint.keep("toy", [source], fail)
    assert not list((files.cache_root() / "converted").rglob("half"))
    assert (checkpoint.keep("toy", [source], lambda folder: (folder / "whole").touch()) / "whole").exists()
