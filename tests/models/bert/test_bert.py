"""The encoder gives transformers' hidden states, and loads what checkpoints of its family look like."""

import dataclasses
import json
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from flax import nnx

from rag.models import checkpoint
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import configuration as bert_configuration
from rag.models.bert import model as bert
from rag.models.bert.model import Bert, Pooling
from rag.types import UserError
from tests.reference import ENCODER_TOLERANCE, pooling_oracle
from tests.tiny_models import (
    ENCODER,
    classifier_arrays,
    encoder_tensors,
    write_classifier,
    write_encoder,
    write_encoder_gguf,
    write_sentence_files,
)

GOLDENS = Path(__file__).parents[2] / "goldens" / "tiny_encoders.npz"
FAMILIES = ("bert", "bert_gelu_new", "bert_relu", "roberta")
MEAN = {"pooling_mode_mean_tokens": True, "pooling_mode_cls_token": False, "word_embedding_dimension": 16}


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def golden(family: str) -> tuple[Bert, dict[str, np.ndarray]]:
    with np.load(GOLDENS) as file:
        arrays = {
            name.removeprefix(f"{family}/"): file[name]
            for name in file.files
            if name.startswith(f"{family}/")
        }
    config = bert_configuration.config_from_huggingface(json.loads(str(arrays["config"])), family)
    tensors = {name.removeprefix("weights/"): a for name, a in arrays.items() if name.startswith("weights/")}
    module = checkpoint.fill(bert.abstract(config), tensors, bert_checkpoint.huggingface_table(), family)
    return jax.tree.map(jnp.asarray, module), arrays


@pytest.mark.parametrize("family", FAMILIES)
def test_hidden_states_are_those_of_transformers(family):
    model, arrays = golden(family)
    hidden = jax.jit(bert.forward)(
        model,
        jnp.asarray(arrays["tokens"]),
        jnp.asarray(arrays["lengths"])[:, None],
        jnp.asarray(arrays["types"]),
    )
    assert hidden.dtype == jnp.float32
    for ours, theirs, length in zip(hidden, arrays["hidden"], arrays["lengths"], strict=True):
        np.testing.assert_allclose(ours[:length], theirs[:length], atol=ENCODER_TOLERANCE, rtol=0)


def test_token_types_are_zero_unless_given():
    model, arrays = golden("bert")
    tokens, lengths = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])
    given = bert.forward(model, tokens, lengths[:, None], jnp.zeros_like(tokens))
    np.testing.assert_array_equal(bert.forward(model, tokens, lengths[:, None]), given)


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("normalize", [True, False])
def test_pooling(mode, normalize):
    hidden = np.random.default_rng(0).normal(size=(3, 7, 5)).astype(np.float32)
    lengths = np.array([7, 3, 1], np.int32)
    ours = bert.pool(jnp.asarray(hidden), jnp.asarray(lengths)[:, None], Pooling(mode, normalize, 7))
    np.testing.assert_allclose(
        ours[:, 0], pooling_oracle(hidden, lengths, mode, normalize), atol=ENCODER_TOLERANCE
    )


@pytest.mark.parametrize("mode", ["mean", "cls"])
@pytest.mark.parametrize("family", FAMILIES)
def test_texts_that_share_a_row_do_not_see_one_another(family, mode):
    model, arrays = golden(family)
    pooling = Pooling(mode, False, 64)
    texts = [row[:n] for row, n in zip(arrays["tokens"], arrays["lengths"], strict=True)]
    alone = [
        bert.embed(model, jnp.asarray([text]), jnp.array([[len(text)]]), pooling=pooling)[0, 0]
        for text in texts
    ]
    row = np.concatenate([*texts, np.full(5, 7)])[None]  # padded with a token like any other
    lengths = jnp.array([[*map(len, texts), 0]])
    packed = bert.embed(model, jnp.asarray(row), lengths, pooling=pooling)
    assert packed.shape == (1, len(texts) + 1, alone[0].shape[0])
    np.testing.assert_allclose(packed[0, :-1], alone, atol=ENCODER_TOLERANCE)
    np.testing.assert_array_equal(packed[0, -1], 0)  # no text


def test_pooling_of_texts_that_share_a_row():
    hidden = np.random.default_rng(0).normal(size=(2, 9, 5)).astype(np.float32)
    lengths = np.array([[4, 3, 2], [5, 0, 0]], np.int32)
    cut = [hidden[0, :4], hidden[0, 4:7], hidden[0, 7:], hidden[1, :5]]
    for mode in ("mean", "cls"):
        pooled = bert.pool(jnp.asarray(hidden), jnp.asarray(lengths), Pooling(mode, True, 9))
        expected = [pooling_oracle(x[None], np.array([len(x)]), mode, True)[0] for x in cut]
        np.testing.assert_allclose([*pooled[0], pooled[1, 0]], expected, atol=ENCODER_TOLERANCE)
        np.testing.assert_array_equal(pooled[1, 1:], 0)


def test_the_exact_gelu_is_that_of_erf():
    x = np.linspace(-12, 12, 2001)
    expected = [0.5 * value * math.erfc(-value / math.sqrt(2)) for value in x]
    config = dataclasses.replace(ENCODER, hidden_size=1, num_attention_heads=1, intermediate_size=1)
    layer = jax.tree.map(jnp.ones_like, bert.Intermediate(config, nnx.Rngs(0)))
    layer.dense.bias = nnx.Param(jnp.zeros(1))
    ours = jax.jit(bert._expand, static_argnums=1)(layer, config, jnp.asarray(x, jnp.float32)[None, :, None])[
        0, :, 0
    ]
    np.testing.assert_allclose(ours, expected, atol=2e-6)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_layers_in_fewer_bits(tmp_path, monkeypatch, dtype):
    folder = write_encoder(tmp_path / "tiny")
    model, _, _ = bert_checkpoint.load(folder)
    ids, lengths = (
        jnp.full((40, 8), 9).at[:, 1::2].set(17),
        jnp.full((40, 1), 8),
    )  # enough rows for the wide path
    run = jax.jit(bert.forward)
    expected = run(model, ids, lengths)
    monkeypatch.setattr(bert_checkpoint, "cpu_flags", lambda: ("amx_bf16",))
    less, _, _ = bert_checkpoint.load(folder, dtype)
    kinds = {
        str(leaf.get_value().dtype)
        for path, leaf in nnx.to_flat_state(nnx.state(less))
        if path[-1] == "weight" and "encoder" in path and "LayerNorm" not in path
    }
    assert kinds == {dtype}
    assert less.embeddings.word_embeddings.weight[...].dtype == jnp.float32
    error = np.abs(run(less, ids, lengths) - expected).max()
    assert 1e-6 < error < 0.2 * np.abs(expected).max()
    monkeypatch.setattr(bert_checkpoint, "cpu_flags", lambda: ("avx2",))
    plain, _, _ = bert_checkpoint.load(folder, "bfloat16")  # its values, where products of it would be slow
    weight = plain.encoder.layer[0].output.dense.weight[...]
    original = model.encoder.layer[0].output.dense.weight[...]
    assert weight.dtype == jnp.float32
    np.testing.assert_array_equal(weight, original.astype(jnp.bfloat16))


def test_padding_changes_nothing():
    model, arrays = golden("bert")
    tokens, lengths = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])
    pooling = Pooling("mean", True, 40)
    expected = bert.embed(model, tokens, lengths[:, None], pooling=pooling)
    wider = jnp.full((3, 32), 7).at[:, :21].set(tokens)  # padded with a token like any other
    padded = bert.embed(model, wider, lengths[:, None], pooling=pooling)
    np.testing.assert_allclose(padded, expected, atol=ENCODER_TOLERANCE)


def test_weights_are_an_argument_of_the_program():
    tokens, lengths, pooling = jnp.full((2, 8), 5), jnp.array([[8], [4]]), Pooling("mean", True, 8)
    first, second = (Bert(ENCODER, nnx.Rngs(seed)) for seed in (0, 1))
    vectors = bert.embed(first, tokens, lengths, pooling=pooling)
    programs = bert.embed._cache_size()
    others = bert.embed(second, tokens, lengths, pooling=pooling)
    assert bert.embed._cache_size() == programs
    assert not np.allclose(vectors, others, atol=0.01)
    text = bert.embed.lower(first, tokens, lengths, pooling=pooling).as_text()
    assert len(text) < 200_000  # weights that became constants would stand in it


def test_a_folder_without_sentence_files(tmp_path):
    model, tokenizer, settings = bert_checkpoint.load(write_encoder(tmp_path / "tiny"))
    assert settings.config == ENCODER
    assert settings.pooling == Pooling("mean", True, 70)  # 80 positions, but the tokenizer says 70
    assert (settings.query_prompt, settings.document_prompt, settings.lower_case) == ("", "", False)
    assert tokenizer.encode("ab c") == [2, 5, 32, 7, 3]
    loaded = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
    for name, array in encoder_tensors().items():
        np.testing.assert_array_equal(loaded[name].get_value(), array)


@pytest.mark.parametrize(
    ("pooling", "normalize", "expected"),
    [
        (MEAN, True, ("mean", True)),
        (MEAN | {"pooling_mode_mean_tokens": False, "pooling_mode_cls_token": True}, False, ("cls", False)),
        ({"pooling_mode": "cls", "embedding_dimension": 16}, True, ("cls", True)),
    ],
)
def test_sentence_files_are_obeyed(tmp_path, pooling, normalize, expected):
    folder = write_encoder(tmp_path / "tiny")
    write_sentence_files(folder, pooling, normalize=normalize)
    settings = bert_checkpoint.settings_from_huggingface(folder)
    assert settings.pooling == Pooling(*expected, max_length=50)
    assert settings.query_prompt == "question "


def test_bfloat16_weights_are_stored_as_float32(tmp_path):
    halves = {name: array.astype(ml_dtypes.bfloat16) for name, array in encoder_tensors().items()}
    folder = write_encoder(tmp_path / "half", halves)
    for _ in range(2):  # converted, then read back
        model, _, _ = bert_checkpoint.load(folder)
        loaded = {".".join(map(str, path)): leaf for path, leaf in nnx.to_flat_state(nnx.state(model))}
        for name, array in halves.items():
            np.testing.assert_array_equal(loaded[name].get_value(), array.astype(np.float32))


def test_files_that_are_damaged_are_errors(tmp_path):
    folder = write_encoder(tmp_path / "tiny")
    config = json.loads((folder / "config.json").read_text())
    del config["num_attention_heads"]
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="lacks the setting 'num_attention_heads'"):
        bert_checkpoint.load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"config\.json is not valid JSON"):
        bert_checkpoint.load(folder)
    folder = write_encoder(tmp_path / "other")
    for damaged in ("[", "{}", "[1]", '[{"path": ""}]'):
        (folder / "modules.json").write_text(damaged)
        with pytest.raises(UserError, match=r"modules\.json (is no list of modules|names no Pooling)"):
            bert_checkpoint.load(folder)


def test_unsupported_settings_of_encoders_are_errors(tmp_path):
    folder = write_encoder(tmp_path / "tiny")
    write_sentence_files(folder, MEAN, modules=("Dense",))
    with pytest.raises(UserError, match="module Dense"):
        bert_checkpoint.load(folder)
    write_sentence_files(folder, MEAN | {"pooling_mode_max_tokens": True})
    with pytest.raises(UserError, match="pooling_mode_mean_tokens \\+ pooling_mode_max_tokens"):
        bert_checkpoint.load(folder)
    for change, message in (
        ({"model_type": "mpnet"}, "'mpnet' model"),
        ({"position_embedding_type": "relative_key"}, "relative_key"),
        ({"hidden_act": "silu"}, "silu"),
    ):
        with pytest.raises(UserError, match=message):
            bert_checkpoint.load(write_encoder(tmp_path / "other", **change))
    with pytest.raises(UserError, match=r"neither a GGUF file nor a folder with a config\.json"):
        bert_checkpoint.load(tmp_path)


def test_an_encoder_inside_a_model_with_heads(tmp_path):
    """The names of bert-base-uncased: a prefix, gamma and beta, a pooler, pre-training heads, a buffer."""
    old = {"LayerNorm.weight": "LayerNorm.gamma", "LayerNorm.bias": "LayerNorm.beta"}
    plain, named = encoder_tensors(), {}
    for name, array in plain.items():
        ending = next((end for end in old if name.endswith(end)), None)
        named["bert." + (name.removesuffix(ending) + old[ending] if ending else name)] = array
    named["bert.embeddings.position_ids"] = np.arange(80)[None]
    named["bert.pooler.dense.weight"] = np.zeros((16, 16), np.float32)
    named["cls.predictions.transform.LayerNorm.gamma"] = np.zeros(16, np.float32)
    named["cls.predictions.decoder.weight"] = np.zeros((57, 16), np.float32)
    model, _, _ = bert_checkpoint.load(write_encoder(tmp_path / "headed", named))
    expected, _, _ = bert_checkpoint.load(write_encoder(tmp_path / "plain", plain))
    jax.tree.map(np.testing.assert_array_equal, model, expected)


def test_tensors_must_fit(tmp_path):
    weight = "encoder.layer.1.attention.self.key.weight"
    tensors = encoder_tensors()
    with pytest.raises(UserError, match=r"1 unknown \(classifier\.weight\)"):
        bert_checkpoint.load(
            write_encoder(tmp_path / "a", tensors | {"classifier.weight": np.zeros((2, 16))})
        )
    with pytest.raises(UserError, match=f"holds {weight} with shape \\(16, 8\\)"):
        bert_checkpoint.load(write_encoder(tmp_path / "b", tensors | {weight: np.zeros((16, 8), np.float32)}))
    with pytest.raises(UserError, match=f"1 missing \\({weight}\\)"):
        missing = {name: array for name, array in tensors.items() if name != weight}
        bert_checkpoint.load(write_encoder(tmp_path / "c", missing))


def test_a_gguf_file_is_the_same_model(tmp_path):
    tensors = encoder_tensors()
    ours, tokenizer, settings = bert_checkpoint.load(
        write_encoder_gguf(tmp_path / "tiny.gguf", tensors, pooling_type=2)
    )
    expected, folder_tokenizer, _ = bert_checkpoint.load(write_encoder(tmp_path / "tiny", tensors))
    assert settings.config == dataclasses.replace(ENCODER, layer_norm_eps=settings.config.layer_norm_eps)
    assert settings.config.layer_norm_eps == pytest.approx(1e-12)  # float32 in the file
    assert settings.pooling == Pooling("cls", True, 70)
    assert tokenizer.encode("hello world") == folder_tokenizer.encode("hello world")
    jax.tree.map(np.testing.assert_array_equal, nnx.state(ours), nnx.state(expected))
    with pytest.raises(UserError, match="pooling type 3"):
        bert_checkpoint.load(write_encoder_gguf(tmp_path / "last.gguf", tensors, pooling_type=3))


# --- sequence classification --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "labels", "longest", "separators"),
    [("bert", 1, 70, 1), ("bert_labels", 3, 70, 1), ("roberta", 1, 70, 2), ("xlm_roberta", 2, 70, 2)],
)
def test_a_classifier_gives_the_logits_of_transformers(tmp_path, family, labels, longest, separators):
    arrays = classifier_arrays(family)
    folder = write_classifier(tmp_path / family, family)
    for _ in range(2):  # converted, then read back
        model, _, settings = bert_checkpoint.load_classifier(folder)
    assert (settings.labels, settings.max_length, settings.separators) == (labels, longest, separators)
    logits = bert.classify(model, *(jnp.asarray(arrays[name]) for name in ("tokens", "lengths", "types")))
    assert logits.dtype == jnp.float32
    np.testing.assert_allclose(logits, arrays["logits"], atol=ENCODER_TOLERANCE)
    assert np.ptp(arrays["logits"], axis=0).min() > 0.1  # a constant would not do


def test_the_passages_token_type_counts(tmp_path):
    arrays = classifier_arrays("bert")
    model, _, _ = bert_checkpoint.load_classifier(write_classifier(tmp_path / "bert", "bert"))
    tokens, lengths = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])
    assert (
        np.abs(bert.classify(model, tokens, lengths, jnp.zeros_like(tokens)) - arrays["logits"]).max() > 0.01
    )


def test_a_classifiers_tensors_must_fit(tmp_path):
    with pytest.raises(UserError, match=r"no sequence-classification head \(classifier\.weight\)"):
        bert_checkpoint.load_classifier(write_encoder(tmp_path / "encoder"))
    folder = write_classifier(tmp_path / "other", "roberta", model_type="bert")
    with pytest.raises(UserError, match="no sequence-classification head"):
        bert_checkpoint.load_classifier(folder)
    headless = encoder_tensors() | {
        "classifier.weight": np.zeros((1, 16), np.float32),
        "classifier.bias": np.zeros(1, np.float32),
    }
    with pytest.raises(UserError, match=r"2 missing \(dense\.bias, dense\.weight\)"):
        bert_checkpoint.load_classifier(write_encoder(tmp_path / "headless", headless))
    with pytest.raises(UserError, match=r"GGUF file.*Hugging Face folders only"):
        bert_checkpoint.load_classifier(write_encoder_gguf(tmp_path / "tiny.gguf", encoder_tensors()))


def test_token_states_are_the_hidden_states_at_unit_length():
    model, arrays = golden("bert")
    tokens, lengths = jnp.asarray(arrays["tokens"]), jnp.asarray(arrays["lengths"])
    hidden = np.asarray(bert.forward(model, tokens, lengths[:, None]), np.float64)
    for ours, plain, length in zip(
        bert.token_states(model, tokens, lengths), hidden, arrays["lengths"], strict=True
    ):
        expected = plain[:length] / np.sqrt((plain[:length] ** 2).sum(axis=1, keepdims=True))
        np.testing.assert_allclose(ours[:length], expected, atol=ENCODER_TOLERANCE)
