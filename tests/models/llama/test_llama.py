"""The decoder against transformers: tiny random models of each family, and the default weights."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag.generate.engine import Engine
from rag.models import checkpoint, placement
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama import configuration as llama_configuration
from rag.models.llama.model import abstract, forward, logits
from rag.ops.rope import rotate, rotations
from rag.types import Message, UserError
from tests import trials
from tests.generate.decode import alone, batch
from tests.reference import DECODER_TOLERANCE

FAMILIES = ("llama", "qwen2", "qwen3")


@pytest.fixture(scope="module")
def goldens(request):
    return np.load(request.path.parents[2] / "goldens" / "tiny_decoders.npz")


def tiny(goldens, family):
    config = llama_configuration.config_from_huggingface(json.loads(str(goldens[f"{family}/config"])), family)
    prefix = f"{family}/weights/"
    weights = {name.removeprefix(prefix): goldens[name] for name in goldens.files if name.startswith(prefix)}
    return config, weights


def all_logits(model, tokens):
    hidden, _ = forward(model, tokens, jnp.zeros(tokens.shape[0], jnp.int32))
    return jax.vmap(lambda h: logits(model, h), 1, 1)(hidden)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(goldens, family):
    config, weights = tiny(goldens, family)
    model = checkpoint.fill(abstract(config), weights, llama_checkpoint.huggingface_table(config), family)
    expected = goldens[f"{family}/logits"]
    got = np.asarray(
        all_logits(placement.to_device(model, jnp.dtype("float32")), jnp.asarray(goldens[f"{family}/tokens"]))
    )
    assert np.abs(got - expected).max() / np.abs(expected).max() < DECODER_TOLERANCE


@pytest.mark.parametrize("family", FAMILIES)
def test_gguf_names_and_row_order_lead_to_the_same_module(goldens, family):
    config, weights = tiny(goldens, family)
    whole = checkpoint.fill(abstract(config), weights, llama_checkpoint.huggingface_table(config), family)
    again = checkpoint.fill(
        abstract(config),
        as_gguf(config, weights, family),
        llama_checkpoint.gguf_table(config, family),
        family,
    )
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(again), strict=True):
        np.testing.assert_array_equal(a, b)


def as_gguf(config, weights, family):
    """Renamed, and for `llama` with Q and K reordered as llama.cpp's convert_hf_to_gguf.py does (`permute`)."""
    names = {f"model.{hf}": gguf for hf, gguf in llama_checkpoint.NAMES} | {"lm_head": "output"}
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    renamed = {}
    for name, weight in weights.items():
        stem, kind = name.rsplit(".", 1)
        layer = "".join(filter(str.isdigit, stem.split("self_attn")[0]))
        pattern = stem.replace(f"layers.{layer}.", "layers.{i}.") if layer else stem
        gguf = names[pattern].replace("{i}", layer)
        if family == "llama" and (count := heads.get(gguf.rsplit(".", 1)[-1])):
            halves = weight.reshape(count, 2, weight.shape[0] // count // 2, *weight.shape[1:])
            weight = halves.swapaxes(1, 2).reshape(weight.shape)
        renamed[f"{gguf}.{kind}"] = weight
    return renamed


def test_unknown_architectures_and_scalings_are_errors(goldens):
    config = json.loads(str(goldens["llama/config"]))
    with pytest.raises(UserError, match=r"'gemma'.*take a checkpoint of llama"):
        llama_configuration.config_from_huggingface(config | {"model_type": "gemma"}, "here")
    with pytest.raises(UserError, match="'yarn'"):
        llama_configuration.config_from_huggingface(config | {"rope_scaling": {"rope_type": "yarn"}}, "here")


def test_activations_and_windows_that_are_not_known_are_errors(goldens):
    config = json.loads(str(goldens["qwen2/config"]))
    with pytest.raises(UserError, match="activation 'gelu'"):
        llama_configuration.config_from_huggingface(config | {"hidden_act": "gelu"}, "here")
    with pytest.raises(UserError, match="sliding window"):
        llama_configuration.config_from_huggingface(config | {"use_sliding_window": True}, "here")


def test_settings_that_are_missing_are_errors(goldens, tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    config = json.loads(str(goldens["llama/config"]))
    with pytest.raises(UserError, match="rope_scaling, lacks the setting 'factor'"):
        llama_configuration.config_from_huggingface(config | {"rope_scaling": {"type": "linear"}}, "here")
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(UserError, match=r"holds no config\.json"):
        llama_checkpoint.load(tmp_path)
    del config["hidden_size"]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks the setting 'hidden_size'"):
        llama_checkpoint.load(tmp_path)


GGUF = {
    "general.architecture": "llama",
    "tokenizer.ggml.tokens": ["a", "b"],
    "llama.embedding_length": 16,
    "llama.attention.head_count": 2,
    "llama.feed_forward_length": 32,
    "llama.block_count": 1,
    "llama.context_length": 64,
    "llama.attention.layer_norm_rms_epsilon": 1e-5,
    "llama.rope.dimension_count": 8,
}


@pytest.mark.parametrize(
    ("scaling", "tensor", "factors"),
    [
        ({}, None, None),
        ({}, [1, 1, 2, 8], (1, 1, 2, 8)),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, None, (4, 4, 4, 4)),
        ({"scaling.type": "linear", "scaling.factor": 4.0}, [1, 1, 2, 8], (4, 4, 8, 32)),
        ({"scaling.type": "linear"}, None, None),
        ({"scaling.factor": 0.0}, None, None),
        ({"scale_linear": 2.0}, None, (2, 2, 2, 2)),  # before there were types
        ({"scaling.type": "none", "scaling.factor": 4.0}, None, None),
    ],
)
def test_rope_scaling_of_gguf_files(scaling, tensor, factors):
    metadata = GGUF | {f"llama.rope.{key}": value for key, value in scaling.items()}
    tensors = {} if tensor is None else {"rope_freqs.weight": np.array(tensor, np.float32)}
    assert llama_configuration.config_from_gguf(metadata, tensors).rope_factors == factors


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llama.rope.scaling.type": "yarn", "llama.rope.scaling.factor": 4.0}, "'yarn'"),
        ({"llama.rope.scaling.type": "longrope"}, "'longrope'"),
        ({"llama.rope.dimension_count": 4}, "rotates 4 of its heads' 8 dimensions"),
    ],
)
def test_rotations_of_gguf_files_that_are_not_known_are_errors(change, message):
    with pytest.raises(UserError, match=message):
        llama_configuration.config_from_gguf(GGUF | change, {})


def test_rotation_depends_on_the_distance_alone():
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.normal(size=(1, 1, 1, 8)), jnp.float32) for _ in range(2))

    def score(i, j):
        at_i, at_j = (rotations(jnp.array([[p]]), 8, 1e4) for p in (i, j))
        return float(jnp.sum(rotate(q, at_i) * rotate(k, at_j)))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-5)
    assert score(7, 3) != pytest.approx(score(7, 4), abs=1e-3)


@pytest.fixture(scope="session")
def smollm2(generator_weights):
    model, tokenizer = llama_checkpoint.load(generator_weights)
    return placement.to_device(model, jnp.dtype("float32")), tokenizer


@pytest.fixture(scope="module")
def smollm2_goldens(request):
    return json.loads((request.path.parents[2] / "goldens" / "smollm2.json").read_text())


@pytest.mark.weights
def test_smollm2_logits_equal_transformers(smollm2, smollm2_goldens):
    model, _ = smollm2
    read = jax.jit(lambda model, tokens: forward(model, tokens, jnp.zeros(1, jnp.int32))[0])
    for case in smollm2_goldens["cases"]:
        prompt = case["prompt"]
        hidden = read(model, jnp.array([prompt + [0] * (64 - len(prompt))]))
        got = np.asarray(logits(model, hidden[:, len(prompt) - 1]))[0, :: smollm2_goldens["every"]]
        expected = np.array(case["last_logits"])
        assert np.abs(got - expected).max() / np.abs(expected).max() < DECODER_TOLERANCE


@pytest.mark.weights
def test_smollm2_greedy_tokens_equal_transformers_alone_and_in_a_batch(smollm2, smollm2_goldens):
    model, tokenizer = smollm2
    engine = Engine(model, tokenizer.eos_ids, steps_per_dispatch=16)
    cases = smollm2_goldens["cases"]
    assert len(cases) >= 5
    messages = [[Message("system", smollm2_goldens["system"]), Message("user", c["question"])] for c in cases]
    prompts = [tokenizer.chat(conversation) for conversation in messages]
    assert prompts == [case["prompt"] for case in cases]
    expected = [[token for token in case["greedy"] if token not in tokenizer.eos_ids] for case in cases]
    some = slice(None if trials.LONG else 3)  # each length is a program of its own to compile
    assert [alone(engine, prompt, 64) for prompt in prompts[some]] == expected[some]
    assert batch(engine, prompts[some], 64) == expected[some]
