"""Adapters: their two kinds of files, what is refused, and merging, on tiny decoders of two families."""

import json
import math
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st
from safetensors.numpy import load_file, save, save_file

from rag.models import adapters, placement
from rag.models.adapters import LoraAdapter, load_adapter, merge, save_adapter, save_peft
from rag.models.llama.model import forward, logits
from rag.models.tensor_files import read_safetensors_metadata
from rag.train.lora import TrainableLinear, make_trainable
from rag.types import UserError
from tests.damage import drawn_damage
from tests.one_sentence import is_one_sentence
from tests.reference import DECODER_TOLERANCE
from tests.tiny_adapters import CARD, tiny_adapter
from tests.tiny_models import DECODER, tiny_decoder
from tests.trials import tries

FAMILIES = {
    "llama": DECODER,
    "qwen2": replace(DECODER, qkv_bias=True, tie_word_embeddings=False, rms_norm_eps=1e-6),
}


def error_of(call, *arguments) -> str:
    with pytest.raises(UserError) as caught:
        call(*arguments)
    assert is_one_sentence(str(caught.value)), str(caught.value)
    return str(caught.value)


def assert_equal(one: LoraAdapter, other: LoraAdapter) -> None:
    assert (one.rank, one.alpha, one.tensors.keys()) == (other.rank, other.alpha, other.tensors.keys())
    for path, factors in one.tensors.items():
        for a, b in zip(factors, other.tensors[path], strict=True):
            np.testing.assert_array_equal(a, b)


def parameters(model) -> list[np.ndarray]:
    return [np.array(array) for array in jax.tree.leaves(model)]


# --- merging


@pytest.mark.parametrize("family", FAMILIES)
def test_the_merged_model_computes_what_the_trained_one_does(family):
    trained = tiny_decoder(config=FAMILIES[family])
    make_trainable(trained.layers, 3, 5.0, "float32", seed=1)
    rng, factors = np.random.default_rng(0), {}
    for path, layer in nnx.iter_modules(trained):
        if isinstance(layer, TrainableLinear):
            layer.adapter.b[...] = jnp.asarray(rng.normal(size=layer.adapter.b.shape), jnp.float32)
            both = layer.adapter.a, layer.adapter.b
            factors[".".join(map(str, path))] = tuple(np.asarray(half[...]) for half in both)
    assert len(factors) == 14
    base = tiny_decoder(config=FAMILIES[family])
    merged = placement.to_device(merge(base, LoraAdapter(3, 5.0, None, factors)), jnp.dtype("float32"))
    tokens = jnp.asarray(rng.integers(0, 256, (2, 9)), jnp.int32)
    expected, found, unchanged = (last_logits(model, tokens) for model in (trained, merged, base))
    assert np.abs(found - expected).max() <= DECODER_TOLERANCE * np.abs(expected).max()
    assert np.abs(unchanged - expected).max() > 0.1 * np.abs(expected).max()  # it is another model


def last_logits(model, tokens) -> np.ndarray:
    hidden, _ = forward(model, tokens, jnp.zeros(len(tokens), jnp.int32))
    return np.asarray(logits(model, hidden[:, -1]))


def test_merging_adds_the_product_and_changes_nothing_else():
    model, adapter = tiny_decoder(), tiny_adapter(DECODER, ["layers.1.mlp.up_proj"])
    before = parameters(model)
    [(a, b)] = adapter.tensors.values()
    weight = np.asarray(model.layers[1].mlp.up_proj.weight[...])
    merged = merge(model, adapter)
    expected = weight.astype(np.float64) + 4 / 2 * np.einsum("ro,rm->om", b.astype(np.float64), a)
    np.testing.assert_allclose(merged.layers[1].mlp.up_proj.weight[...], expected, rtol=1e-5, atol=1e-5)
    pairs = list(zip(parameters(merged), before, strict=True))
    assert sum(not np.array_equal(one, other) for one, other in pairs) == 1
    assert all(np.array_equal(one, other) for one, other in zip(parameters(model), before, strict=True))


def test_an_adapter_that_does_not_fit_the_model_is_refused():
    model, path = tiny_decoder(), "layers.0.self_attn.q_proj"
    wide = tiny_adapter(replace(DECODER, hidden_size=40), [path])
    assert "of shape (32, 40), which has the shape (32, 32)" in error_of(merge, model, wide)
    deep = tiny_adapter(replace(DECODER, num_hidden_layers=3))
    assert "7 unknown (layers.2.mlp.down_proj" in error_of(merge, model, deep)
    large = replace(tiny_adapter(DECODER, [path]), alpha=1e300)
    assert f"'{path}.weight' in DIR are not all finite" in error_of(merge, model, large, "DIR")


# --- files


@tries(suite=12, long=300)
@given(
    family=st.sampled_from(list(FAMILIES)),
    rank=st.sampled_from([1, 2, 7, 8, 40]),
    alpha=st.floats(-1e6, 1e6),
    seed=st.integers(0, 9),
    dtype=st.sampled_from(["bfloat16", "float32"]),
    some=st.booleans(),
)
def test_what_is_saved_is_loaded(family, rank, alpha, seed, dtype, some):
    paths = ["layers.0.mlp.down_proj", "layers.1.self_attn.k_proj"] if some else None
    adapter = tiny_adapter(FAMILIES[family], paths, rank=rank, alpha=alpha, seed=seed)
    rounded = replace(
        adapter,
        tensors={
            path: tuple(half.astype(jnp.dtype(dtype)).astype(np.float32) for half in factors)
            for path, factors in adapter.tensors.items()
        },
    )
    with TemporaryDirectory() as folder:
        ours, again, peft = (Path(folder) / name for name in ("new/ours", "again", "peft"))
        save_adapter(ours, adapter, CARD, dtype)
        assert_equal(load_adapter(ours), rounded)
        assert load_adapter(ours).base_sha256 == adapter.base_sha256
        assert adapters.read_card(ours).model_dump() == CARD
        save_adapter(again, load_adapter(ours), CARD, dtype)
        assert (ours / adapters.ADAPTER).read_bytes() == (again / adapters.ADAPTER).read_bytes()
        assert adapters.adapter_digest(ours) == adapters.adapter_digest(again)
        save_peft(peft, adapter, "a base")
        assert_equal(load_adapter(peft), adapter)
        assert load_adapter(peft).base_sha256 is None


def test_peft_files_have_its_names_and_layout(tmp_path):
    adapter = tiny_adapter(FAMILIES["qwen2"], ["layers.1.mlp.up_proj", "lm_head"])
    save_peft(tmp_path, adapter, "a base")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    names = ["base_model.model.lm_head", "base_model.model.model.layers.1.mlp.up_proj"]
    assert sorted(tensors) == [f"{name}.lora_{half}.weight" for name in names for half in "AB"]
    a, b = adapter.tensors["layers.1.mlp.up_proj"]
    np.testing.assert_array_equal(tensors[f"{names[1]}.lora_A.weight"], a)
    np.testing.assert_array_equal(tensors[f"{names[1]}.lora_B.weight"], b.T)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 4.0, ["lm_head", "up_proj"])


# What PEFT 0.17 writes for a plain LoRA of two projections.
PEFT = {
    "alpha_pattern": {}, "auto_mapping": None, "base_model_name_or_path": "a/b", "bias": "none", "corda_config": None,
    "eva_config": None, "exclude_modules": None, "fan_in_fan_out": False, "inference_mode": True,
    "init_lora_weights": True, "layer_replication": None, "layers_pattern": None, "layers_to_transform": None,
    "loftq_config": {}, "lora_alpha": 16, "lora_bias": False, "lora_dropout": 0.05, "megatron_config": None,
    "megatron_core": "megatron.core", "modules_to_save": None, "peft_type": "LORA", "qalora_group_size": 16, "r": 2,
    "rank_pattern": {}, "revision": None, "target_modules": ["v_proj", "q_proj"], "target_parameters": None,
    "task_type": "CAUSAL_LM", "trainable_token_indices": None, "use_dora": False, "use_qalora": False,
    "use_rslora": False,
}  # fmt: skip


def write_peft(folder: Path, dtype="float32", **settings) -> LoraAdapter:
    """Write an adapter as PEFT does, with these settings in its configuration, and return it."""
    adapter = tiny_adapter(DECODER, ["layers.0.self_attn.q_proj", "layers.0.self_attn.v_proj"])
    save_peft(folder, adapter)
    (folder / adapters.PEFT_CONFIG).write_text(json.dumps(PEFT | settings))
    tensors = load_file(folder / adapters.PEFT_TENSORS)
    half = {name: tensor.astype(jnp.dtype(dtype)) for name, tensor in tensors.items()}
    save_file(half, folder / adapters.PEFT_TENSORS)
    return adapter


@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_peft_folders_are_read_in_any_float_type(tmp_path, dtype):
    adapter = write_peft(tmp_path, dtype)
    loaded = load_adapter(tmp_path)
    assert (loaded.rank, loaded.alpha, loaded.tensors.keys()) == (2, 16.0, adapter.tensors.keys())
    for path, factors in adapter.tensors.items():
        for ours, half in zip(loaded.tensors[path], factors, strict=True):
            np.testing.assert_array_equal(ours, half.astype(jnp.dtype(dtype)).astype(np.float32))


def test_the_scale_of_rank_stabilised_lora(tmp_path):
    write_peft(tmp_path, use_rslora=True)
    loaded = load_adapter(tmp_path)
    assert loaded.alpha / loaded.rank == pytest.approx(16 / math.sqrt(2))


REFUSED = {  # by PEFT's settings, with a part of the sentence
    "use_dora": (True, "sets ['use_dora'], which is no plain LoRA"),
    "modules_to_save": (["lm_head"], "sets ['modules_to_save']"),
    "rank_pattern": ({"q_proj": 4}, "sets ['rank_pattern']"),
    "alpha_pattern": ({"q_proj": 4}, "sets ['alpha_pattern']"),
    "fan_in_fan_out": (True, "sets ['fan_in_fan_out']"),
    "layer_replication": ([[0, 2], [1, 2]], "sets ['layer_replication']"),
    "something new": ({"a": 1}, "sets ['something new']"),
    "bias": ("all", "bias: input should be 'none'"),
    "init_lora_weights": ("pissa", "init_lora_weights: input should be"),
    "peft_type": ("IA3", "peft_type: input should be 'LORA'"),
    "r": (4, "layers.0.self_attn.q_proj with shapes (2, 32) and (32, 2), where its rank is 4"),
    "lora_alpha": ("much", "lora_alpha: input should be a valid number"),
}


@pytest.mark.parametrize("setting", REFUSED)
def test_what_is_more_than_plain_lora_is_refused_by_name(tmp_path, setting):
    value, sentence = REFUSED[setting]
    write_peft(tmp_path, **{setting: value})
    assert sentence in error_of(load_adapter, tmp_path)


def changed(tensors: dict[str, np.ndarray], header: dict[str, str], way: str) -> bytes:
    """Return the file of an adapter with one thing wrong."""
    first = next(iter(tensors))
    match way:
        case "half missing":
            del tensors[first]
        case "of another rank":
            tensors[first] = tensors[first][:1]
        case "not a number":
            tensors[first] = np.full_like(tensors[first], np.nan)
        case "of one dimension":
            tensors[first] = tensors[first][0]
        case "unknown":
            tensors["base_model.model.model.embed_tokens.lora_embedding_A"] = tensors[first]
        case "of integers":
            tensors[first] = tensors[first].astype(np.uint16)
        case "empty":
            tensors = {}
        case "no header":
            header = {}
        case "another format":
            header = {"lora_adapter": header["lora_adapter"].replace('"format":1', '"format":2')}
        case "no JSON":
            header = {"lora_adapter": "{"}
    return save(tensors, header)


DAMAGED = {
    "half missing": "1 without lora_A or lora_B (layers.0.self_attn.q_proj)",
    "of another rank": "shapes (1, 32) and (32, 2), where its rank is 2",
    "not a number": "are not all finite numbers",
    "of one dimension": "shapes (32,) and (32, 2)",
    "unknown": "1 unknown ('base_model.model.model.embed_tokens.lora_embedding_A')",
    "of integers": "are of type U16",
    "empty": "0 linear layers",
    "no header": "its header has no 'lora_adapter'",
    "another format": "format: input should be 1",
    "no JSON": "is not JSON",
}


@pytest.mark.parametrize("way", DAMAGED)
def test_a_malformed_file_is_one_sentence(tmp_path, way):
    save_adapter(tmp_path, tiny_adapter(DECODER, ["layers.0.self_attn.q_proj"]), CARD, "float32")
    file = tmp_path / adapters.ADAPTER
    file.write_bytes(changed(load_file(file), dict(read_safetensors_metadata(file)), way))
    sentence = error_of(load_adapter, tmp_path)
    assert DAMAGED[way] in sentence and str(file) in sentence


def test_folders_that_hold_no_adapter(tmp_path):
    assert "is no adapter: it holds neither adapter.safetensors" in error_of(load_adapter, tmp_path)
    assert "is no adapter" in error_of(load_adapter, tmp_path / "nowhere")
    write_peft(tmp_path)
    (tmp_path / adapters.PEFT_TENSORS).rename(tmp_path / "adapter_model.bin")
    assert "is no adapter" in error_of(load_adapter, tmp_path)
    assert "holds no card.json" in error_of(adapters.read_card, tmp_path)
    (tmp_path / adapters.CARD).write_text(json.dumps({"base": {}}))
    assert "it has no 'data'" in error_of(adapters.read_card, tmp_path)


def test_a_failed_save_leaves_what_was_there(tmp_path):
    adapter = tiny_adapter(DECODER)
    save_adapter(tmp_path, adapter, CARD)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    for wrong, card in ((replace(adapter, base_sha256=None), CARD), (adapter, {"base": {}})):
        with pytest.raises(ValueError, match=r"does not say|AdapterCard"):
            save_adapter(tmp_path, wrong, card)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before
    (tmp_path / "file").touch()
    assert "cannot write to the folder" in error_of(save_adapter, tmp_path / "file", adapter, CARD)


@tries(suite=60, long=3000)
@given(data=st.data(), name=st.sampled_from([adapters.ADAPTER, adapters.PEFT_CONFIG, adapters.PEFT_TENSORS]))
def test_a_damaged_file_is_loaded_or_refused_in_one_sentence(data, name):
    with TemporaryDirectory() as folder:
        path = Path(folder)
        if name == adapters.ADAPTER:
            save_adapter(path, tiny_adapter(DECODER, ["layers.0.self_attn.q_proj"]), CARD)
        else:
            write_peft(path)
        drawn_damage(path / name, data)
        loaded, sentence = None, ""
        try:
            loaded = load_adapter(path)
        except UserError as error:
            sentence = str(error)
        if loaded is None:
            assert is_one_sentence(sentence), sentence
        else:
            assert all(np.isfinite(half).all() for both in loaded.tensors.values() for half in both)
