"""Exported tokenizers give the ids of the tokenizers that they were made of."""

import json
from pathlib import Path

import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from rag.models.tokenizer import huggingface
from rag.models.tokenizer.export import gguf_metadata, huggingface_files
from rag.models.tokenizer.gguf import PRE_TOKENIZERS, from_metadata
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import UserError
from tests.one_sentence import is_one_sentence
from tests.tiny_models import BPE_TOKENS, byte_level, sentencepiece
from tests.trials import tries

ROWS = len(BPE_TOKENS) + 3  # of an embedding with more rows than tokens
SPECS = [{"pre": name} for name in PRE_TOKENIZERS] + [
    {"add_bos_token": True, "add_eos_token": True},
    {"eot_token_id": 5, "eom_token_id": 6, "unknown_token_id": 0},
]


def in_folder(tokenizer: Tokenizer, folder: Path) -> Tokenizer:
    """Write the files of a Hugging Face folder, and load them."""
    folder.mkdir()
    for name, content in huggingface_files(tokenizer).items():
        (folder / name).write_text(content, encoding="utf-8")
    return huggingface.load(folder)


@pytest.fixture(scope="module")
def copies(tmp_path_factory) -> list[list[Tokenizer]]:
    """Tokenizers, each with its copies in both formats, the second made of the first."""
    found = []
    for values in SPECS:
        tokenizer = byte_level(**values)
        folder = in_folder(tokenizer, tmp_path_factory.mktemp("tokenizer") / "folder")
        found.append([tokenizer, folder, from_metadata(gguf_metadata(folder, ROWS, "here"))])
    for values in ({}, {"add_space_prefix": False}, {"add_eos_token": True}):
        tokenizer = sentencepiece(**values)
        found.append([tokenizer, in_folder(tokenizer, tmp_path_factory.mktemp("tokenizer") / "folder")])
    return found


@tries(100, 5000)
@given(
    st.lists(
        st.sampled_from([*"helo wrin12abc\n", "\u00e9", "\u6ce8", "<|im_end|>", "<tool>", "[x]"]), max_size=20
    )
)
def test_ids_of_any_text_are_equal(copies, parts):
    text = "".join(parts)
    for tokenizer, *others in copies:
        plain, special = tokenizer.encode(text), tokenizer.encode(text, special=False, parse_special=True)
        for other in others:
            assert other.encode(text) == plain
            assert other.encode(text, special=False, parse_special=True) == special
            assert other.decode(plain) == tokenizer.decode(plain)


def test_properties_are_equal(copies):
    names = ("kind", "bos_id", "eos_ids", "unk_id", "pad_id", "strips_space", "chat_template")
    for tokenizer, *others in copies:
        for other in others:
            for name in names:
                assert getattr(other.spec, name) == getattr(tokenizer.spec, name), name


def test_ids_without_a_token_become_unused_tokens(copies):
    converted = copies[0][2]
    assert converted.largest_id == ROWS - 1
    assert converted.spec.unused_ids == tuple(range(len(BPE_TOKENS), ROWS))


def changed(folder: Path, change) -> Tokenizer:
    """Load byte_level() from a folder after `change(core)`."""
    in_folder(byte_level(), folder)
    core = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    change(core)
    core.save(str(folder / "tokenizer.json"))
    return huggingface.load(folder)


def lower(core) -> None:
    core.normalizer = normalizers.Lowercase()


def split_at_spaces(core) -> None:
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()


def strip_before_a_token(core) -> None:
    core.add_special_tokens([AddedToken("<mask>", lstrip=True, special=True)])


def begin_with_another_token(core) -> None:
    core.post_processor = processors.TemplateProcessing(single=["x", "$A"], special_tokens=[("x", 0)])


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lower, "a normalizer, merge rules or end tokens"),
        (split_at_spaces, "splits a text into words in another way"),
        (strip_before_a_token, "removes the white space beside '<mask>'"),
        (begin_with_another_token, "other tokens around a text than BOS and EOS"),
    ],
)
def test_what_gguf_cannot_express_is_refused(change, says, tmp_path):
    tokenizer = changed(tmp_path / "folder", change)
    with pytest.raises(UserError, match=f"in here .*{says}.*; export it with format=huggingface") as error:
        gguf_metadata(tokenizer, ROWS, "here")
    assert is_one_sentence(str(error.value))


def test_sentencepiece_and_many_end_tokens_are_refused(tmp_path):
    with pytest.raises(UserError, match="not byte-level BPE with merges"):
        gguf_metadata(sentencepiece(), 400, "here")
    folder = tmp_path / "folder"
    in_folder(byte_level(), folder)
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [4, 5, 6]}))
    with pytest.raises(UserError, match="end tokens that GGUF cannot express"):
        gguf_metadata(huggingface.load(folder), ROWS, "here")
