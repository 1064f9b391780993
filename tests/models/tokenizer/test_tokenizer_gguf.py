"""Tokenizers built from GGUF metadata: tiny vocabularies against brute force."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import pre_tokenizers

from rag.models.tokenizer.gguf import from_metadata
from rag.types import UserError
from tests import reference
from tests.tiny_models import (
    BPE_TOKENS,
    MERGES,
    NORMAL,
    SPM_TOKENS,
    SPM_WORDS,
    WORD_TOKENS,
    byte_level,
    gguf_metadata,
    sentencepiece,
    texts_of,
    wordpiece,
)

# --- byte-level BPE -----------------------------------------------------------------------------------------


def test_bpe_merges_in_order():
    tokenizer = byte_level()
    assert texts_of(tokenizer, tokenizer.encode("hello wor he")) == ["hello", "\u0120wor", "\u0120", "he"]
    assert tokenizer.encode("") == []
    assert tokenizer.vocab_size == len(BPE_TOKENS)


@given(st.text(alphabet="helo wrin12\u00e9\n", max_size=20))
def test_bpe_equals_brute_force(text):
    tokenizer = byte_level()
    words = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(text)
    order = {tuple(merge.split(" ")): i for i, merge in enumerate(MERGES)}
    want = [
        token
        for word, _ in words
        for token in reference.merge_tokens(list(word), lambda left, right: order.get((left, right)))
    ]
    assert texts_of(tokenizer, tokenizer.encode(text)) == want


START = ["I", "'ll", " PAY"]
DIGITS = [" ", "1", "2", "3", "4", "\u0663", "  ", " now"]
SPLIT_CASES = {
    "gpt-2": [*START, "'", "LL", " 1234\u0663", "  ", " now", "!!", "\n", "\n", "ok", "\t"],
    "smollm": [*START, "'", "LL", *DIGITS, "!!", "\n", "\n", "ok", "\t"],
    "llama-bpe": [*START, "'LL", " ", "123", "4\u0663", "  ", " now", "!!\n\n", "ok", "\t"],
    "qwen2": [*START, "'LL", *DIGITS, "!!\n\n", "ok", "\t"],
    "deepseek-llm": ["I", "'", "ll", " PAY", "'", "LL", *DIGITS, "!!", "\n", "\n", "ok", "\t"],
}
ALIASES = {"starcoder": "smollm", "llama-v3": "llama-bpe", "llama3": "llama-bpe", "deepseek-r1-qwen": "qwen2"}


@pytest.mark.parametrize("name", [*SPLIT_CASES, *ALIASES])
def test_pre_tokenizer_splits(name):
    text = "I'll PAY'LL 1234\u0663   now!!\n\nok\t"
    splitter = byte_level(pre=name)._core.pre_tokenizer
    pieces = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
    assert pieces == SPLIT_CASES[ALIASES.get(name, name)]


def test_deepseek_letters():
    """Scripts part, U+3000 is punctuation, and ASCII letters part from others, being in its class too."""
    splitter = byte_level(pre="deepseek-llm")._core.pre_tokenizer
    text = "\u00e9t\u00e9\u4f60\u597d\u05d0a\u3000\u3002"
    pieces = [text[start:end] for _, (start, end) in splitter.pre_tokenize_str(text)]
    assert pieces == ["\u00e9", "t", "\u00e9", "\u4f60\u597d", "\u05d0", "a", "\u3000\u3002"]


def test_llama3_takes_whole_words_first():
    typed = [*BPE_TOKENS, ("in1", NORMAL), ("ello", NORMAL)]
    values = {"merges": MERGES, "bos_token_id": 1, "eos_token_id": 2}
    tokenizer = from_metadata(gguf_metadata("gpt2", typed, pre="llama-bpe", **values))
    assert texts_of(tokenizer, tokenizer.encode("ello")) == ["<|im_start|>", "ello"]  # BOS by default
    plain = from_metadata(gguf_metadata("gpt2", typed, pre="gpt-2", **values))
    assert texts_of(plain, plain.encode("ello")) == ["e", "ll", "o"]


def test_qwen2_normalises():
    tokenizer = byte_level(pre="qwen2")
    assert tokenizer.encode("cafe\u0301") == tokenizer.encode("caf\u00e9")
    assert tokenizer.token_spans("e\u0301!")[-1].tolist() == [2, 3]


def test_special_tokens_around_and_inside():
    tokenizer = byte_level(add_bos_token=True, add_eos_token=True)
    text = "he<|im_end|>"
    assert tokenizer.encode(text, parse_special=True) == [1, *tokenizer.encode("he", special=False), 2, 2]
    plain = tokenizer.encode(text, special=False)
    assert 2 not in plain
    assert tokenizer.decode(plain) == text
    assert tokenizer.bos_id == 1
    assert tokenizer.eos_ids == {0, 2}  # <|endoftext|> ends a text whatever the metadata say
    assert tokenizer.spec.eos_ids[0] == 2


def test_end_tokens_from_metadata_and_names():
    typed = [*BPE_TOKENS, ("<turn>", NORMAL), ("<|eot_id|>", NORMAL)]
    tokenizer = from_metadata(
        gguf_metadata("gpt2", typed, pre="gpt-2", merges=MERGES, eos_token_id=2, eot_token_id=len(BPE_TOKENS))
    )
    assert tokenizer.eos_ids == {0, 2, len(BPE_TOKENS), len(BPE_TOKENS) + 1}
    assert len(typed) - 1 not in tokenizer.encode("<|eot_id|>")  # special, although the file says ordinary


def test_user_defined_and_unused_tokens():
    tokenizer = byte_level()
    tool, unused = len(BPE_TOKENS) - 2, len(BPE_TOKENS) - 1
    assert tokenizer.encode("he<tool>") == [*tokenizer.encode("he"), tool]
    assert tokenizer.decode([tool]) == "<tool>"
    assert unused not in tokenizer.encode("[PAD7]", parse_special=True)
    assert tokenizer.decode([unused, *tokenizer.encode("he"), 99_999]) == "he"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pre": "superbpe"}, "superbpe.*gpt-2, smollm"),
        ({"pre": None}, r"tokenizer\.ggml\.pre.* is None"),
        ({"model": "rwkv"}, "rwkv.*gpt2, llama, bert"),
        ({"merges": None}, "no merges"),
        ({"tokens": []}, "no vocabulary"),
        ({"tokens": ["a"] * len(BPE_TOKENS)}, "damaged.*1 different"),
        ({"token_type": [1]}, "damaged.*1 types"),
        ({"merges": ["h x"]}, "damaged"),
    ],
)
def test_bad_metadata_is_a_user_error(change, message):
    with pytest.raises(UserError, match=message):
        byte_level(**change)


# --- SentencePiece ------------------------------------------------------------------------------------------


@settings(max_examples=300)
@given(st.text(alphabet="abc </s>\u2581\u00e9", max_size=24))
def test_sentencepiece_equals_brute_force(text):
    tokenizer = sentencepiece()
    spaced = ("\u2581" + text if text else "").replace(" ", "\u2581")
    merged = reference.merge_tokens(
        list(spaced), lambda left, right: None if left + right not in SPM_WORDS else -SPM_WORDS[left + right]
    )
    want = [
        token
        for piece in merged
        for token in ([piece] if piece in SPM_WORDS else [f"<0x{byte:02X}>" for byte in piece.encode()])
    ]
    assert texts_of(tokenizer, tokenizer.encode(text, special=False)) == want
    assert tokenizer.decode(tokenizer.encode(text)) == text.replace("\u2581", " ")


def test_sentencepiece_specials():
    tokenizer = sentencepiece()
    assert tokenizer.encode("") == [1]  # BOS by default
    assert tokenizer.encode("a", special=False) == tokenizer.encode("a")[1:]
    assert 2 not in tokenizer.encode("</s>")  # characters do not merge into the control token
    assert tokenizer.encode("a</s>a", special=False, parse_special=True) == [
        *tokenizer.encode("a", special=False), 2, *tokenizer.encode("a", special=False),
    ]  # fmt: skip
    assert tokenizer.encode("[x]", special=False) == [len(SPM_TOKENS) - 1]
    assert tokenizer.eos_ids == {2}


def test_sentencepiece_without_prefix():
    tokenizer = sentencepiece(add_space_prefix=False, add_bos_token=False)
    assert texts_of(tokenizer, tokenizer.encode("ab a")) == ["ab", "\u2581a"]
    assert tokenizer.decode(tokenizer.encode(" a")) == " a"


def test_sentencepiece_needs_scores():
    with pytest.raises(UserError, match="scores"):
        from_metadata(gguf_metadata("llama", SPM_TOKENS))


# --- WordPiece ----------------------------------------------------------------------------------------------


def test_wordpiece_names_and_specials():
    tokenizer = wordpiece()
    assert texts_of(tokenizer, tokenizer.encode("Unaffable, caf\u00e9s \u4f60\u597d")) == [
        "[CLS]", "un", "##aff", "##able", ",", "cafe", "##s", "\u4f60", "[UNK]", "[SEP]",
    ]  # fmt: skip
    assert tokenizer.encode("") == [2, 3]
    assert tokenizer.eos_ids == frozenset()
    assert tokenizer.decode(tokenizer.encode("Unaffable, hello")) == "unaffable, hello"


@given(st.text(alphabet="unaflebws", min_size=1, max_size=12))
def test_wordpiece_equals_brute_force(word):
    tokenizer = wordpiece()
    names = {
        text.removeprefix("\u2581") if text[0] == "\u2581" else f"##{text}" for text, _ in WORD_TOKENS[6:]
    }
    want = reference.longest_pieces(word, names, "[UNK]")
    assert texts_of(tokenizer, tokenizer.encode(word, special=False)) == want


def test_wordpiece_spans_leave_white_space_out():
    assert wordpiece().token_spans("  Un  affable").tolist() == [[2, 4], [6, 13]]
    assert wordpiece().token_spans(" ").shape == (0, 2)
