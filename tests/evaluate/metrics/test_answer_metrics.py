"""Metrics of answers, worked by hand; SQuAD's own script, written out, as the oracle of EM and F1."""

import re
import string
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.evaluate.metrics import ANSWER_METRICS, lower_is_better, measure_answer
from rag.evaluate.metrics.answers import JudgedAnswer, contains, exact_match, f1, normalized, rouge_l
from rag.types import UserError


def measured(answer="", **judged):
    return measure_answer(JudgedAnswer(answer, **judged))


def squad_tokens(text: str) -> list[str]:
    """evaluate-v1.1.py's normalize_answer, step by step."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return re.sub(r"\b(a|an|the)\b", " ", text).split()


def squad_f1(answer: str, gold: str) -> float:
    prediction, truth = squad_tokens(answer), squad_tokens(gold)
    same = sum((Counter(prediction) & Counter(truth)).values())
    if same == 0:
        return 0.0
    precision, recall = same / len(prediction), same / len(truth)
    return 2 * precision * recall / (precision + recall)


texts = st.lists(
    st.sampled_from(["The", "a", "cat", "Cat!", "sat,", "...", "été", "U.S.", "don't", "ans"])
).map(" ".join)


@given(texts, texts)
def test_exact_match_and_f1_are_squads(answer, gold):
    assert normalized(answer).split() == squad_tokens(answer)
    assert exact_match(answer, gold) == float(squad_tokens(answer) == squad_tokens(gold))
    both_empty = not squad_tokens(answer) and not squad_tokens(gold)
    assert f1(answer, gold) == pytest.approx(1.0 if both_empty else squad_f1(answer, gold))


@pytest.mark.parametrize(
    ("answer", "gold", "em", "overlap", "inside"),
    [
        ("The Eiffel Tower!", "eiffel tower", 1.0, 1.0, 1.0),
        ("It is in Paris, France.", "Paris", 0.0, 2 / 6, 1.0),  # one word of it, is, in, paris, france
        ("a party", "art", 0.0, 0.0, 0.0),
        ("art of the deal", "art deal", 0.0, 4 / 5, 0.0),  # the article is gone, "of" stands between
        ("cat cat dog", "cat cat cat", 0.0, 2 / 3, 0.0),
        ("U.S. 1,000 $5", "us 1000 5", 1.0, 1.0, 1.0),
        ("don't", "do nt", 0.0, 0.0, 0.0),
        ("Zürich, été", "ZÜRICH ÉTÉ", 1.0, 1.0, 1.0),
        ("東京 です", "東京", 0.0, 2 / 3, 1.0),
        ("“Paris”", "Paris", 0.0, 0.0, 0.0),  # only ASCII punctuation goes, as in SQuAD's script
        ("", "Paris", 0.0, 0.0, 0.0),
        ("Paris", "The", 0.0, 0.0, 0.0),  # a gold answer that normalises to nothing
        ("...", "The", 1.0, 1.0, 0.0),
    ],
)
def test_texts_compared_by_hand(answer, gold, em, overlap, inside):
    assert exact_match(answer, gold) == em
    assert f1(answer, gold) == pytest.approx(overlap)
    assert contains(answer, gold) == inside


@pytest.mark.parametrize(
    ("answer", "gold", "expected"),
    [
        ("police killed the gunman", "police kill the gunman", 3 / 4),  # Lin 2004's example: 3 of 4 words
        ("the gunman kill police", "police kill the gunman", 2 / 4),
        ("Paris.", "paris", 1.0),
        ("über die Straße", "die straße", 2 * 1 * (2 / 3) / (1 + 2 / 3)),
        ("", "paris", 0.0),
        ("?!", "?!", 0.0),  # no words, nothing in common
    ],
)
def test_rouge_l_by_hand(answer, gold, expected):
    assert rouge_l(answer, gold) == pytest.approx(expected)


def test_every_measure_is_named_and_the_best_gold_answer_counts_for_each():
    scores = measured("Paris, France", gold=["in Paris", "Paris France", "Lyon"])
    assert tuple(scores) == ANSWER_METRICS
    assert (scores["EM"], scores["F1"], scores["contains"], scores["ROUGE-L"]) == (1.0, 1.0, 1.0, 1.0)
    scores = measured("in the city of Paris", gold=["Paris", "city hall of Lyon"])
    assert scores["EM"] == 0.0
    assert scores["F1"] == pytest.approx(2 * 2 / (4 + 4))  # city, of
    assert scores["contains"] == 1.0  # Paris


def test_citation_marks_are_no_words_of_the_answer():
    scores = measured("Paris [1][2, 3].", gold=["Paris"])
    assert (scores["EM"], scores["F1"], scores["ROUGE-L"]) == (1.0, 1.0, 1.0)
    assert measured("in [a] 1889", gold=["1889"])["F1"] == pytest.approx(2 / 3)  # [a] is none


def test_without_gold_answers_the_text_is_not_measured():
    scores = measured("Paris", gold=[])
    assert [scores[name] for name in ("EM", "F1", "contains", "ROUGE-L")] == [None] * 4


@pytest.mark.parametrize(
    ("cited", "relevant", "precision", "recall"),
    [
        (["a", "b"], ["a", "c", "d"], 1 / 2, 1 / 3),
        (["a", "a"], ["a"], 1.0, 1.0),  # a document cited twice is one
        (["b"], ["a"], 0.0, 0.0),
        ([], ["a"], None, 0.0),
        (["a"], [], 0.0, None),
        ([], [], None, None),
    ],
)
def test_citations_by_hand(cited, relevant, precision, recall):
    scores = measured("x", gold=["x"], cited=cited, relevant=relevant)
    assert (scores["citation precision"], scores["citation recall"]) == (precision, recall)


@pytest.mark.parametrize("abstained", [True, False])
@pytest.mark.parametrize("answerable", [True, False])
def test_each_rate_of_abstention_is_about_its_own_kind_of_question(abstained, answerable):
    gold = ["documents"] if answerable else []
    scores = measured("The documents do not say.", gold=gold, abstained=abstained, answerable=answerable)
    assert tuple(scores) == ANSWER_METRICS
    assert scores["abstention recall"] == (None if answerable else float(abstained))
    assert scores["false abstention"] == (float(abstained) if answerable else None)
    if answerable:  # an abstention has no words, though its sentence has
        assert scores["contains"] == float(not abstained)
        assert (scores["F1"] == 0.0) == abstained


def test_only_false_abstention_is_better_when_lower():
    lower = [name for name in ANSWER_METRICS if lower_is_better(name)]
    assert lower == ["false abstention"]
    assert lower_is_better("retrieved/false abstention")
    assert not lower_is_better("retrieved/abstention recall") and not lower_is_better("nDCG@10")


def test_gold_answers_of_an_unanswerable_question_are_refused():
    with pytest.raises(UserError, match="gold answer 'Paris'"):
        measured("Paris", gold=["Paris"], answerable=False)
