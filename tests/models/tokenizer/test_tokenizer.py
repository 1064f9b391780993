"""Tokenizers of every kind: batches, spans, streams, folders, and the default models' goldens."""

import json
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import tokenizers
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import decoders, models, pre_tokenizers, processors

from rag.models.tokenizer import load_tokenizer
from rag.models.tokenizer.huggingface import load as load_folder
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message, UserError
from tests.tiny_models import BYTES, CHATML, byte_level, sentencepiece, wordpiece

ANY_KIND = pytest.mark.parametrize("make", [byte_level, sentencepiece, wordpiece])
STREAMING = pytest.mark.parametrize("make", [byte_level, sentencepiece])


@ANY_KIND
def test_batch_and_truncation(make):
    tokenizer = make()
    texts = ["hello ab", "", "abc " * 9]
    assert tokenizer.encode_batch(texts) == [tokenizer.encode(text) for text in texts]
    around = len(tokenizer.encode(""))
    for ids, cut in zip(
        tokenizer.encode_batch(texts), tokenizer.encode_batch(texts, max_length=5), strict=True
    ):
        used = min(len(ids), 5) - around
        assert len(cut) == min(len(ids), 5)
        assert cut[: len(cut) - (around > 1)] == ids[: used + (around > 0)]
        assert cut[len(cut) - (around > 1) :] == ids[len(ids) - (around > 1) :]
    assert tokenizer.encode_batch([]) == []
    with pytest.raises(UserError, match="max_length=0"):
        tokenizer.encode_batch(texts, max_length=0)


@ANY_KIND
@given(text=st.text(max_size=20))
def test_spans_are_ordered_and_counted(make, text):
    tokenizer = make()
    spans = tokenizer.token_spans(text)
    assert spans.shape == (tokenizer.count(text), 2)
    assert tokenizer.count(text) == len(tokenizer.encode(text, special=False))
    assert (np.diff(spans, axis=0) >= 0).all()
    assert ((spans[:, 0] <= spans[:, 1]) & (spans[:, 1] <= len(text))).all()
    if tokenizer.spec.kind == "byte_level":
        assert set(range(len(text))) == {at for start, end in spans for at in range(start, end)}


@ANY_KIND
def test_save_and_load(make, tmp_path):
    tokenizer = make()
    tokenizer.save(tmp_path)
    again = Tokenizer.load(tmp_path)
    assert again.spec == tokenizer.spec
    for text in ("hello <|im_end|></s>[CLS] ab\u00e9", "", "abc"):
        for flag in (False, True):
            assert again.encode(text, parse_special=flag) == tokenizer.encode(text, parse_special=flag)
    assert again.encode_batch(["a"], max_length=4) == tokenizer.encode_batch(["a"], max_length=4)


def test_load_needs_what_save_wrote(tmp_path):
    with pytest.raises(UserError, match=r"lacks tokenizer_spec\.json"):
        Tokenizer.load(tmp_path)


def test_loading_imports_nothing_heavy(tmp_path):
    byte_level().save(tmp_path)
    code = (
        "import sys; from rag.models.tokenizer.tokenizer import Tokenizer\n"
        "Tokenizer.load(sys.argv[1]).encode('hello')\n"
        "print([name for name in ('jinja2', 'gguf', 'jax', 'transformers') if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parents[3],
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_lone_surrogates_become_replacement_characters():
    tokenizer = byte_level()
    assert tokenizer.decode(tokenizer.encode("he\ud83dllo")) == "he\ufffdllo"
    assert tokenizer.count("\udcff") == 3
    assert tokenizer.token_spans("a\ud800").tolist() == [[0, 1], [1, 2], [1, 2], [1, 2]]


def test_threads_do_not_disturb_one_another():
    tokenizer = byte_level()
    text = "he<|im_end|>" * 50
    want = {flag: tokenizer.encode(text, parse_special=flag) for flag in (False, True)}
    assert want[False] != want[True]
    wrong: list[bool] = []

    def work(flag: bool) -> None:
        wrong.extend(flag for _ in range(200) if tokenizer.encode(text, parse_special=flag) != want[flag])

    threads = [threading.Thread(target=work, args=(bool(n % 2),)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


# --- streams ------------------------------------------------------------------------------------------------


@STREAMING
@given(data=st.data())
def test_stream_equals_decode(make, data):
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size + 2), max_size=40))
    for skip in (True, False):
        stream = tokenizer.text_stream(skip_special=skip)
        assert "".join([*map(stream.push, ids), stream.finish()]) == tokenizer.decode(ids, skip_special=skip)


@given(st.text(max_size=30))
def test_stream_gives_whole_characters(text):
    tokenizer = byte_level()
    stream = tokenizer.text_stream()
    pieces = [stream.push(index) for index in tokenizer.encode(text)]
    assert "".join(pieces) == text
    assert "\ufffd" not in "".join(pieces) or "\ufffd" in text
    assert stream.finish() == ""


@STREAMING
def test_stream_waits_for_a_character(make):
    tokenizer = make()
    ids = tokenizer.encode("\U0001f916", special=False)[-4:]
    stream = tokenizer.text_stream()
    assert [stream.push(index) for index in ids] == ["", "", "", "\U0001f916"]
    assert [stream.push(index) for index in ids[:2]] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_stream_keeps_no_history():
    """Work a token does not grow with the text: what waits is never more than one character."""
    tokenizer = byte_level()
    stream = tokenizer.text_stream()
    broken = tokenizer.encode("\u00e9")[0]  # the first byte of two, again and again
    pieces = [stream.push(broken) for _ in range(1000)]
    assert "".join(pieces) == "\ufffd" * 999
    assert len(stream._decoder.getstate()[0]) == 1


def test_stream_strips_one_first_space():
    tokenizer = sentencepiece()
    stream = tokenizer.text_stream()
    assert [stream.push(index) for index in tokenizer.encode(" a a")] == ["", "", " a", " a"]


def test_encoders_do_not_stream():
    with pytest.raises(UserError, match="wordpiece"):
        wordpiece().text_stream()


# --- Hugging Face folders -----------------------------------------------------------------------------------


def huggingface_folder(folder: Path, config: dict, **files: dict) -> Path:
    core = tokenizers.Tokenizer(models.BPE({text: i for i, text in enumerate(["<s>", "</s>", *BYTES])}, []))
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.add_special_tokens(["<s>", "</s>", "<|im_end|>"])
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    core.enable_truncation(4)
    core.enable_padding(length=9)
    core.save(str(folder / "tokenizer.json"))
    for name, value in {"tokenizer_config": config, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value))
    return folder


def test_folder_special_tokens(tmp_path):
    config = {"bos_token": {"content": "<s>"}, "pad_token": None, "chat_template": CHATML}
    maps = {"special_tokens_map": {"eos_token": "</s>"}, "generation_config": {"eos_token_id": [1, 7]}}
    tokenizer = load_folder(huggingface_folder(tmp_path, config, **maps))
    assert (tokenizer.bos_id, tokenizer.spec.pad_id) == (0, None)
    assert tokenizer.spec.eos_ids == (1, 7, len(BYTES) + 2)
    assert tokenizer.spec.chat_template == CHATML
    assert tokenizer.encode("hello you") == [
        0,
        *tokenizer.encode("hello you", special=False),
    ]
    assert len(tokenizer.encode("hello you")) == 10  # neither cut nor padded as the file asks
    assert tokenizer.decode(tokenizer.encode("h\u00e9</s>", parse_special=True)) == "h\u00e9"


@pytest.mark.parametrize("where", ["list", "file"])
def test_folder_chat_template_files(tmp_path, where):
    named = [{"name": "tool", "template": "no"}, {"name": "default", "template": "yes"}]
    folder = huggingface_folder(tmp_path, {"chat_template": named if where == "list" else "no"})
    if where == "file":
        (folder / "chat_template.jinja").write_text("yes")
    assert load_folder(folder).spec.chat_template == "yes"


def test_folder_sentencepiece_decoder(tmp_path):
    sentencepiece()._core.save(str(tmp_path / "tokenizer.json"))
    (tmp_path / "tokenizer_config.json").write_text('{"bos_token": "<s>", "eos_token": "</s>"}')
    tokenizer = load_folder(tmp_path)
    assert (tokenizer.spec.kind, tokenizer.spec.strips_space) == ("sentencepiece", True)
    assert tokenizer.decode(tokenizer.encode("abc \u00e9")) == "abc \u00e9"


def test_folder_metaspace_decoder(tmp_path):
    core = tokenizers.Tokenizer(models.BPE({"\u2581a": 0, "a": 1}, [], unk_token=None))
    core.decoder = decoders.Metaspace(prepend_scheme="never")
    core.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_folder(tmp_path)
    assert tokenizer.decode([0, 1, 0]) == " aa a"


@pytest.mark.parametrize(("content", "message"), [(None, r"holds no tokenizer\.json"), ("{", "cannot read")])
def test_folder_without_a_tokenizer(tmp_path, content, message):
    if content is not None:
        (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(UserError, match=message):
        load_folder(tmp_path)


def test_folder_with_a_damaged_config(tmp_path):
    huggingface_folder(tmp_path, {})
    for content in ("{", "[]"):
        (tmp_path / "tokenizer_config.json").write_text(content)
        with pytest.raises(UserError, match=r"tokenizer_config\.json"):
            load_folder(tmp_path)


# --- conversations in pieces


def pieces_of(tokenizer, *messages):
    return [
        (tokenizer.decode(ids, skip_special=False), passage)
        for ids, passage in tokenizer.chat_pieces(messages)
    ]


def test_a_conversation_is_cut_around_its_passages():
    tokenizer = byte_level()
    user = Message("user", "In: hello world, world", ((3, 9), (9, 15)), 3)
    assert pieces_of(tokenizer, Message("system", "Be", fixed=2), user) == [
        ("<|im_start|>system\nBe<|im_end|>\n<|im_start|>user\nIn:", False),
        (" hello", True),
        (" world", True),
        (", world<|im_end|>\n<|im_start|>assistant\n", False),
    ]
    alone = tokenizer.encode(" world", special=False)
    assert tokenizer.chat_pieces([user])[2] == (alone, True)
    plain = [Message("user", "hello world")]
    assert tokenizer.chat(plain) == [index for ids, _ in tokenizer.chat_pieces(plain) for index in ids]


def test_the_fixed_beginning_ends_once():
    tokenizer = byte_level()
    found = pieces_of(
        tokenizer, Message("user", "abc", fixed=3), Message("user", "def", fixed=1), Message("user", "x")
    )
    assert [text for text, _ in found] == [
        "<|im_start|>user\nabc<|im_end|>\n<|im_start|>user\nd",
        "ef<|im_end|>\n<|im_start|>user\nx<|im_end|>\n<|im_start|>assistant\n",
    ]


@pytest.mark.parametrize("spans", [(), ((0, 5),), ((0, 5), (5, 10)), ((2, 6),), ((0, 10),), ((3, 3),)])
def test_no_piece_of_a_message_is_a_special_token(spans):
    tokenizer = byte_level()
    content, special = (
        "<|im_end|>",
        {tokenizer.encode(t, parse_special=True, special=False)[0] for t in SPECIAL},
    )
    pieces = tokenizer.chat_pieces([Message("user", content, spans)])
    ids = [index for some, _ in pieces for index in some]
    assert sum(index in special for index in ids) == 3  # the template's own
    assert tokenizer.decode(ids, skip_special=False).count(content) == 2
    assert [passage for _, passage in pieces].count(True) == len([1 for a, b in spans if a < b])


SPECIAL = ("<|im_start|>", "<|im_end|>")


# --- the real ones ------------------------------------------------------------------------------------------


@pytest.mark.weights
def test_default_generator_equals_llama_cpp(generator_weights):
    tokenizer = load_tokenizer(generator_weights)
    rows = json.loads((Path(__file__).parents[2] / "goldens" / "tokenizer_smollm.json").read_text())
    assert len(rows) == 60
    for row in rows:
        assert tokenizer.encode(row["text"], special=False) == row["ids"], row["text"]
        assert tokenizer.encode(row["text"], special=False, parse_special=True) == row["ids_parsed"], row[
            "text"
        ]
        assert tokenizer.decode(row["ids"]) == row["text"]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_ids) == (49152, 1, {0, 2})
    ids = tokenizer.chat([Message("system", "Be brief."), Message("user", "Hi")])
    want = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == want


@pytest.mark.weights
def test_default_embedder_tokenizer(embedder_weights):
    tokenizer = load_folder(embedder_weights)
    assert tokenizer.encode("Hello, world") == [101, 7592, 1010, 2088, 102]
    assert len(tokenizer.encode("word " * 300)) == 302  # the file's own padding and truncation to 128 are off
    assert (tokenizer.vocab_size, tokenizer.spec.pad_id) == (30522, 0)
