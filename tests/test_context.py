"""Contexts: relevance, merging, order, the token budget, and citations that map back to spans."""

import re
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.context import ContextOptions, build_context, trim
from rag.types import Chunk, Context, Hit, Source, UserError

TEXT = "Alpha one two. Beta three four. Gamma five six. Delta seven eight. Epsilon nine ten."
TEXTS = {
    "a": TEXT,
    "b": "Zeta eleven. Eta twelve thirteen.",
    "c": "東京は日本の首都です。人口は多い。🤖 שלום",
}


def count(text):
    return len(text.split())


def hit(document, start, end, score):
    text = TEXTS[document][start:end]
    return Hit(Chunk(f"{document}:{start}-{end}", document, f"{document}.md", start, end, text), score, 0)


def found(document, phrase, score):
    start = TEXTS[document].index(phrase)
    return hit(document, start, start + len(phrase), score)


def build(hits, documents_text=TEXTS.__getitem__, **options):
    return build_context(hits, documents_text, ContextOptions(**options), count)


def texts(context):
    return [source.text for source in context.sources]


ALPHA, BETA, GAMMA, DELTA, EPSILON = re.findall(r"\w[^.]*\.", TEXT)
APART = [
    found("a", ALPHA, 0.9),
    found("b", "Zeta eleven.", 0.8),
    found("a", GAMMA, 0.7),
    found("a", EPSILON, 0.6),
]


def test_a_source_carries_all_that_an_answer_reports():
    assert build([found("b", "Eta twelve thirteen.", 0.5)]) == Context(
        sources=(Source(1, "b.md", 13, 33, 0.5, "Eta twelve thirteen.", "b"),), tokens=3, dropped=0
    )


def test_hits_below_the_threshold_are_not_relevant_and_nothing_may_be_left():
    assert texts(build(APART, min_score=0.75)) == [ALPHA, "Zeta eleven."]
    assert texts(build(APART, min_score=0.8)) == [ALPHA, "Zeta eleven."]  # the threshold itself passes
    assert build(APART, min_score=0.95) == Context(sources=(), tokens=0, dropped=0)
    assert build([]) == Context(sources=(), tokens=0, dropped=0)
    assert texts(build([found("a", ALPHA, float("nan"))], min_score=-1.0)) == []
    assert len(build([found("a", ALPHA, -0.5)]).sources) == 1  # no threshold, no opinion


def test_repeated_texts_are_shown_once_with_the_best_score():
    twin = Chunk("x:0-14", "x", "x.md", 0, 14, ALPHA)
    context = build([found("a", ALPHA, 0.4), Hit(twin, 0.9, 0), found("a", ALPHA, 0.3)])
    assert [(s.path, s.score) for s in context.sources] == [("x.md", 0.9)] and context.dropped == 0


@pytest.mark.parametrize(
    "order, shown",
    [
        ("score", [ALPHA, "Zeta eleven.", GAMMA, EPSILON]),
        ("reverse", [EPSILON, GAMMA, "Zeta eleven.", ALPHA]),
        ("document", [ALPHA, GAMMA, EPSILON, "Zeta eleven."]),
        ("sides", [ALPHA, GAMMA, EPSILON, "Zeta eleven."]),
    ],
)
def test_orders(order, shown):
    context = build(APART[::-1], order=order)  # hits in any order: scores decide
    assert texts(context) == shown
    assert [source.n for source in context.sources] == [1, 2, 3, 4]


def test_sides_puts_the_weakest_in_the_middle():
    hits = [Hit(Chunk(f"{i}", f"{i}", "p", 0, 1, f"{i}"), 1.0 - i / 10, i) for i in range(5)]
    assert texts(build(hits, order="sides")) == ["0", "2", "4", "3", "1"]


def test_document_order_begins_with_the_document_of_the_best_passage():
    hits = [found("a", EPSILON, 0.5), found("b", "Eta twelve thirteen.", 0.9), found("a", ALPHA, 0.4)]
    assert texts(build(hits, order="document")) == ["Eta twelve thirteen.", ALPHA, EPSILON]


def test_ties_keep_the_order_of_the_hits():
    hits = [found("a", EPSILON, 0.5), found("b", "Zeta eleven.", 0.5), found("a", ALPHA, 0.5)]
    assert texts(build(hits)) == [EPSILON, "Zeta eleven.", ALPHA]


# --- merging ------------------------------------------------------------------------------------------------


def test_overlapping_neighbours_become_one_passage_of_the_document():
    hits = [hit("a", 15, 47, 0.5), hit("a", 0, 31, 0.9), hit("a", 48, 66, 0.1)]
    context = build(hits)
    assert [(s.start, s.end, s.score, s.text) for s in context.sources] == [(0, 66, 0.9, TEXT[:66])]


def test_without_the_document_only_what_overlaps_or_touches_is_stitched():
    hits = [hit("a", 0, 20, 0.9), hit("a", 10, 31, 0.8), hit("a", 31, 47, 0.7), hit("a", 48, 66, 0.6)]
    context = build(hits, documents_text=None)
    assert [(s.start, s.end) for s in context.sources] == [(0, 47), (48, 66)]
    assert all(s.text == TEXT[s.start : s.end] for s in context.sources)


def test_a_chunk_inside_another_gives_it_its_score():
    context = build([hit("a", 0, 47, 0.5), hit("a", 15, 31, 0.9), found("b", "Zeta eleven.", 0.7)])
    assert [(s.path, s.start, s.end, s.score) for s in context.sources] == [
        ("a.md", 0, 47, 0.9),
        ("b.md", 0, 12, 0.7),
    ]


def test_passages_with_other_text_between_them_or_of_other_documents_are_not_merged():
    assert len(build([found("a", ALPHA, 0.9), found("a", GAMMA, 0.8)]).sources) == 2
    assert len(build([hit("a", 0, 33, 0.9), hit("b", 0, 33, 0.8)]).sources) == 2


def test_merging_can_be_turned_off():
    hits = [hit("a", 0, 31, 0.9), hit("a", 15, 47, 0.8)]
    assert texts(build(hits, merge=False)) == [TEXT[0:31], TEXT[15:47]]


# --- the budget ---------------------------------------------------------------------------------------------


def test_a_passage_that_does_not_fit_is_dropped_and_shorter_ones_are_still_taken():
    context = build(
        [found("a", ALPHA, 0.9), hit("a", 32, 84, 0.8), found("b", "Zeta eleven.", 0.7)], max_tokens=5
    )
    assert texts(context) == [ALPHA, "Zeta eleven."]
    assert (context.tokens, context.dropped) == (5, 1)


def test_merged_passages_count_their_overlap_once():
    hits = [hit("a", 0, 47, 0.9), hit("a", 15, 66, 0.8)]  # 9 words each, 12 together
    assert build(hits, max_tokens=12).tokens == 12
    assert build(hits, max_tokens=11) == Context(build(hits[:1]).sources, tokens=9, dropped=1)


@pytest.mark.parametrize(
    "budget, shown",
    [
        (15, TEXT),
        (10, "Alpha one two. Beta three four. Gamma five six."),  # the end of a sentence
        (5, "Alpha one two."),
        (2, "Alpha one"),  # no sentence fits: the end of a word
    ],
)
def test_a_best_passage_that_is_too_long_is_cut(budget, shown):
    context = build([hit("a", 0, len(TEXT), 0.9)], max_tokens=budget)
    assert texts(context) == [shown]
    assert (context.sources[0].start, context.sources[0].end) == (0, len(shown))
    assert context.tokens == count(shown) <= budget
    assert context.dropped == (shown != TEXT)


def test_a_short_first_sentence_is_no_reason_to_lose_most_of_the_passage():
    text = "Yes. One two three four five six seven eight nine ten."
    context = build(
        [Hit(Chunk("d", "d", "d", 0, len(text), text), 1.0, 0)], max_tokens=8, documents_text=None
    )
    assert texts(context) == ["Yes. One two three four five six seven"]


def test_text_without_spaces_is_cut_between_characters():
    options, text = ContextOptions(max_tokens=7), "東京は日本の首都です人口は多い"
    hits = [Hit(Chunk("d", "d", "d", 0, len(text), text), 1.0, 0)]
    assert texts(build_context(hits, None, options, len)) == [text[:7]]
    assert build_context(hits, None, ContextOptions(max_tokens=1), lambda text: 2 * len(text)).sources == ()


def test_the_budget_counts_passages_as_they_are_rendered():
    def render(source):
        return f"[{source.n}] from {source.path} : {source.text}"  # four words more

    context = build_context(APART, TEXTS.__getitem__, ContextOptions(max_tokens=13), count, render)
    assert texts(context) == [ALPHA, "Zeta eleven."]
    assert context.tokens == sum(count(render(source)) for source in context.sources) == 13
    assert context.dropped == 2


def test_each_text_is_counted_once():
    calls = []

    def counting(text):
        calls.append(text)
        return count(text)

    hits = [Hit(Chunk(f"{i}", f"{i}", "p", 0, 3, f"w{i}"), 1.0 - i / 100, i) for i in range(50)]
    build_context(hits, None, ContextOptions(), counting)
    assert len(calls) <= 100


@pytest.mark.parametrize("options", [{"max_tokens": 0}, {"max_tokens": -3}])
def test_an_impossible_budget_is_an_error(options):
    with pytest.raises(UserError, match=r"max_tokens=(0|-3) .* a whole number from 1"):
        ContextOptions(**options)


SPANS = st.tuples(st.sampled_from("abc"), st.integers(0, 90), st.integers(1, 40), st.integers(-4, 4))


@given(
    st.lists(SPANS, max_size=12),
    st.integers(1, 20),
    st.sampled_from(["score", "reverse", "document", "sides"]),
    st.booleans(),
    st.booleans(),
    st.sampled_from(["none", "neighbours", "section", "parent"]),
    st.integers(1, 12),
)
def test_every_context_fits_and_cites_its_documents(
    spans, budget, order, merge, with_documents, expand, most
):
    hits = []
    for document, start, length, score in spans:
        start = min(start, len(TEXTS[document]) - 1)
        hits.append(hit(document, start, min(len(TEXTS[document]), start + length), score / 4))
    expand = expand if with_documents else "none"
    options = ContextOptions(budget, order, 0.0, merge, expand, expand_by=1, expand_tokens=most)
    context = build_context(hits, TEXTS.__getitem__ if with_documents else None, options, count)
    assert context.tokens == sum(count(text) for text in texts(context)) <= budget
    assert [source.n for source in context.sources] == list(range(1, len(context.sources) + 1))
    for source in context.sources:
        assert source.text == TEXTS[source.path[0]][source.start : source.end] != ""
        assert source.score >= 0.0
    assert context.dropped <= len(hits)
    scores = [source.score for source in context.sources]
    if order in ("score", "reverse"):
        assert scores == sorted(scores, reverse=order == "score")
    if merge:
        for left, right in pairwise(sorted(context.sources, key=lambda s: (s.path, s.start))):
            assert left.path != right.path or left.end < right.start


# --- trimming -----------------------------------------------------------------------------------------------


def context_of(*scored):
    sources = tuple(Source(n, "p", 0, len(text), score, text) for n, (text, score) in enumerate(scored, 1))
    return Context(sources, sum(count(text) for text, _ in scored), dropped=1)


def test_trimming_leaves_out_the_least_relevant_and_renumbers_the_rest():
    context = context_of(("a a a", 0.5), ("b b b", 0.2), ("c c c", 0.9))
    assert trim(context, 9, count) == context
    trimmed = trim(context, 8, count)
    assert [(s.n, s.text) for s in trimmed.sources] == [(1, "a a a"), (2, "c c c")]
    assert (trimmed.tokens, trimmed.dropped) == (6, 2)
    assert texts(trim(context, 5, count)) == ["c c c"]


def test_trimming_cuts_the_last_passage_and_may_leave_nothing():
    context = context_of(("a a a", 0.5), ("b b b", 0.2))
    assert trim(context, 2, count) == Context((Source(1, "p", 0, 3, 0.5, "a a"),), tokens=2, dropped=3)
    assert trim(context, 0, count) == Context((), tokens=0, dropped=3)
    assert trim(context, -5, count) == Context((), tokens=0, dropped=3)
    assert trim(Context((), 0), 0, count) == Context((), 0)


def test_trimming_takes_the_later_of_two_equals():
    assert texts(trim(context_of(("a a", 0.5), ("b b", 0.5)), 3, count)) == ["a a"]


@given(
    st.lists(st.tuples(st.text("ab. ", min_size=1, max_size=30), st.floats(-1, 1)), max_size=6),
    st.integers(-2, 20),
)
def test_trimming_fits_whatever_the_counter_does(scored, budget):
    def odd(text):  # not monotone: a longer text can have fewer tokens
        return len(text) // 3 + (len(text) % 3) * 2

    context = context_of(*scored)
    trimmed = trim(context, budget, odd)
    assert trimmed.tokens == sum(odd(text) for text in texts(trimmed)) <= max(budget, 0)
    assert trimmed.dropped - context.dropped >= len(context.sources) - len(trimmed.sources)
