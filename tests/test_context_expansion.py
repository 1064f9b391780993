"""Contexts whose hits are widened: to neighbouring sentences, to their section or to their document."""

import pytest

from rag.context import ContextOptions, build_context
from rag.types import Chunk, Hit, UserError
from tests.test_context import ALPHA, BETA, DELTA, GAMMA, TEXTS, build, count, found, texts

NUMBERED = " ".join(f"Sentence number {word}." for word in "one two three four five six seven eight".split())
HANDBOOK = (
    "# Top\n\nIntro here. More intro.\n\n## Boats\n\nUse oars. Row well. Come back.\n\n## Ice\n\nIt is cold."
)
LONG = {"n": NUMBERED, "h": HANDBOOK}


def widened(document, phrase, budget=1000, counter=count, **options):
    start = LONG[document].index(phrase)
    chunk = Chunk("c", document, f"{document}.md", start, start + len(phrase), phrase)
    context = build_context(
        [Hit(chunk, 0.5, 0)], LONG.__getitem__, ContextOptions(max_tokens=budget, **options), counter
    )
    for source in context.sources:
        assert source.text == LONG[document][source.start : source.end]
    return texts(context)


def numbers(first, last):
    words = "one two three four five six seven eight".split()
    return [" ".join(f"Sentence number {word}." for word in words[first - 1 : last])]


def test_neighbours_are_sentences_on_both_sides():
    assert widened("n", "Sentence number four.", expand="neighbours", expand_by=1) == numbers(3, 5)
    assert widened("n", "Sentence number four.", expand="neighbours", expand_by=2) == numbers(2, 6)
    assert widened("n", "Sentence number one.", expand="neighbours", expand_by=2) == numbers(1, 3)
    assert widened("n", "Sentence number eight.", expand="neighbours", expand_by=99) == numbers(1, 8)
    assert widened("n", "Sentence number four.", expand="none") == numbers(4, 4)


def test_a_sentence_that_the_chunk_cuts_is_its_first_neighbour():
    assert widened("n", "number four. Sentence", expand="neighbours", expand_by=1) == numbers(4, 5)
    assert widened("n", "number four. Sentence", expand="neighbours", expand_by=2) == numbers(3, 6)


def test_a_section_ends_at_its_headings_and_the_parent_with_its_document():
    assert widened("h", "Row well.", expand="section") == ["## Boats\n\nUse oars. Row well. Come back."]
    assert widened("h", "Row well. Come back.\n\n## Ice", expand="section") == [
        HANDBOOK[HANDBOOK.index("## Boats") :]
    ]
    assert widened("h", "More intro.", expand="section") == ["# Top\n\nIntro here. More intro."]
    assert widened("h", "Row well.", expand="parent") == [HANDBOOK]
    assert widened("n", "number four", expand="section") == [NUMBERED]  # no heading: the document


@pytest.mark.parametrize(
    ("tokens", "first", "last"), [(3, 4, 4), (8, 4, 4), (9, 3, 5), (15, 2, 6), (18, 2, 6), (24, 1, 8)]
)
@pytest.mark.parametrize("limit", ["expand_tokens", "budget"])
def test_a_parent_is_cut_around_the_hit(tokens, first, last, limit):
    found = widened("n", "Sentence number four.", expand="parent", **{limit: tokens})
    assert found == numbers(first, last)


def test_one_side_grows_when_the_other_is_at_its_end():
    assert widened("n", "Sentence number two.", expand="parent", expand_tokens=15) == numbers(1, 5)


def test_widened_passages_that_overlap_become_one():
    hits = []
    for word, score in (("six", 0.9), ("three", 0.8)):
        phrase = f"Sentence number {word}."
        start = NUMBERED.index(phrase)
        hits.append(Hit(Chunk(word, "n", "n.md", start, start + len(phrase), phrase), score, 0))
    options = ContextOptions(expand="neighbours", expand_by=2)
    [source] = build_context(hits, LONG.__getitem__, options, count).sources
    assert (source.text, source.score) == (numbers(1, 8)[0], 0.9)
    parents = ContextOptions(expand="parent", merge=False)
    assert len(build_context(hits, LONG.__getitem__, parents, count).sources) == 1  # the same document twice


def test_the_hit_itself_is_shown_where_the_wide_passage_does_not_fit():
    hits = [found("a", GAMMA, 0.9), found("b", "Eta twelve thirteen.", 0.8)]
    context = build(hits, max_tokens=12, expand="parent", expand_tokens=9)
    assert texts(context) == [f"{BETA} {GAMMA} {DELTA}", "Eta twelve thirteen."]
    assert context.dropped == 0


def test_the_rendered_text_counts_for_a_widened_passage():
    def render(source):
        return "five words come before it " + source.text

    options = ContextOptions(expand="parent", expand_tokens=14)
    [source] = build_context([found("a", GAMMA, 0.9)], TEXTS.__getitem__, options, count, render).sources
    assert source.text == f"{BETA} {GAMMA} {DELTA}"


def test_a_long_document_is_read_only_near_the_hit():
    text = "word. " * 50_000 + "The hit. " + "Next one. " * 50_000
    start = text.index("The hit.")
    seen = []

    def counting(text):
        seen.append(len(text))
        return count(text)

    hits = [Hit(Chunk("c", "d", "d", start, start + 8, "The hit."), 1.0, 0)]
    options = ContextOptions(expand="parent", expand_tokens=20)
    [source] = build_context(hits, lambda _: text, options, counting).sources
    assert "The hit." in source.text and 10 <= count(source.text) <= 20
    assert max(seen) < 2000
    lump = "x" * 10_000 + " hit " + "y" * 10_000  # nowhere a sentence ends
    hits = [Hit(Chunk("c", "d", "d", 10_001, 10_004, "hit"), 1.0, 0)]
    assert texts(build_context(hits, lambda _: lump, options, count)) == ["hit"]


def test_expanding_needs_documents_and_sizes_above_0():
    with pytest.raises(ValueError, match="needs the documents' text"):
        build([found("a", ALPHA, 1.0)], documents_text=None, expand="parent")
    for name in ("expand_by", "expand_tokens"):
        with pytest.raises(UserError, match=f"{name}=0 .* a whole number from 1"):
            ContextOptions(**{name: 0})
