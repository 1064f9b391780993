"""Measures that ir_measures names and our own table does not have: their values, and sentences for wrong names."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.evaluate.experiment import EvaluationOptions
from rag.evaluate.metrics.retrieval import evaluate
from rag.types import UserError

QRELS = {"q": {"a": 2, "b": 1, "c": 0}}
RUN = {"q": {"x": 0.9, "b": 0.8, "a": 0.7, "c": 0.6}}

names = st.integers(0, 12).map("d{}".format)
grades = st.dictionaries(names, st.integers(-1, 3), min_size=1)
scores = st.dictionaries(names, st.sampled_from([0.0, 0.25, 0.5, 1.0]))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("RBP(p=0.8)", 0.2 * (0.8 + 0.8**2)),
        ("rbp(p=0.5)@2", 0.5 * 0.5),
        ("RBP(p=0.5,rel=2)", 0.5 * 0.5**2),
        ("P(rel=2)@5", 1 / 5),
        ("R(rel=2)@2", 0.0),
        ("AP(rel=2)", 1 / 3),
        ("MRR(rel=2)@10", 1 / 3),
        ("Judged@10", 3 / 4),
        ("Bpref", 1.0),
        ("NumRet", 4.0),
    ],
)
def test_a_measure_of_ir_measures_has_its_value(name, value):
    assert evaluate(QRELS, RUN, [name])[0] == {name: pytest.approx(value)}


def test_measures_of_both_kinds_stand_side_by_side_and_a_query_without_results_counts_as_zero():
    means, per_query = evaluate({**QRELS, "empty": {"a": 1}}, RUN, ["nDCG@10", "RBP(p=0.8)@10", "infAP"])
    assert set(means) == {"nDCG@10", "RBP(p=0.8)@10", "infAP"}
    assert per_query["empty"] == {"nDCG@10": 0.0, "RBP(p=0.8)@10": 0.0, "infAP": 0.0}
    assert means["RBP(p=0.8)@10"] == pytest.approx(0.2 * (0.8 + 0.8**2) / 2)


@given(grades, scores, st.floats(0.01, 0.99), st.integers(1, 15))
@settings(max_examples=100, deadline=None)
def test_rank_biased_precision_is_its_formula(judged, found, p, cutoff):
    name = f"RBP(p={p!r})@{cutoff}"
    ranking = sorted(found, key=lambda document: (-found[document], document))[:cutoff]
    expected = (1 - p) * sum(p**i for i, document in enumerate(ranking) if judged.get(document, 0) >= 1)
    assert evaluate({"q": judged}, {"q": found}, [name])[0][name] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("nDGC@10", r"no measure \"nDGC@10\" \(did you mean nDCG\?\): choose from such as nDCG@10"),
        ("RBPP(p=0.8)", r"did you mean RBP\?"),
        ("RBP(p=2)", "choose from such as"),
        ("RBP(q=0.8)", "choose from such as"),
        ("RBP(0.8)", "choose from such as"),
        ("RBP(p=0.8", "choose from such as"),
        ("P(rel=2)", "choose from such as"),
        ("P(rel=2)@0", "choose from such as"),
        ("P(rel=0)@5", "a grade rel out of range: give one from 1"),
        ("RBP(p=0.5,rel=0)", "a grade rel out of range: give one from 1"),
        (f"P(rel={2**31})@5", "a grade rel out of range"),
        (f"nDCG@{2**31}", f"too large: give one of at most {2**31 - 1}"),
        (f"RBP(p=0.5)@{'9' * 5000}", "too large"),
        ("alpha_nDCG@20", r"No installed package computes .*: choose one of AP, AP@10, .*, nDCG@10\.$"),
        ("ERR@10", r"No installed package computes .*: choose one of AP, AP@10, .*, nDCG@10\.$"),
        (
            "nDCG(dcg='exp-log2')@10",
            r"with these parameters: choose nDCG\(dcg='log2',gains=ANY,judged_only=ANY\)@ANY\.$",
        ),
    ],
)
def test_a_wrong_name_is_one_sentence_before_anything_is_computed(name, sentence):
    with pytest.raises(UserError, match=sentence):
        EvaluationOptions(measures=[name])


def test_the_measures_that_a_sentence_offers_can_be_computed():
    with pytest.raises(UserError) as error:
        EvaluationOptions(measures=["ERR@10"])
    offered = str(error.value).split("choose one of ")[1].removesuffix(".").split(", ")
    assert set(evaluate(QRELS, RUN, offered)[0]) == set(offered)


def test_no_measures_are_no_columns_and_the_largest_cutoff_is_computed():
    assert evaluate(QRELS, RUN, []) == ({}, {"q": {}})
    largest = f"P@{2**31 - 1}"
    assert evaluate(QRELS, RUN, [largest])[0] == {largest: pytest.approx(2 / (2**31 - 1))}
