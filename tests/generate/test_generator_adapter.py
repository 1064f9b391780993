"""LocalGenerator with an adapter: which one it takes, and that everything computed with it has a key of its own."""

import json

import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import save_file

from rag.generate import Request
from rag.generate.local import LocalGenerator
from rag.models import adapters
from rag.models.checkpoint import dotted
from rag.models.llama import checkpoint as llama_checkpoint
from rag.types import Message, UserError
from tests.tiny_adapters import tiny_adapter, write_adapter
from tests.tiny_models import write_decoder

ASKED = [Message("user", "Read: a seal eats fish. What eats?", reusable=((5, 23),), fixed=5)]


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The folder of a checkpoint; the package has no adapter until a test writes one to tmp_path / "shipped"."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(adapters, "DEFAULT_READER", tmp_path / "shipped")
    return write_decoder(tmp_path / "base")


def written(generator: LocalGenerator) -> str:
    [text] = generator.generate([Request(ASKED, max_new_tokens=12)])
    return text


@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_answers_are_those_of_merged_weights(base, tmp_path, dtype):
    folder = write_adapter(tmp_path / "adapter", base)
    merged = write_decoder(tmp_path / "merged")
    model = adapters.merge(llama_checkpoint.load(base)[0], adapters.load_adapter(folder))
    tensors = {dotted(path): leaf.get_value() for path, leaf in nnx.to_flat_state(nnx.state(model))}
    save_file(
        {f"model.{name}": np.array(array) for name, array in tensors.items()}, merged / "model.safetensors"
    )
    expected, plain = (written(LocalGenerator(str(path), dtype, adapter=None)) for path in (merged, base))
    found = LocalGenerator(str(base), dtype, adapter=str(folder))
    assert written(found) == expected != plain
    assert found.description == f"base with {dtype} weights and the adapter adapter"


def test_auto_takes_the_adapter_of_the_package_for_its_own_weights_alone(base, tmp_path):
    auto, none = (LocalGenerator(str(base), "float32", **o) for o in ({}, {"adapter": None}))
    assert auto.adapter is None and auto.fingerprint == none.fingerprint  # the package has none
    shipped = write_adapter(tmp_path / "shipped", base)
    auto, named = (LocalGenerator(str(base), "float32", **o) for o in ({}, {"adapter": str(shipped)}))
    assert auto.adapter == named.adapter == shipped
    assert auto.fingerprint == named.fingerprint != none.fingerprint
    assert auto.description == "base with float32 weights and the adapter shipped"
    assert written(auto) == written(named) != written(none)
    other = write_decoder(tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    auto, none = (LocalGenerator(str(other), "float32", **o) for o in ({}, {"adapter": None}))
    assert auto.adapter is None and auto.fingerprint == none.fingerprint
    assert auto.description == "other with float32 weights" and written(auto) == written(none)


def test_every_key_changes_with_the_bytes_of_the_adapter(base, tmp_path):
    def keys(adapter: str | None) -> tuple[str, ...]:
        plain, chunked = (
            LocalGenerator(str(base), "float32", adapter, kv_reuse=kind, kv_path=str(tmp_path / "kv"))
            for kind in ("none", "chunk")
        )
        [passage, *_] = chunked.prefiller.cache.missing([ASKED])
        return plain.fingerprint, chunked.fingerprint, passage.name

    folder = write_adapter(tmp_path / "adapter", base)
    seen = [keys(None), keys(str(folder))]
    before = (folder / adapters.CARD).read_text()
    (folder / adapters.CARD).write_text(before.replace("mine", "yours"))
    assert keys(str(folder)) == seen[1]  # answers do not depend on the card
    seen.append(keys(str(write_adapter(folder, base, seed=1))))
    adapters.save_peft(tmp_path / "peft", tiny_adapter())
    seen.append(keys(str(tmp_path / "peft")))
    config = tmp_path / "peft" / adapters.PEFT_CONFIG
    config.write_text(config.read_text().replace('"lora_alpha": 4.0', '"lora_alpha": 5.0'))
    seen.append(keys(str(tmp_path / "peft")))
    for column in zip(*seen, strict=True):
        assert len(set(column)) == len(seen)


def test_adapters_that_cannot_be_used(base, tmp_path):
    with pytest.raises(UserError, match=r"no weights at .*nowhere"):
        LocalGenerator(str(base), adapter=str(tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"LocalGenerator\.adapter=.* is not valid: it must be text that is"):
        LocalGenerator(str(base), adapter="")
    with pytest.raises(UserError, match="base is no adapter"):
        _ = LocalGenerator(str(base), adapter=str(base)).fingerprint
    other = write_decoder(tmp_path / "other")
    (other / "generation_config.json").write_text(json.dumps({"eos_token_id": 1}))
    folder = write_adapter(tmp_path / "adapter", base)
    with pytest.raises(UserError, match="belongs to weights with SHA-256"):
        _ = LocalGenerator(str(other), adapter=str(folder)).engine
