"""Exported checkpoints are the checkpoints that were loaded: weights bit for bit, token ids, greedy tokens."""

import json
from dataclasses import asdict, replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from rag.bench.peers.llama_cpp import open_llama_cpp
from rag.generate.engine import Engine
from rag.models import tensor_files
from rag.models.adapters import LoraAdapter, merge, save_adapter
from rag.models.checkpoint import dotted, fill
from rag.models.export import export, tensors_by_name
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama.model import abstract
from rag.models.tokenizer.export import huggingface_files
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message, UserError
from tests.generate.decode import alone, batch
from tests.one_sentence import is_one_sentence
from tests.tiny_models import DECODER, byte_level, decoder_gguf, write_decoder, write_gguf
from tests.trials import tries

LLAMA3 = {
    "rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
FAMILIES = {
    "llama": DECODER,
    "llama3": replace(DECODER, head_dim=32, tie_word_embeddings=False, rope_theta=5e5),
    "linear": replace(DECODER, rope_factors=(2.5,) * 4),
    "qwen2": replace(DECODER, qkv_bias=True, rope_theta=1e6),
    "qwen3": replace(DECODER, qk_norm=True, head_dim=16),
}
SCALING = {"llama3": LLAMA3, "linear": {"rope_type": "linear", "factor": 2.5}}
PROMPT = [Message("user", "hello world")]
QUESTIONS = (
    "What is the capital of France?",
    "Explain why the sky is blue in two sentences.",
    "List three uses of copper.",
    "Who wrote Hamlet, and when?",
    "What is 12 times 12?",
    "Name a large mammal that lives in the ocean.",
    "Write a haiku about rain.",
    "What does a thermostat do?",
)
TEXTS = (
    "",
    "hello world",
    " 1234  in\n\nworld",
    "Caf\u00e9 \u6ce8 \U0001f916",
    "<|im_end|>a<tool>",
    "[PAD281]",
)


@pytest.fixture(autouse=True)
def cache(request, tmp_path, monkeypatch):
    if not request.node.get_closest_marker("weights"):  # whose conversion takes long
        monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def write_folder(folder: Path, family: str = "llama", **values) -> Path:
    """Write a Hugging Face folder with random weights; `values` are for its config.json."""
    folder.mkdir()
    config, rng = FAMILIES[family], np.random.default_rng(0)
    model = jax.tree.map(
        lambda leaf: rng.normal(leaf.ndim == 1, 0.4, leaf.shape).astype(np.float32), abstract(config)
    )
    tensors = tensors_by_name(model, llama_checkpoint.huggingface_table(config))
    safetensors.numpy.save_file(tensors, folder / "model.safetensors")
    stated = asdict(config) | {"model_type": "llama" if family in SCALING else family, "dtype": "float32"}
    for name in ("rope_factors", "qkv_bias", "qk_norm"):
        del stated[name]
    stated |= {"rope_scaling": SCALING.get(family)} | values
    (folder / "config.json").write_text(json.dumps(stated))
    for name, content in huggingface_files(byte_level()).items():
        (folder / name).write_text(content)
    return folder


def weights(model) -> dict[str, np.ndarray]:
    return {dotted(path): np.asarray(leaf.get_value()) for path, leaf in nnx.to_flat_state(nnx.state(model))}


def assert_same_weights(source: Path, exported: Path) -> list[Tokenizer]:
    """Compare the weights bit for bit, and return the tokenizers."""
    (model, tokenizer), (other, others) = llama_checkpoint.load(source), llama_checkpoint.load(exported)
    jax.tree.map(partial(np.testing.assert_array_equal, strict=True), weights(model), weights(other))
    return [tokenizer, others]


def assert_equal(source: Path, exported: Path) -> None:
    """Compare the weights bit for bit, and the ids of texts and of a conversation."""
    tokenizer, others = assert_same_weights(source, exported)
    for text in TEXTS:
        for special in (True, False):
            ids = tokenizer.encode(text, special=special, parse_special=not special)
            assert others.encode(text, special=special, parse_special=not special) == ids
        assert others.decode(ids) == tokenizer.decode(ids)
        messages = [Message("system", "Be brief."), Message("user", text)]
        assert others.chat(messages) == tokenizer.chat(messages)
    for name in ("bos_id", "eos_ids", "unk_id", "pad_id"):
        assert getattr(others.spec, name) == getattr(tokenizer.spec, name)


def greedy_tokens(checkpoint: Path) -> list[int]:
    model, tokenizer = llama_checkpoint.load(checkpoint)
    return alone(Engine(jax.device_put(model), ()), tokenizer.chat(PROMPT), 8)


@pytest.mark.parametrize("family", FAMILIES)
def test_any_sequence_of_exports_is_exact(family, tmp_path):
    source = write_folder(tmp_path / "source", family)
    export(source, tmp_path / "copy")
    export(source, tmp_path / "model.gguf", format="gguf")
    export(tmp_path / "model.gguf", tmp_path / "copy.gguf", format="gguf")
    export(tmp_path / "copy.gguf", tmp_path / "back")
    for name in ("copy", "model.gguf", "copy.gguf", "back"):
        assert_equal(source, tmp_path / name)
    tokens = greedy_tokens(source)
    assert greedy_tokens(tmp_path / "back") == tokens and len(set(tokens)) > 2
    if find_spec("llama_cpp"):
        prompt = llama_checkpoint.load(source)[1].chat(PROMPT)
        assert list(open_llama_cpp(tmp_path / "copy.gguf", 64).write(prompt, len(tokens))) == tokens


@tries(20, 500)
@given(
    st.sampled_from(["llama", "qwen2", "qwen3"]),
    st.integers(1, 3),
    st.integers(1, 3),
    st.integers(1, 4),
    st.booleans(),
)
def test_names_and_row_orders_are_the_inverse_of_those_that_load(family, kv_heads, groups, half, tied):
    config = replace(
        FAMILIES[family],
        num_attention_heads=groups * kv_heads,
        num_key_value_heads=kv_heads,
        head_dim=2 * half,
        tie_word_embeddings=tied,
    )
    rng = np.random.default_rng(0)
    model = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape), abstract(config))
    for table in (llama_checkpoint.huggingface_table(config), llama_checkpoint.gguf_table(config, family)):
        again = fill(abstract(config), tensors_by_name(model, table), table, "here")
        jax.tree.map(np.testing.assert_array_equal, weights(model), weights(again))


def test_an_adapter_is_merged(tmp_path):
    source, rng = write_folder(tmp_path / "source"), np.random.default_rng(1)
    shapes = {"layers.0.self_attn.q_proj": (32, 32), "layers.1.mlp.down_proj": (48, 32)}
    factors = {
        path: tuple(rng.normal(size=(2, size)).astype(np.float32) for size in sizes)
        for path, sizes in shapes.items()
    }
    adapter = LoraAdapter(2, 4.0, llama_checkpoint.checkpoint_sha256(source), factors)
    card = {"base": "tiny", "data": [], "metrics": {}, "commit": None, "seconds": 0.0}
    save_adapter(tmp_path / "adapter", adapter, card, "float32")
    merged = weights(merge(llama_checkpoint.load(source)[0], adapter))
    for name, format in (("model.gguf", "gguf"), ("folder", "huggingface")):
        export(source, tmp_path / name, format=format, adapter=tmp_path / "adapter")
        found = weights(llama_checkpoint.load(tmp_path / name)[0])
        jax.tree.map(np.testing.assert_array_equal, found, merged)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "q8_0"])
def test_smaller_dtypes_round_each_weight_once(dtype, tmp_path):
    source = write_folder(tmp_path / "source")
    want = weights(llama_checkpoint.load(source)[0])
    export(source, tmp_path / "model.gguf", format="gguf", dtype=dtype)
    kinds = {
        tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(tmp_path / "model.gguf").tensors
    }
    kind = {"float16": "F16", "bfloat16": "BF16", "q8_0": "Q8_0"}[dtype]
    assert kinds["blk.0.ffn_up.weight"] == kind and kinds["blk.0.ffn_norm.weight"] == "F32"
    # rows of 48 numbers are not divided by blocks of 32
    assert kinds["blk.0.ffn_down.weight"] == ("F32" if dtype == "q8_0" else kind)
    found = weights(llama_checkpoint.load(tmp_path / "model.gguf")[0])
    for path, weight in want.items():
        if weight.ndim == 1 or (dtype == "q8_0" and weight.shape[1] % 32):
            rounded = weight
        elif dtype == "q8_0":
            rounded = gguf.dequantize(
                gguf.quantize(weight, gguf.GGMLQuantizationType.Q8_0), gguf.GGMLQuantizationType.Q8_0
            )
            assert np.abs(rounded - weight).max() < np.abs(weight).max() / 127
        else:
            rounded = weight.astype(jnp.dtype(dtype)).astype(np.float32)
        np.testing.assert_array_equal(found[path], rounded)
    if dtype == "q8_0":
        with pytest.raises(UserError, match="only GGUF files have dtype=q8_0; set format=gguf"):
            export(source, tmp_path / "folder", dtype=dtype)
        return
    export(source, tmp_path / "folder", dtype=dtype)
    assert tensor_files.read_config(tmp_path / "folder")["torch_dtype"] == dtype
    found = weights(llama_checkpoint.load(tmp_path / "folder")[0])
    for path, weight in want.items():
        np.testing.assert_array_equal(found[path], weight.astype(jnp.dtype(dtype)).astype(np.float32))


def test_a_gguf_source_hands_its_metadata_on(tmp_path):
    source, target = tmp_path / "source.gguf", tmp_path / "model.gguf"
    metadata, tensors = decoder_gguf()
    metadata |= {"general.license": "apache-2.0", "general.languages": ["en"], "general.file_type": 3}
    write_gguf(source, metadata | {"llama.large": 1 << 40, "llama.negative": -1}, tensors)
    export(source, target, format="gguf")
    (want, _), (found, _) = tensor_files.read_gguf(source), tensor_files.read_gguf(target)
    assert want["llama.large"] == 1 << 40 and want["general.license"] == "apache-2.0"
    assert found.keys() == want.keys() | {"general.quantization_version"}
    for key, value in (want | {"general.file_type": 0}).items():
        assert found[key] == (pytest.approx(value) if isinstance(value, float) else value), key
    types = {key: field.types[0].name for key, field in gguf.GGUFReader(target).fields.items()}
    assert types["llama.block_count"] == types["tokenizer.ggml.bos_token_id"] == "UINT32"
    assert_same_weights(source, target)


# --- what is refused, and what a failure leaves


def refused(source: Path, target: Path, **options) -> str:
    """Return the sentence with which an export is refused, which leaves no file behind."""
    before = sorted(target.parent.rglob("*"))
    with pytest.raises(UserError) as error:
        export(source, target, **options)
    left = [path for path in target.parent.rglob("*") if "cache" not in path.parts]
    assert is_one_sentence(str(error.value))
    assert sorted(left) == [path for path in before if "cache" not in path.parts]
    return str(error.value)


def test_an_existing_target_is_replaced_only_if_asked(tmp_path):
    source = write_folder(tmp_path / "source")
    (tmp_path / "model.gguf").write_text("notes")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "notes").touch()
    for name, format in (("model.gguf", "gguf"), ("folder", "huggingface")):
        target = tmp_path / name
        assert "exists already: choose another output.path, or add output.overwrite=true." in refused(
            source, target, format=format
        )
        assert "so it is not replaced" in refused(source, target, format=format, overwrite=True)
    assert (tmp_path / "model.gguf").read_text() == "notes" and (tmp_path / "folder" / "notes").exists()
    for name, format in (("new.gguf", "gguf"), ("new", "huggingface")):
        export(source, tmp_path / name, format=format, dtype="float16")
        export(source, tmp_path / name, format=format, overwrite=True)
        assert_equal(source, tmp_path / name)


def test_a_full_disk_is_one_sentence_and_leaves_nothing(tmp_path, monkeypatch):
    source = write_folder(tmp_path / "source")

    def fail(*_, **__):
        raise OSError("64 requested and 0 written")  # as numpy says it

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensors_to_file", fail)
    assert "64 requested and 0 written" in refused(source, tmp_path / "model.gguf", format="gguf")
    monkeypatch.setattr(safetensors.numpy, "save_file", fail)
    assert "64 requested and 0 written" in refused(source, tmp_path / "folder")


def test_what_a_format_cannot_express_is_refused(tmp_path):
    yarn = write_folder(tmp_path / "scaled", "qwen2", rope_scaling=LLAMA3)
    assert "only for the architecture llama" in refused(yarn, tmp_path / "a.gguf", format="gguf")
    plain = write_decoder(tmp_path / "plain")
    assert "byte-level BPE with merges" in refused(plain, tmp_path / "b.gguf", format="gguf")
    metadata, tensors = decoder_gguf()
    write_gguf(tmp_path / "c.gguf", metadata, tensors | {"rope_freqs.weight": np.float32([1, 3])})
    assert "in another way than Llama 3.1 to 3.3" in refused(tmp_path / "c.gguf", tmp_path / "c")
    for i in range(2):
        sizes = {
            "attn_q.bias": 16,
            "attn_k.bias": 8,
            "attn_v.bias": 8,
            "attn_q_norm.weight": 4,
            "attn_k_norm.weight": 4,
        }
        tensors |= {f"blk.{i}.{name}": np.ones(size, np.float32) for name, size in sizes.items()}
    write_gguf(tmp_path / "d.gguf", metadata, tensors)
    assert "no architecture has both" in refused(tmp_path / "d.gguf", tmp_path / "d")


@pytest.mark.long
@pytest.mark.weights
def test_the_default_weights_in_llama_cpp(generator_weights, tmp_path):
    pytest.importorskip("llama_cpp")
    export(generator_weights, tmp_path / "model.gguf", format="gguf")
    model, tokenizer = llama_checkpoint.load(generator_weights)
    prompts = [tokenizer.chat([Message("user", question)]) for question in QUESTIONS]
    peer = open_llama_cpp(tmp_path / "model.gguf", 128)
    ours = batch(Engine(jax.device_put(model), ()), prompts, 32)
    assert [list(peer.write(prompt, 32)) for prompt in prompts] == ours
