"""Sentences end where a reader would end them, in many scripts, and in linear time."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.ingest.sentences import sentences

# fmt: off
PARTS = [
    "word ", "Two words. ", "a", "\n", "\n\n", "# Head\n", "- item\n", ". ", "?! ", "e.g. ", "3.14 ",
    "Dr. No ", "\t", "🤖", "👩\u200d👧 ", "e\u0301 ", "東京は首都。", "שלום ", "مرحبا. ",
    "\u200d", "\ufffd", "| a | b |\n", "x" * 30, "   ",
]
# fmt: on
TEXTS = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)


HOSTILE = [*'. |. |a| |\n|# |a\n|."|。|.[1]|   \n|-|=|```\n|\n#|1. |؟|e.g. '.split("|"), "| ", " |", "\n|"]


@pytest.mark.parametrize("unit", HOSTILE)
def test_long_runs_are_linear(unit):
    text = "\n" + unit * (40_000 // len(unit)) + "x"  # a quadratic pattern would not come back
    assert sentences(text)[-1][1] == len(text)


@pytest.mark.parametrize(
    "marked",  # a sentence ends at each ¦
    [
        "First one. ¦Second one! ¦Third one? ¦Last",
        "Dr. Smith met Mrs. Jones vs. Prof. Lee. ¦They spoke.",
        "Pi is 3.14 and e is 2.718. ¦Version 3.11.2 is out.",
        "J. R. R. Tolkien wrote it. ¦C. S. Lewis did not.",
        "He lives in the U.S. Senate building. ¦She came at 5 p.m. Monday.",
        "He lives in the U.S. ¦The house is old. ¦Apple Inc. sells phones.",
        "See Fig. 2, No. 5 and Smith et al. (2019). ¦On Jan. 3 it ended.",
        "Did he say no. ¦He did.",
        "It grew in 1999. ¦Then it fell by 5. ¦So it is.",
        "Use tools, e.g. Python, i.e. code. ¦Done.",
        '"Stop!" he said. ¦"Go!" ¦She left. ¦(It was late.) ¦"Why?" ¦End.',
        "He said “no.” ¦She agreed.",
        "Wait... what? ¦Well... ¦Yes?! ¦No.",
        "It is known.[12] ¦So is this.[3][4] ¦End",
        "Visit example.com/a.b?c=d. ¦It works.",
        "A wrapped\nline goes on. ¦Next\nline.",
        "# Heading ¦\nText here. ¦More. ¦\n\n## Next ¦\nText",
        "intro: ¦\n- one ¦\n- two. ¦Three. ¦\n1. First step. ¦\n2. Second step. ¦\n\nafter",
        "a | b ¦\nc | d ¦\n\ntext",
        "Title ¦\n===== ¦\nText",
        "東京は日本の首都です。¦人口は多い！¦「そうですか？」¦はい。",
        "مرحبا بالعالم. ¦كيف حالك؟ ¦أنا بخير.",
        "यह एक वाक्य है। ¦यह दूसरा है।",
        "Привет, мир. ¦А. С. Пушкин писал. ¦Да.",
        "Emoji end here. ¦🤖 beep. ¦OK 👩\u200d👧. ¦Fin.",
        "no stop at all",
    ],
)
def test_sentences_end_where_they_should(marked):
    text = marked.replace("¦", "")
    found = [text[start:end] for start, end in sentences(text)]
    assert found == [part.strip() for part in marked.split("¦")]


@given(TEXTS | st.text(max_size=80))
def test_sentences_hold_every_visible_character_once(text):
    spans = sentences(text)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    assert all(a < b for a, b in spans)
    assert all(b <= c for (_, b), (c, _) in pairwise(spans))
