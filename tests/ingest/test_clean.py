"""Cleaning removes the right characters, preserves the others, and changes nothing the second time."""

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.ingest.clean import NONCHARACTERS, clean

# Any code point, lone surrogates included, with much of what the rules are about.
MESSY = st.text(
    st.one_of(
        st.characters(),
        st.sampled_from(
            " \t\n\r\v\f\x00\x1b\x85\xa0\xad\ufeff\u200b\u200d\u2028\u2029\u202f\u3000\u0301"
            "\ud800\udfff\ufdd0\uffff\U0010fffe"
        ),
    )
)


@pytest.mark.parametrize(
    "before, after",
    [
        ("one\r\ntwo\rthree\x0bfour\x0cfive\x85six\u2028seven", "one\ntwo\nthree\nfour\nfive\nsix\nseven"),
        ("re\u00adtrieval\ufeff", "retrieval"),
        ("a\x00b\x1b[31mc\x7f\x9f", "ab[31mc"),
        ("10\u00a0km\u202f/h", "10 km /h"),
        ("line  \t\nnext\u3000 ", "line\nnext"),
        ("a\n\n\n \n\t\n\nb", "a\n\nb"),
        ("\n \n  code\n\n", "  code"),
        ("cafe\u0301", "caf\u00e9"),
        ("e\u00ad\u0301", "\u00e9"),
        ("x\ud83dy", "x\ufffdy"),
        ("a\ufdd0b\ufdefc\ufffed\uffffe\U0001fffef\U0010ffff", "a\ufffdb\ufffdc\ufffdd\ufffde\ufffdf\ufffd"),
        ("\ufdcf\ufdf0\ufffd", "\ufdcf\ufdf0\ufffd"),  # their neighbours are characters
        ("\t\n \r\n", ""),
        ("", ""),
    ],
)
def test_rules(before, after):
    assert clean(before) == after


@pytest.mark.parametrize(
    "text", ["👩\u200d👩\u200d👧 family", "می\u200cخواهم", "\u200fשלום\u200e 1", "a\tb", "日本語。"]
)
def test_what_carries_meaning_stays(text):
    assert clean(text) == text


@given(MESSY)
def test_result_is_a_fixed_point_in_normal_form(text):
    result = clean(text)
    assert clean(result) == result
    assert unicodedata.is_normalized("NFC", result)
    assert "\n\n\n" not in result
    assert not result.startswith("\n") and not result.endswith("\n")
    assert all(line == line.rstrip() for line in result.split("\n"))
    assert not [c for c in result if unicodedata.category(c) in ("Cc", "Cs") and c not in "\n\t"]
    assert not {ord(c) for c in result} & set(NONCHARACTERS)
    assert result.encode("utf-8").decode("utf-8") == result


@given(st.text("a\u0301\u0327\u0344\u1dfa\U00016ff0\uac00\u11a7\u1161", min_size=20, max_size=120))
def test_of_many_combining_marks_thirty_stay(text):
    result = clean(text)
    assert clean(result) == result
    assert unicodedata.is_normalized("NFC", result)
    longest = run = 0
    for c in result:
        run = run + 1 if unicodedata.combining(c) else 0
        longest = max(longest, run)
    assert longest <= 30


@given(st.text(st.characters(categories=("L", "N", "P", "S"))))
def test_visible_characters_stay(text):
    assert clean(text) == unicodedata.normalize("NFC", text)


@pytest.mark.parametrize("unit", [" ", "\n", " \n", "\u0301", "\x00", "a \t", "\u0301\u0327", "\u0344"])
def test_long_runs_are_linear(unit):
    text = unit * 200_000  # a quadratic rule would not come back
    assert len(clean(text + "x")) <= len(text) + 1
