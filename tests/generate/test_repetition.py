"""An answer ends before a sentence that it already has, in whatever pieces it arrives."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.generate.repetition import UnrepeatedText
from rag.ingest.sentences import sentences
from tests.trials import tries


def unrepeated(*pieces):
    """Return what remains of a text in these pieces, and whether it was ended."""
    text = UnrepeatedText()
    return "".join([*map(text.push, pieces), text.finish()]), text.stopped


@pytest.mark.parametrize(
    ("kept", "rest"),
    [
        ("The answer to your question is:\n\n", "The answer to your question is:\n\nThe answer to"),
        ("It was built in 1961. ", "It was built in 1961. It"),
        ("It was built in 1961. ", "It was built in 1961."),  # at the end of the text
        ("It was built in 1961.\n", " it  was BUILT in\t1961.\n"),
        ("It stands on legs. It was built in 1961. ", "It stands on legs. It was built in 1961. "),
        ("Nobody lives there [1].\n\n", "Nobody lives there [2].\n\n"),
        ("Nobody lives there. [1] ", "Nobody lives there. [2, 3] "),
        ("1. The ship is red.\n2. The hut is red.\n", "3. The ship is red.\n"),
        ("- a barometer screen\n- a tide gauge\n", "* a barometer screen\n"),
        ("It was made by Dr. Brandt Inc. in May. ", "It was made by Dr. Brandt Inc. in May. "),
        ("这座小屋建于一九六一年。", "这座小屋建于一九六一年。它"),
    ],
)
def test_the_text_ends_before_a_repetition(kept, rest):
    for pieces in ((kept + rest,), tuple(kept + rest)):
        assert unrepeated(*pieces) == (kept, True)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  \n\n \n",
        "- The hut of 1961 is red.\n- The hut of 1961 is blue.\n- The hut of 1961\n- The hut of 1961 is",
        "It was built in 1961. It was built in 1962. It was built in 196",
        "Yes.\nNo.\nYes.\nNo.\n",
        "| ship | year |\n|------|------|\n| Aldous | 1961 |\n\n| hut | year |\n|------|------|\n| Quiet | 1962 |\n",
        "Write this:\n```python\nreturn read_files(path)\nreturn read_files(path)\n```\nand that is all.",
        "It was led by J. R. Lindqvist of Brede Inc. The hut was led by J. R. Lindgren of Brede Inc. Then",
    ],
)
def test_a_text_without_repetition_stays_as_it_is(text):
    for pieces in ((text,), tuple(text)):
        assert unrepeated(*pieces) == (text, False)


# Parts whose meaning depends on what follows: full stops, abbreviations, marks, list numbers, fences.
PARTS = (
    *("The hut is red", "the  Hut is red", "A ship came in May", "No", "Inc", "The", "Them", "x"),
    *(".", ". ", "! ", "...", "。", "\n", " ", "  ", '"', ")", "``", "`", "```\n"),
    *("[1]", " [2", "]", "1. ", "12", "- ", "* ", "J. "),
)
TEXTS = st.lists(st.sampled_from(PARTS), max_size=16).map("".join)


@tries(suite=300, long=20_000)
@given(TEXTS, st.lists(st.integers(0, 120), max_size=6))
def test_the_text_does_not_depend_on_its_pieces(text, cuts):
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    kept, stopped = unrepeated(text)
    assert text.startswith(kept)
    assert stopped or kept == text
    assert unrepeated(*(text[a:b] for a, b in pairwise(cuts))) == (kept, stopped)
    assert unrepeated(*text) == (kept, stopped)


WORDS = (
    "The hut is red",
    "the  Hut is red",
    "A ship came in May",
    "The hut",
    "Nobody stayed there",
    "It was",
)


@tries(suite=200, long=5_000)
@given(st.lists(st.tuples(st.sampled_from(WORDS), st.sampled_from([". ", "! ", "\n", ".\n\n", " and "]))))
def test_the_text_ends_before_the_first_sentence_that_it_has_twice(parts):
    text = "".join(word + end for word, end in parts)
    known, expected, start = set(), text, 0
    for line in text.splitlines(keepends=True):
        for first, last in sentences(line):
            sentence = " ".join(line[first:last].lower().split())
            if sentence in known and expected == text:
                expected = text[: start + first]
            known |= {sentence} if sum(map(str.isalnum, sentence)) >= 10 else set()
        start += len(line)
    assert unrepeated(text)[0] == expected


def test_no_text_is_held_back_longer_than_it_must():
    text = UnrepeatedText()
    assert text.push("The hut is red. The") == "The hut is red."
    assert text.push(" hut") == " "  # the rest is held back: it may become the same sentence
    assert text.push(" was") == "The hut was"
    assert text.push(" built by") == " built by"
    assert text.finish() == ""
