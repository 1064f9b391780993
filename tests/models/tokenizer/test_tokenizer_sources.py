"""A new kind of tokenizer file: one module and one row of SOURCES, and both model families load it."""

import sys

import pytest

from rag.models import tokenizer
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.configuration import read_settings, write_settings
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.tokenizer import gguf, huggingface
from rag.models.tokenizer.tokenizer import TokenizerSpec
from rag.types import UserError
from tests.tiny_models import decoder_gguf, wordpiece, write_decoder, write_encoder, write_gguf


def matches(path):
    return (path / "words.txt").is_file()


def files(path):
    return [path / "words.txt"]


def load(path):
    return wordpiece()


@pytest.fixture
def with_words(monkeypatch):
    monkeypatch.setattr(tokenizer, "SOURCES", (sys.modules[__name__], *tokenizer.SOURCES))


@pytest.mark.parametrize(
    ("write", "checkpoint"), [(write_decoder, llama_checkpoint), (write_encoder, bert_checkpoint)]
)
def test_a_new_source_is_part_of_the_checkpoint(tmp_path, monkeypatch, with_words, write, checkpoint):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "model"
    folder.mkdir()
    write(folder)
    before = checkpoint.source_files(folder)
    assert len(set(before)) == len(before)
    (folder / "words.txt").write_text("seal")
    (folder / "tokenizer.json").unlink()
    after = checkpoint.source_files(folder)
    assert folder / "words.txt" in after and folder / "config.json" in after
    assert checkpoint.load(folder)[1].encode("hello") == wordpiece().encode("hello")


def test_each_kind_of_checkpoint_has_a_source(tmp_path):
    write_gguf(tmp_path / "model.gguf", *decoder_gguf())
    assert gguf.matches(tmp_path / "model.gguf") and not gguf.matches(tmp_path)
    assert tokenizer.tokenizer_files(tmp_path / "model.gguf") == [tmp_path / "model.gguf"]
    for name in ("tokenizer.json", "chat_template.jinja", "weights.bin"):
        (tmp_path / name).write_text("{}")
    assert tokenizer.tokenizer_files(tmp_path) == [
        tmp_path / "tokenizer.json",
        tmp_path / "chat_template.jinja",
    ]
    assert huggingface.matches(tmp_path)


def test_settings_are_read_as_they_were_written(tmp_path):
    spec = TokenizerSpec("wordpiece", 3, (1, 2), chat_template='{{ "\u00e9" }}')
    write_settings(tmp_path / "spec.json", spec)
    assert read_settings(tmp_path / "spec.json", TokenizerSpec) == spec
    (tmp_path / "spec.json").write_text('{"kind": "wordpiece", "bos_id": "three"}')
    with pytest.raises(UserError, match=r"bos_id: .* convert the checkpoint again"):
        read_settings(tmp_path / "spec.json", TokenizerSpec)
