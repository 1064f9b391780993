"""Spans that can be answers: those that rules find, and those that recur, which a naive search finds too."""

from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from rag.train.examples import has_answer
from rag.train.spans import BLANK, MOST_WORDS, answer_spans, cloze_questions, recurring_spans

STOP = {"the", "of"}
WORDS = st.lists(st.sampled_from([*STOP, "seal", "ice", "krill", "Berg"]), max_size=14).map(" ".join)


def test_spans_are_numbers_with_units_dates_names_quotes_and_heads_of_definitions():
    text = (
        'On 12 May 1972 it cost $3.5 million. The tug Bay of Islands, called "the old lady", pulls 90 tonnes at '
        "3.4 m/s. A loom is a frame for weaving. Weather was bad. In 1972 The Tern Bank left."
    )
    assert [text[start:end] for start, end in answer_spans(text)] == [
        *(
            "12 May 1972",
            "$3.5 million",
            "Bay of Islands",
            "old lady",
            "90 tonnes",
            "3.4 m/s",
            "loom",
            "1972",
        ),
        "Tern Bank",
    ]


@given(st.text(alphabet="Aab 1.,\n\"“”$%'’-é", max_size=60))
def test_spans_are_inside_the_text_and_apart(text):
    spans = answer_spans(text)
    assert all(0 <= start < end <= len(text) for start, end in spans)
    assert all(a[1] <= b[0] for a, b in pairwise(spans))


@given(
    st.lists(st.sampled_from(["Edda", "12", "m", "of", "it", "stands.", '"'] * 2), max_size=30).map(" ".join)
)
def test_a_cloze_question_has_one_blank_and_not_the_answer(text):
    for question, answer in cloze_questions(text, answer_spans(text)):
        assert question.count(BLANK) == 1 and not has_answer(question, [answer])
        assert question.replace(BLANK, answer) in " ".join(text.split())


@given(st.lists(WORDS, max_size=4))
def test_recurring_spans_are_n_grams_that_another_text_has_and_none_is_missed(texts):
    folded = [f" {text.casefold()} " for text in texts]

    def recurs(n_gram: str) -> bool:
        words = n_gram.casefold().split()
        within = sum(f" {' '.join(words)} " in text for text in folded) > 1
        return within and len(words) <= MOST_WORDS and not {words[0], words[-1]} & STOP

    for text, found in zip(texts, recurring_spans(texts), strict=True):
        assert all(a[1] <= b[0] for a, b in pairwise(found))
        assert all(recurs(text[start:end]) for start, end in found)
        words = text.split()
        covered = {text[:at].count(" ") for start, end in found for at in range(start, end)}
        for i in range(len(words)):
            for j in range(i + 1, len(words) + 1):
                is_name = j - i > 1 or (i > 0 and words[i][0].isupper())
                assert not recurs(" ".join(words[i:j])) or not is_name or covered & set(range(i, j))


def test_a_longer_recurring_span_goes_before_a_part_of_it():
    texts = [
        "We saw the great ice shelf of Halden then.",
        "On the great ice shelf of Halden it snows.",
        "A great ice shelf.",
    ]
    found = [
        [t[start:end] for start, end in some] for t, some in zip(texts, recurring_spans(texts), strict=True)
    ]
    assert found == [["great ice shelf of Halden"], ["great ice shelf of Halden"], ["great ice shelf"]]
