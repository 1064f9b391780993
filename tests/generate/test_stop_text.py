"""An answer ends before the first stop string, in whatever pieces it arrives, and then before a repetition."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.generate import Request
from rag.generate.stop_text import EndedText, StoppedText


@pytest.mark.parametrize(
    ("stop", "expected"),
    [
        ((), "abcabd"),
        (("zz",), "abcabd"),
        (("abd",), "abc"),
        (("bd", "ca"), "ab"),
        (("d",), "abcab"),
        (("",), "abcabd"),
    ],
)
def test_stop_strings_may_span_tokens(stop, expected):
    text = StoppedText(stop)
    pieces = list(map(text.push, "abcabd"))
    assert "".join([*pieces, text.finish()]) == expected
    assert text.stopped == (expected != "abcabd")


@given(
    st.text("abcd", max_size=12),
    st.lists(st.text("abcd", min_size=1, max_size=4), max_size=3),
    st.lists(st.integers(0, 12), max_size=4),
)
def test_the_text_before_a_stop_string_does_not_depend_on_its_pieces(text, stop, cuts):
    """Tokens come one by one, several a dispatch, or as many as a draft has."""
    ends = [end for end in range(len(text) + 1) if any(text[:end].endswith(s) for s in stop)]
    wanted = (
        min((text[: ends[0] - len(s)] for s in stop if text[: ends[0]].endswith(s)), key=len)
        if ends
        else text
    )
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    stopped = StoppedText(stop)
    pieces = [stopped.push(text[a:b]) for a, b in pairwise(cuts)]
    assert "".join([*pieces, stopped.finish()]) == wanted


def test_no_text_is_held_back_longer_than_it_must():
    assert list(map(StoppedText(("XY",)).push, "aXbX")) == ["a", "", "Xb", ""]


def test_stop_strings_come_first():
    text = EndedText(Request((), stop=("built",), no_repeat=True))
    assert (
        text.push("The hut is red. It was built. The hut is red. ") + text.finish()
        == "The hut is red. It was "
    )
    assert text.stopped
    text = EndedText(Request((), stop=("built",), no_repeat=True))
    assert text.push("The hut is red. The hut is red. It was built") + text.finish() == "The hut is red. "
    text = EndedText(Request((), no_repeat=False))
    assert text.push("Yes, it is. Yes, it is.") + text.finish() == "Yes, it is. Yes, it is."
    assert not text.stopped
