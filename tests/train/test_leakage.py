"""Leakage between datasets equals a naive count, and what is above the limit is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.evaluate.datasets import Dataset
from rag.retrieve.transform.parse import normal
from rag.train.leakage import N_GRAM, check_leakage, measure_leakage
from rag.types import Document, UserError
from tests.evaluate.tiny_experiment import dataset

# Few words, so that texts of about 13 words share n-grams; lengths straddle the 13.
TEXTS = st.lists(st.sampled_from(["a", "B", "b,", "«a»"]), max_size=20).map(" ".join)
PAIRS = st.lists(st.tuples(TEXTS, TEXTS), min_size=1, max_size=5)
LONG = "one two three four five six seven eight nine ten eleven twelve thirteen"


def texts(*pairs: tuple[str, str], prefix: str = "q") -> Dataset:
    """Return a dataset of questions, each with its own passage."""
    names = [f"{prefix}{i}" for i in range(len(pairs))]
    return dataset(
        corpus=tuple(Document(name, name, passage) for name, (_, passage) in zip(names, pairs, strict=True)),
        queries={name: question for name, (question, _) in zip(names, pairs, strict=True)},
        qrels={name: {name: 1} for name in names},
        answers={},
        unjudged={},
        unanswerable=frozenset(),
    )


def n_grams(text: str) -> set[tuple[str, ...]]:
    words = normal(text).split()
    return {tuple(words[i : i + N_GRAM]) for i in range(len(words) - N_GRAM + 1)}


@given(PAIRS, PAIRS)
def test_leakage_equals_a_naive_count(training, evaluation):
    report = measure_leakage([texts(*training)], [texts(*evaluation)])
    known = set().union(*(n_grams(text) for pair in training for text in pair))
    assert report.ids.count == min(len(training), len(evaluation)) and report.ids.total == len(evaluation)
    questions = {normal(question) for question, _ in training}
    assert report.questions.count == sum(normal(question) in questions for question, _ in evaluation)
    pairs = {(normal(question), normal(passage)) for question, passage in training}
    assert report.pairs.count == sum((normal(q), normal(p)) in pairs for q, p in evaluation)
    assert report.question_n_grams.count == sum(bool(n_grams(q) & known) for q, _ in evaluation)
    shared = [f"q{i}" for i, (_, p) in enumerate(evaluation) if n_grams(p) & known]
    assert report.passage_n_grams.count == len(shared) and report.passage_n_grams.total == len(evaluation)
    assert report.passage_n_grams.examples == tuple(shared[:5])


def test_thirteen_words_in_a_row_are_shared_and_twelve_are_not():
    training = texts(("Who?", f"Before. {LONG.upper()}, after."))
    assert measure_leakage([training], [texts(("What?", f"It is {LONG}."))]).passage_n_grams.share == 1
    shorter = LONG.replace("seven ", "")
    assert measure_leakage([training], [texts(("What?", f"It is {shorter}."))]).passage_n_grams.share == 0
    across = measure_leakage([texts(("Who?", LONG[:30]), ("Who?", LONG[30:]))], [texts(("What?", LONG))])
    assert across.passage_n_grams.count == 0


def test_a_share_up_to_the_limit_passes():
    training = texts(("Who?", LONG))
    evaluation = texts(
        ("What?", LONG), *((f"What {i}?", f"Another text {i}.") for i in range(49)), prefix="e"
    )
    report = measure_leakage([training], [evaluation])
    assert report.as_json()["passage_n_grams"] == {
        "count": 1,
        "total": 50,
        "examples": ("e0",),
        "share": 0.02,
    }
    assert "passage n grams 1 of 50" in str(report)
    check_leakage(report)
    with pytest.raises(UserError, match=r"1 of 50 passages .*\(2\.0%\).*'e0'.*1\.9%"):
        check_leakage(report, 0.019)


def test_an_equal_question_on_an_equal_passage_is_refused_at_any_limit():
    training, evaluation = texts(("Who sleeps?", "A seal.")), texts(("who sleeps", "a SEAL"), prefix="e")
    with pytest.raises(UserError, match=r"1 of 1 questions .*'e0'"):
        check_leakage(measure_leakage([training], [evaluation]), 1.0)
    other = texts(("Who sleeps?", "A gull."), prefix="e")
    report = measure_leakage([training], [other])
    assert report.questions.count == 1
    check_leakage(report)


def test_a_title_before_the_passage_does_not_hide_it():
    evaluation = dataset(
        corpus=(Document("d", "d", "Seals A seal sleeps.", "Seals"),),
        queries={"e": "Who sleeps?"},
        qrels={"e": {"d": 1}},
    )
    assert measure_leakage([texts(("Who sleeps?", "A seal sleeps."))], [evaluation]).pairs.count == 1
