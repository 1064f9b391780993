"""Measures over evidence spans against sets of characters and of tokens."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.metrics.spans import (
    DEFAULT_SPAN_MEASURES,
    DocumentTokens,
    is_span_measure,
    span_measures,
)
from rag.types import Chunk, Document, Hit, UserError

TEXTS = {
    "a": "The tide turns twice a day here. 🌊 Ice floats since it is lighter than water. No wind.",
    "b": "東京は首都。 e\u0301tude and more of it, again and again and once more",
}
DOCUMENTS = [Document(id, f"{id}.md", text) for id, text in TEXTS.items()]
NAMES = [
    f"{unit}{measure}@{depth}"
    for unit in ("Char", "Token")
    for measure in ("Recall", "Precision", "IoU")
    for depth in ("1", "3", "10", "1t", "7t", "30t")
]


def words(text):
    return np.array([m.span() for m in re.finditer(r"\w+|[^\w\s]", text)], np.int64).reshape(-1, 2)


def hit(document, start, end):
    return Hit(Chunk(f"{start}-{end}", document, "p", start, end, TEXTS[document][start:end]), 0.5, 0)


def tokens():
    return DocumentTokens(DOCUMENTS, words)


def measured(hits, evidence, *names):
    return list(span_measures(hits, evidence, tokens(), names).values())


# --- the oracle: every character and token one by one


def tokens_of(document, start, end):
    return [
        (document, i) for i, (a, b) in enumerate(words(TEXTS[document]).tolist()) if a < end and b > start
    ]


def characters_of(document, start, end):
    return [(document, i) for i in range(start, end)]


def cut_to(ranked, budget):
    """Character by character, as long as the tokens touched stay within the budget."""
    taken = []
    for document, start, end in ranked:
        longest = max(e for e in range(start, end + 1) if len(tokens_of(document, start, e)) <= budget)
        taken.append((document, start, longest))
        budget -= len(tokens_of(document, start, end))
        if budget <= 0:
            break
    return taken


def expected(ranked, evidence, name):
    unit, measure, depth, budget = re.fullmatch(r"(Char|Token)(\w+)@(\d+)(t?)", name).groups()
    taken = cut_to(ranked, int(depth)) if budget else ranked[: int(depth)]
    units = characters_of if unit == "Char" else tokens_of
    retrieved = [place for span in taken for place in units(*span)]
    relevant = {place for span in evidence for place in units(*span)}
    both = len(relevant & set(retrieved))
    whole = {
        "Recall": len(relevant),
        "Precision": len(retrieved),
        "IoU": len(retrieved) + len(relevant - set(retrieved)),
    }[measure]
    return both / whole if whole else 0.0


@st.composite
def spans(draw):
    document = draw(st.sampled_from("ab"))
    start = draw(st.integers(0, len(TEXTS[document]) - 1))
    return document, start, draw(st.integers(start + 1, min(start + 30, len(TEXTS[document]))))


@given(st.lists(spans(), max_size=8), st.lists(spans(), min_size=1, max_size=5))
def test_measures_equal_counting_every_character_and_token(ranked, evidence):
    hits = [hit(*span) for span in ranked]
    values = span_measures(hits, [Evidence(*span) for span in evidence], tokens(), NAMES)
    assert list(values) == NAMES
    for name in NAMES:
        assert values[name] == pytest.approx(expected(ranked, evidence, name), abs=1e-12), name


# --- by hand


def test_overlapping_chunks_count_twice_in_what_was_retrieved_and_once_in_what_was_found():
    evidence = [Evidence("a", 10, 20)]
    hits = [hit("a", 0, 20), hit("a", 10, 30), hit("b", 0, 10)]
    recall, precision, iou = measured(hits, evidence, "CharRecall@3", "CharPrecision@3", "CharIoU@3")
    assert (recall, precision, iou) == (1.0, 10 / 50, 10 / 50)
    half = measured([hit("a", 15, 25)], evidence, "CharRecall@1", "CharPrecision@1", "CharIoU@1")
    assert half == [5 / 10, 5 / 10, 5 / 15]


def test_a_budget_cuts_the_last_chunk_at_a_token():
    evidence = [Evidence("a", 0, 14)]  # The tide turns
    hits = [hit("a", 21, 31), hit("a", 0, 20)]  # "a day here", 3 tokens; "The tide turns twice", 4
    names = ("TokenRecall@5t", "TokenPrecision@5t", "TokenIoU@5t", "CharRecall@5t")
    assert measured(hits, evidence, *names) == [2 / 3, 2 / 5, 2 / 6, pytest.approx(9 / 14)]  # "The tide "
    assert measured(hits, evidence, "TokenRecall@3t", "TokenRecall@7t") == [0.0, 1.0]


def test_nothing_retrieved_finds_nothing():
    assert set(span_measures([], [Evidence("a", 0, 5)], tokens(), NAMES).values()) == {0.0}


def test_a_query_without_evidence_has_no_measure():
    with pytest.raises(ValueError, match="without any"):
        span_measures([hit("a", 0, 5)], [], tokens())


def test_names():
    assert all(is_span_measure(name) for name in (*NAMES, *DEFAULT_SPAN_MEASURES, "tokeniou@512T"))
    for name in ("Recall@5", "TokenRecall", "TokenRecall@0", "TokenF1@5", "CharRecall@5s", "TokenRecall@5t5"):
        assert not is_span_measure(name)
        with pytest.raises(UserError, match=f'no measure "{name}": choose from such as CharRecall@5'):
            measured([hit("a", 0, 5)], [Evidence("a", 0, 5)], name)
    values = span_measures([hit("a", 0, 5)], [Evidence("a", 0, 5)], tokens())
    assert values == dict.fromkeys(DEFAULT_SPAN_MEASURES, 1.0)


def test_documents_are_tokenised_once_and_only_if_asked_about():
    calls = []

    def counting(text):
        calls.append(text)
        return words(text)

    lazy = DocumentTokens(DOCUMENTS, counting)
    for _ in range(3):
        span_measures([hit("a", 0, 5)], [Evidence("a", 0, 5)], lazy, NAMES)
    assert calls == [TEXTS["a"]]
    span_measures([hit("b", 0, 5)], [Evidence("b", 0, 5)], DocumentTokens(DOCUMENTS, counting), ["CharIoU@1"])
    assert calls == [TEXTS["a"]]


def test_text_without_tokens_and_tokens_out_of_order():
    empty = DocumentTokens([Document("e", "e", "   ")], words)
    assert empty.touching("e", (0, 3)) == (0, 0) and empty.cut("e", (0, 3), 1) == (0, 3)
    backwards = DocumentTokens([Document("e", "e", "ab cd")], lambda _: np.array([[0, 2], [0, 0], [3, 5]]))
    assert backwards.touching("e", (0, 5)) == (0, 3)
    assert backwards.cut("e", (0, 5), 2) == (0, 3)


def test_many_spans_are_swept_in_one_pass():
    text = "ab " * 20_000
    document = Document("a", "a", text)
    hits = [Hit(Chunk("", "a", "a", i, i + 6, text[i : i + 6]), 1.0, i) for i in range(0, len(text) - 3, 3)]
    evidence = [Evidence("a", i, i + 1) for i in range(0, len(text), 2)]  # quadratic would not come back
    values = span_measures(
        hits, evidence, DocumentTokens([document], words), ["CharRecall@99999", "TokenIoU@9t"]
    )
    assert values["CharRecall@99999"] == 1.0
