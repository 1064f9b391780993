"""GGUF and safetensors files give the same float32 weights, and damaged ones raise one sentence."""

import json

import gguf
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from rag.models import gguf_file, tensor_files
from rag.models.gguf_file import Tensor
from rag.types import UserError


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

    assert gguf_file.is_gguf(path)
    metadata, tensors = tensor_files.read_gguf(path)
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
    tensors = tensor_files.GgufTensors({"here": tensor}, "a file")
    monkeypatch.setattr(gguf, "dequantize", lambda *_: pytest.fail("it was dequantised"))
    assert "here" in tensors
    assert "there" not in tensors


def test_a_file_that_is_no_gguf_is_an_error(tmp_path):
    path = tmp_path / "model.gguf"
    path.write_bytes(b"GGUF" + b"\0" * 3)
    with pytest.raises(UserError, match=r"cannot read .*model.gguf as GGUF"):
        tensor_files.read_gguf(path)
    path.write_bytes(b"something else")
    assert not gguf_file.is_gguf(path)


def test_safetensors_of_one_file_and_of_shards(tmp_path):
    one = np.arange(6, dtype=np.float32).reshape(2, 3)
    half = np.array([1.5, -2.0], ml_dtypes.bfloat16)
    save_file({"one": one, "half": half}, tmp_path / "model.safetensors")
    read = tensor_files.read_safetensors(tmp_path)
    np.testing.assert_array_equal(read["one"], one)
    np.testing.assert_array_equal(read["half"].astype(np.float32), [1.5, -2.0])

    sharded = tmp_path / "sharded"
    sharded.mkdir()
    save_file({"a": one}, sharded / "model-1.safetensors")
    save_file({"b": one + 1}, sharded / "model-2.safetensors")
    index = {"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}}
    (sharded / "model.safetensors.index.json").write_text(json.dumps(index))
    np.testing.assert_array_equal(tensor_files.read_safetensors(sharded)["b"], one + 1)


def test_safetensors_that_are_missing_or_damaged_are_errors(tmp_path):
    with pytest.raises(UserError, match=r"holds neither model\.safetensors"):
        tensor_files.read_safetensors(tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"not a checkpoint")
    with pytest.raises(UserError, match="fetch the file again"):
        tensor_files.read_safetensors(tmp_path)


@pytest.mark.parametrize(
    ("index", "message"),
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
def test_a_shard_index_that_is_wrong_is_an_error(tmp_path, index, message):
    (tmp_path / "one.safetensors").touch()
    (tmp_path / "model.safetensors.index.json").write_text(index)
    with pytest.raises(UserError, match=message):
        tensor_files.read_safetensors(tmp_path)


def test_a_configuration_that_is_missing_or_incomplete_is_an_error(tmp_path):
    with pytest.raises(UserError, match=r"holds no config\.json"):
        tensor_files.read_config(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        tensor_files.read_config(tmp_path)
