"""Chat templates: what they may do, what they may not, and messages that hold special tokens."""

import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rag.models.tokenizer.gguf import from_metadata
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.types import Message, UserError
from tests.tiny_models import BPE_TOKENS, MERGES, byte_level, gguf_metadata, sentencepiece


def with_template(source: str) -> Tokenizer:
    metadata = gguf_metadata("gpt2", BPE_TOKENS, pre="gpt-2", merges=MERGES, bos_token_id=1, eos_token_id=2)
    return from_metadata(metadata | {"tokenizer.chat_template": source})


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


# Every noncharacter and many lone surrogates, beside what is special to the tokenizer: any of them was, is or could
# be a mark of the tokenizer's own.
ODD = st.text(
    st.one_of(
        st.sampled_from([*map(chr, range(0xFDD0, 0xFDF0)), "\ufffe", "\uffff", "\U0010ffff"]),
        st.sampled_from([*map(chr, range(0xD800, 0xD810)), "\udbff", "\udc00", "\udfff"]),
        st.sampled_from("he<|im_endstar>\n "),
        st.characters(),
    ),
    max_size=12,
)
CONTENTS = st.lists(
    st.one_of(ODD, st.sampled_from(["<|im_end|>", "<|im_start|>", "<|endoftext|>", "<tool>"])), max_size=8
).map("".join)
EVERY_NONCHARACTER = "".join(map(chr, (*range(0xFDD0, 0xFDF0), 0xFFFE, 0xFFFF)))


@given(st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), CONTENTS), max_size=4))
@example([("user", EVERY_NONCHARACTER), ("assistant", EVERY_NONCHARACTER + "<|im_end|>")])
def test_a_conversation_of_any_texts_is_what_its_parts_are(turns):
    """The reference writes the ids of ChatML down, part by part, and has no need of marks."""
    tokenizer = byte_level()
    _, start, end = range(3)
    want = []
    for role, content in turns:
        inside = tokenizer.encode(f"{role}\n{content}", special=False)
        want += [start, *inside, end, *tokenizer.encode("\n", special=False)]
    want += [start, *tokenizer.encode("assistant\n", special=False)]
    messages = [Message(role, content) for role, content in turns]
    assert tokenizer.chat(messages) == want
    shown = "".join(f"<|im_start|>{role}\n{valid(content)}<|im_end|>\n" for role, content in turns)
    assert tokenizer.decode(want, skip_special=False) == shown + "<|im_start|>assistant\n"


@given(CONTENTS, st.lists(st.integers(0, 40), max_size=6), st.integers(0, 40))
@example(EVERY_NONCHARACTER, [4, 5, 9, 12], 3)
def test_pieces_of_any_text_are_its_parts(content, positions, fixed):
    tokenizer = byte_level()
    cuts = sorted({min(at, len(content)) for at in positions})
    spans = tuple(zip(cuts[::2], cuts[1::2], strict=False))
    pieces = tokenizer.chat_pieces([Message("user", content, spans, min([fixed, len(content), *cuts]))])
    passages = [tokenizer.encode(content[start:end], special=False) for start, end in spans]
    assert [ids for ids, passage in pieces if passage] == passages
    ids = [index for some, _ in pieces for index in some]
    assert [index for index in ids if index in (0, 1, 2)] == [1, 2, 1]
    want = f"<|im_start|>user\n{valid(content)}<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(ids, skip_special=False) == want


def valid(text: str) -> str:
    return re.sub("[\ud800-\udfff]", "\ufffd", text)


@pytest.mark.parametrize("content", ["🤖", "<<a>", "<<a><a>🤖🤖", "<a<a>>", "x🤖<a>\ufdd0"])
def test_special_tokens_of_one_character_and_within_one_another(content):
    tokenizer = byte_level()
    tokenizer._core.add_special_tokens(["🤖", "<a>", "<<a>"])
    tokenizer = Tokenizer(tokenizer._core, tokenizer.spec)
    special = {tokenizer.encode(text, special=False, parse_special=True)[0] for text in ("🤖", "<a>", "<<a>")}
    assert len(special) == 3
    ids = tokenizer.chat([Message("user", content)])
    assert special.isdisjoint(ids)
    assert content in tokenizer.decode(ids, skip_special=False)


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
