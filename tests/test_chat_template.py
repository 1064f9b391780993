"""Chat templates: what they may do, what they may not, and messages that hold special tokens."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.models.tokenizer import Tokenizer
from rag.types import Message, UserError
from tests.tiny_tokenizers import BPE_TOKENS, MERGES, byte_level, gguf, sentencepiece


def with_template(source: str) -> Tokenizer:
    metadata = gguf("gpt2", BPE_TOKENS, pre="gpt-2", merges=MERGES, bos_token_id=1, eos_token_id=2)
    return Tokenizer.from_gguf(metadata | {"tokenizer.chat_template": source})


def test_chat_follows_the_template():
    tokenizer = byte_level()
    ids = tokenizer.chat([Message("system", "hello"), Message("user", "in")])
    text = "<|im_start|>system\nhello<|im_end|>\n<|im_start|>user\nin<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == text
    assert ids == tokenizer.encode(text, special=False, parse_special=True)
    bare = tokenizer.chat([Message("user", "in")], add_generation_prompt=False)
    assert tokenizer.decode(bare, skip_special=False) == "<|im_start|>user\nin<|im_end|>\n"


@given(
    st.text(alphabet="he<|im_endstar>\n\ufdd0", max_size=20),
    st.sampled_from(["<|im_end|>", "<|im_start|>", ""]),
)
def test_chat_messages_hold_no_special_tokens(text, inserted):
    tokenizer = byte_level()
    content = text[: len(text) // 2] + inserted + text[len(text) // 2 :]
    ids = tokenizer.chat([Message("user", content)])
    assert [index for index in ids if index in (0, 1, 2)] == [1, 2, 1]  # the template's own, and no other
    want = f"<|im_start|>user\n{content}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == want


def test_chat_needs_a_template():
    with pytest.raises(UserError, match="no chat template"):
        sentencepiece().chat([Message("user", "a")])


@pytest.mark.parametrize(
    ("source", "want"),
    [
        ("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "<|im_start|>he<|im_end|>"),
        ("{% for n in range(9) %}{% if n == 2 %}{% break %}{% endif %}{{ n }}{% endfor %}", "01"),
        ("{% generation %}{{ messages[0]['content'] }}{% endgeneration %}!", "he!"),
        ("{{ {'a': '<\u00e9>'} | tojson }}", '{"a": "<\u00e9>"}'),
        ("{{ strftime_now('%Y-%m-%d') }}", "2026-01-01"),
        ("a\n  {% if true %}\nb\n  {% endif %}\nc", "a\nb\nc"),
    ],
)
def test_template_offers_what_templates_expect(source, want):
    tokenizer = with_template(source)
    assert tokenizer.decode(tokenizer.chat([Message("user", "he")]), skip_special=False) == want


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ raise_exception('no system role') }}", "no system role"),
        ("{{ messages.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not"),
        ("{{ messages[5].content }}", "has no"),
        ("{% for %}", "broken"),
        ("{{ 1 / 0 }}", "division"),
        ("{% for n in range(10 ** 9) %}{% endfor %}", "number above"),
    ],
)
def test_template_failures_are_user_errors(source, message):
    with pytest.raises(UserError, match=message):
        with_template(source).chat([Message("user", "he")])
