"""Checkpoints that are loaded with an adapter: what is merged, what is cached, and what is refused."""

import hashlib
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from rag.models import adapters
from rag.models.adapters import load_adapter, merge, save_adapter, save_peft
from rag.models.layers import quantize_weights
from rag.models.llama import checkpoint as llama_checkpoint
from rag.types import UserError
from tests.damage import cut
from tests.one_sentence import is_one_sentence
from tests.tiny_adapters import CARD, tiny_adapter, write_adapter
from tests.tiny_models import decoder_gguf, write_decoder, write_gguf


def parameters(model) -> list[np.ndarray]:
    return [np.array(array) for array in jax.tree.leaves(model)]


def error_of(base: Path, adapter: Path) -> str:
    with pytest.raises(UserError) as caught:
        llama_checkpoint.load(base, adapter=adapter)
    assert is_one_sentence(str(caught.value)), str(caught.value)
    return str(caught.value)


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder of a checkpoint, beside a cache of its own."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    return write_decoder(tmp_path / "base")


@pytest.mark.parametrize("int8", [False, True])
def test_a_checkpoint_is_merged_and_then_quantised(base, tmp_path, int8):
    folder = write_adapter(tmp_path / "adapter", base)
    plain, _ = llama_checkpoint.load(base)
    expected = merge(plain, load_adapter(folder))
    expected = quantize_weights(expected) if int8 else expected
    found, tokenizer = llama_checkpoint.load(base, int8=int8, adapter=folder)
    for one, other in zip(parameters(found), parameters(expected), strict=True):
        np.testing.assert_array_equal(one, other)
    assert tokenizer.decode(tokenizer.encode("seal")) == "seal"


def test_an_adapter_is_merged_once_and_again_when_it_changes(base, tmp_path, monkeypatch):
    def converted() -> set[Path]:
        return {path.parent for path in (tmp_path / "cache" / "converted").rglob("config.json")}

    folder = write_adapter(tmp_path / "adapter", base)
    plain = parameters(llama_checkpoint.load(base)[0])
    alone = converted()
    first = parameters(llama_checkpoint.load(base, adapter=folder)[0])
    assert len(alone) == 1 and len(converted()) == 2
    with monkeypatch.context() as patch:
        patch.setattr(adapters, "load_adapter", None)  # later starts map what is merged
        again, _ = llama_checkpoint.load(base, adapter=folder)
        assert isinstance(again.layers[0].mlp.up_proj.weight.get_value(), np.memmap)
        moved = folder.rename(tmp_path / "moved")
        assert len(parameters(llama_checkpoint.load(base, adapter=moved)[0])) == len(first)
    assert len(converted()) == 2
    write_adapter(moved, base, seed=1)
    second = parameters(llama_checkpoint.load(base, adapter=moved)[0])
    assert len(converted()) == 3
    same = [np.array_equal(one, other) for one, other in zip(first, second, strict=True)]
    assert not all(same) and same.count(False) == 14
    after = parameters(llama_checkpoint.load(base)[0])
    assert all(np.array_equal(one, other) for one, other in zip(plain, after, strict=True))
    assert len(converted()) == 3


def test_an_adapter_of_another_base_is_refused(base, tmp_path):
    folder = write_adapter(tmp_path / "adapter", base)
    known = llama_checkpoint.checkpoint_sha256(base)
    (base / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    now = llama_checkpoint.checkpoint_sha256(base)
    for _ in range(2):  # nothing of the first try stays
        sentence = error_of(base, folder)
        assert known in sentence and now in sentence and str(folder) in sentence
    save_peft(tmp_path / "peft", tiny_adapter())  # names no base
    assert llama_checkpoint.load(base, adapter=tmp_path / "peft")
    cut(folder / adapters.ADAPTER, -100)
    assert "cannot read the weights" in error_of(base, folder)


def test_a_gguf_file_is_named_by_its_own_digest(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    write_gguf(tmp_path / "a.gguf", *decoder_gguf())
    digest = hashlib.sha256((tmp_path / "a.gguf").read_bytes()).hexdigest()
    assert llama_checkpoint.checkpoint_sha256(tmp_path / "a.gguf") == digest
    assert llama_checkpoint.checkpoint_sha256((tmp_path / "a.gguf").rename(tmp_path / "b.gguf")) == digest
    config = llama_checkpoint.load(tmp_path / "b.gguf")[0].config
    save_adapter(tmp_path / "adapter", tiny_adapter(config, base_sha256=digest), CARD)
    assert llama_checkpoint.load(tmp_path / "b.gguf", adapter=tmp_path / "adapter")[0].config == config
