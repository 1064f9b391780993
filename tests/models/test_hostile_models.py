"""Checkpoints whose configuration, tensors and tokenizer do not go together are refused before anything is built."""

import json
import struct
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from rag.models import tensor_files
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.tokenizer import gguf as tokenizer_gguf
from rag.models.tokenizer.gguf import from_metadata
from rag.models.tokenizer.huggingface import load as load_folder
from rag.types import UserError
from tests import tiny_models
from tests.one_sentence import is_one_sentence
from tests.tiny_models import decoder_gguf, tokenizer_metadata, write_gguf


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def error_of(load, path: Path) -> str:
    with pytest.raises(UserError) as caught:
        load(path)
    assert is_one_sentence(str(caught.value)), str(caught.value)
    return str(caught.value)


GGUF = {
    "block_count is 1,000,000": ({"llama.block_count": 1_000_000}, "block_count: input should be less than"),
    "block_count is 1,000": ({"llama.block_count": 1000}, "counts 1,000 layers in its configuration"),
    "block_count is less": ({"llama.block_count": 1}, "and holds tensors of 2"),
    "block_count is a text": ({"llama.block_count": "two"}, "block_count: input should be a valid integer"),
    "no heads": ({"llama.attention.head_count": 0}, "attention.head_count: input should be greater than or equal to 1"),
    "7 heads": ({"llama.attention.head_count": 7}, "divides a width of 16 among 7 heads"),
    "3 groups": ({"llama.attention.head_count_kv": 3}, "divides 4 heads among 3"),
    "odd heads": ({"llama.attention.key_length": 3, "llama.rope.dimension_count": 3}, "heads of 3 dimensions"),
    "no width": ({"llama.embedding_length": 0}, "embedding_length: input should be greater than or equal to 1"),
    "huge width": ({"llama.embedding_length": 2**62}, "embedding_length: input should be less than"),
    "another width": ({"llama.embedding_length": 32, "llama.attention.key_length": 4}, "where its own"),
    "epsilon 0": ({"llama.attention.layer_norm_rms_epsilon": 0.0}, "rms_epsilon: input should be greater than"),
    "epsilon NaN": ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_epsilon: input should be a finite"),
    "theta 0": ({"llama.rope.freq_base": 0.0}, "freq_base: input should be greater than or equal to 1"),
    "theta inf": ({"llama.rope.freq_base": float("inf")}, "freq_base: input should be a finite number"),
    "factor NaN": ({"llama.rope.scaling.factor": float("nan")}, "rope.scaling.factor: input should be a finite number"),
    "factor tiny": ({"llama.rope.scaling.factor": 1e-30}, "rotary factors that are not from 0.001 to 1000000.0"),
    "fewer tokens": ({"tokenizer.ggml.tokens": ["a", "b"], "tokenizer.ggml.token_type": [1, 1],
                      "tokenizer.ggml.merges": [""]}, "damaged"),
    "tokens are numbers": ({"tokenizer.ggml.tokens": [1, 2]}, "tokens.0: input should be a valid string"),
    "merges are numbers": ({"tokenizer.ggml.merges": [1, 2]}, "merges.0: input should be a valid string"),
    "a long token": ({"tokenizer.ggml.tokens": ["a" * 5000, "b"]}, "a token of 5,000 characters"),
    "a model of another name": ({"tokenizer.ggml.model": "x" * 500}, "tokenizer.ggml.model is 'xxx"),
}  # fmt: skip


@pytest.mark.parametrize("name", GGUF)
def test_gguf_metadata_are_compared_with_the_tensors(tmp_path, name):
    change, want = GGUF[name]
    metadata, tensors = decoder_gguf()
    write_gguf(tmp_path / "model.gguf", metadata | change, tensors)
    assert want in error_of(llama_checkpoint.load, tmp_path / "model.gguf")


def test_a_projection_whose_rows_are_not_whole_heads_is_an_error(tmp_path):
    metadata, tensors = decoder_gguf()
    tensors["blk.0.attn_q.weight"] = tensors["blk.0.attn_q.weight"][:-1]
    write_gguf(tmp_path / "model.gguf", metadata, tensors)
    assert "with shape (15, 16)" in error_of(llama_checkpoint.load, tmp_path / "model.gguf")


def test_the_unchanged_gguf_loads(tmp_path):
    write_gguf(tmp_path / "model.gguf", *decoder_gguf())
    model, tokenizer = llama_checkpoint.load(tmp_path / "model.gguf")
    assert len(model.layers) == 2 and tokenizer.vocab_size == model.config.vocab_size


@pytest.mark.parametrize("number", [np.nan, np.inf, -1e30, 65505])
def test_weights_are_finite_numbers(tmp_path, number):
    metadata, tensors = decoder_gguf()
    tensors["blk.1.ffn_up.weight"][3, 5] = number
    write_gguf(tmp_path / "model.gguf", metadata, tensors)
    sentence = error_of(llama_checkpoint.load, tmp_path / "model.gguf")
    assert "'blk.1.ffn_up.weight'" in sentence and "finite numbers up to 65504" in sentence
    tensors = {"a": np.array([1, number], np.float32)}
    save_file(tensors, tmp_path / "model.safetensors")
    assert "'a'" in error_of(tensor_files.read_safetensors, tmp_path)


def test_tensors_of_unknown_numbers_are_errors(tmp_path):
    header = json.dumps({"a": {"dtype": "F8_E4M3", "shape": [4], "data_offsets": [0, 4]}}).encode()
    (tmp_path / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + b"1234")
    assert "'a'" in (sentence := error_of(tensor_files.read_safetensors, tmp_path))
    assert "of type F8_E4M3; only F32, F16, BF16, F64 are known" in sentence


def change_json(path: Path, **values) -> None:
    path.write_text(json.dumps((json.loads(path.read_text()) if path.is_file() else {}) | values))


DECODER = {
    "num_hidden_layers": [(10**6, "less than or equal to 1024"), (9, "counts 9 layers"),
                          ("2", "valid integer"), (2.5, "valid")],
    "num_attention_heads": [(0, "greater than"), (7, "divides 7 heads among 2"),
                            ([4], "valid integer"), (None, "valid")],
    "hidden_size": [(0, "greater than"), (2**40, "less than"), (33, "holds"), (True, "valid integer")],
    "vocab_size": [(10, "10 rows in its embedding"), (301, "says (301, 32)"), (-1, "greater")],
    "rms_norm_eps": [(0, "greater than"), ("x", "valid number"), (10**400, "rms_norm_eps")],
    "rope_theta": [(-1, "greater than"), ({}, "valid number"), (0.5, "greater than")],
    "rope_scaling": [([], "valid dictionary"), ({"type": []}, "type: input should be a valid string"),
                     ({"type": "linear", "factor": "x"}, "factor: input should be a valid number"),
                     ({"type": "linear", "factor": 0}, "factor: input should be greater"),
                     ({"type": "llama3", "factor": 1, "low_freq_factor": 4, "high_freq_factor": 1,
                       "original_max_position_embeddings": 9}, "low_freq_factor above")],
    "model_type": [(["llama"], "architecture ['llama']"), ({}, "architecture {}")],
    "hidden_act": [([], "valid string"), ("x" * 999, "activation 'xxx")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("name", "value", "want"), [(k, *case) for k, cases in DECODER.items() for case in cases]
)
def test_a_decoders_settings_have_types_and_ranges(tmp_path, name, value, want):
    (tmp_path / "m").mkdir()
    tiny_models.write_decoder(tmp_path / "m")
    change_json(tmp_path / "m" / "config.json", **{name: value})
    assert want in error_of(llama_checkpoint.load, tmp_path / "m")


ENCODER = {
    "config.json": [({"num_attention_heads": 3}, "divides a width of 16 among 3 heads"),
                    ({"num_hidden_layers": 500}, "counts 500 layers"), ({"layer_norm_eps": 0}, "layer_norm_eps"),
                    ({"vocab_size": 20}, "20 rows in its embedding"), ({"hidden_act": 1}, "valid string"),
                    ({"model_type": "roberta", "pad_token_id": "x"}, "pad_token_id"),
                    ({"model_type": "roberta", "pad_token_id": 90}, "80 positions, of which 91 are not used")],
    "sentence_bert_config.json": [({"max_seq_length": "x"}, "max_seq_length"), ({"do_lower_case": 3}, "lower_case")],
    "config_sentence_transformers.json": [({"prompts": []}, "valid dict"), ({"prompts": {"query": 3}}, "query")],
    "tokenizer_config.json": [({"model_max_length": -3}, "model_max_length"), ({"chat_template": 3}, "chat_template"),
                              ({"chat_template": [{"name": "default"}]}, "chat_template")],
    "generation_config.json": [({"eos_token_id": ["x"]}, "eos_token_id")],
}  # fmt: skip


@pytest.mark.parametrize(
    ("file", "values", "want"), [(k, *case) for k, cases in ENCODER.items() for case in cases]
)
def test_an_encoders_settings_have_types_and_ranges(tmp_path, file, values, want):
    folder = tiny_models.write_encoder(tmp_path / "m")
    tiny_models.write_sentence_files(folder, {"pooling_mode": "cls"})
    (folder / "sentence_bert_config.json").write_text("{}")  # so that the tokenizer's length is asked for
    change_json(folder / file, **values)
    assert want in error_of(bert_checkpoint.load, folder)


@pytest.mark.parametrize(
    ("content", "want"),
    [
        ("[" * 100_000, "nested too deep"),
        ('{"a": 1, "a": 2}', "'a' occurs twice"),
        ('{"a": NaN}', "NaN is no number"),
        ("[]", "holds no JSON object"),
        ('{"a": "\\ud800"}', "one half of a character"),
        ('{"a": %s}' % ("9" * 5000), "Exceeds the limit"),
        ("\xff", "can't decode"),
    ],
)
def test_json_that_is_none_is_an_error(tmp_path, content, want):
    (tmp_path / "config.json").write_bytes(content.encode("latin-1"))
    assert want in error_of(tensor_files.read_config, tmp_path)


def test_a_tokenizer_that_fails_at_unknown_words_is_an_error(tmp_path):
    folder = tiny_models.write_encoder(tmp_path / "m")
    values = json.loads((folder / "tokenizer.json").read_text())
    values["model"]["unk_token"] = "[NONE]"
    (folder / "tokenizer.json").write_text(json.dumps(values))
    assert "Missing [UNK] token" in error_of(bert_checkpoint.load, folder)


REAL_PATTERNS = [
    tokenizer_gguf._WORDS % r"\p{N}{1,3}", *tokenizer_gguf._DEEPSEEK, r" ?[^(\s|[.,!?\u2026\u3002])]+",
    "[0-9][0-9][0-9]",
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{M}]*[\p{Ll}\p{Lm}\p{M}]+(?i:'s|'t|'re)?|\p{N}{1,3}|[^\s\p{L}]+[\r\n/]*|\s+",
    r"'(?i:[sdmt]|ll|ve|re)|\s+(?!\S)", " {2,}", r"\(+|\)+", "[()]+",
]  # fmt: skip


@pytest.mark.parametrize("pattern", REAL_PATTERNS)
def test_patterns_of_real_tokenizers_are_used(tmp_path, pattern):
    folder = tiny_models.write_encoder(tmp_path / "m")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change_json(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    assert load_folder(folder).encode("seal (on) ice")


@pytest.mark.parametrize(
    "pattern", ["(a+)+$", "(a|aa)*$", "(?:[)]a*){2,}b", r"(a)\1", "a" * 5000, r"(\)a+)+"]
)
def test_patterns_without_end_are_refused(tmp_path, pattern):
    folder = tiny_models.write_encoder(tmp_path / "m")
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}
    change_json(folder / "tokenizer.json", pre_tokenizer={"type": "Sequence", "pretokenizers": [split]})
    assert "may take without end" in error_of(load_folder, folder)


def test_texts_that_grow_without_end_are_refused(tmp_path):
    folder = tiny_models.write_encoder(tmp_path / "m")
    steps = [{"type": "Replace", "pattern": {"String": "a"}, "content": "a" * 20}] * 3
    change_json(folder / "tokenizer.json", normalizer={"type": "Sequence", "normalizers": steps})
    assert "makes texts 8,000 times as long" in error_of(load_folder, folder)


def test_an_emoji_in_escapes_is_text(tmp_path):
    (tmp_path / "config.json").write_text('{"a": "\\ud83e\\udd16"}')
    assert tensor_files.read_config(tmp_path) == {"a": "\U0001f916"}


@pytest.mark.parametrize("path", ["../other.safetensors", "/dev/zero", "a\0b"])
def test_files_outside_of_the_folder_are_not_read(tmp_path, path):
    index = {"weight_map": {"a": path}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "outside of its folder" in error_of(tensor_files.read_safetensors, tmp_path)
    folder = tiny_models.write_encoder(tmp_path / "m")
    (folder / "modules.json").write_text(json.dumps([{"type": "a.Pooling", "path": path}]))
    assert "outside of its own" in error_of(bert_checkpoint.load, folder)


def test_a_classifier_needs_labels(tmp_path):
    folder = tiny_models.write_encoder(tmp_path / "m")
    tensors = load_file(folder / "model.safetensors") | {"classifier.weight": np.zeros((0, 16), np.float32)}
    save_file(tensors, folder / "model.safetensors")
    assert "classifier.weight with shape (0, 16)" in error_of(bert_checkpoint.load_classifier, folder)


@pytest.mark.parametrize("family", ["gpt2", "llama", "bert"])
@pytest.mark.parametrize(
    "key", ["tokens", "token_type", "scores", "merges", "pre", "eos_token_id", "add_bos_token", "model"]
)
def test_tokenizers_metadata_have_types(family, key):
    for value in ({"a": 1}, [[]], 1e300, "\0", 10**30):
        try:
            from_metadata(tokenizer_metadata(family) | {f"tokenizer.ggml.{key}": value}).encode("hello")
        except UserError as error:
            sentence = str(error)
        else:  # what a family does not ask for may be anything of its type
            assert key in ("pre", "eos_token_id")
            continue
        assert is_one_sentence(sentence), sentence
