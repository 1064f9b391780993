"""A metric of the user's own: beside the others in an evaluation's results, checked, and its code in their key."""

import json
from dataclasses import dataclass, replace
from fractions import Fraction
from typing import ClassVar

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.ablation import ContextAblation
from rag.evaluate.datasets.sample import load_sample
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.metrics.own import check_own, own_answer_row, own_ranking_rows
from rag.evaluate.statistics import Statistics
from rag.retrieve.search import Lexical
from rag.types import Usage, UserError


@dataclass(frozen=True)
class FirstIsRelevant:
    """Whether the first of `depth` documents is relevant: Success@depth."""

    name: ClassVar[str] = "first"
    depth: int = 1

    def of_ranking(self, documents, grades):
        return float(any(grades.get(name, 0) > 0 for name in documents[: self.depth]))


@dataclass(frozen=True)
class Words:
    """The number of words of an answer; not defined for one that abstains."""

    name: ClassVar[str] = "words"

    def of_answer(self, answer):
        return None if answer.abstained else len(answer.text.split())


class Parrot:
    """A generator that answers with the last two words of its prompt."""

    context_length = 10_000
    fingerprint = "parrot"

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def stream(self, request):
        yield from self.generate([request])
        yield Usage(1, 2, 0.0, 0.0)

    def generate(self, requests):
        return [" ".join(request.messages[-1].content.split()[-2:]) for request in requests]


@pytest.fixture
def experiment(tmp_path, monkeypatch) -> Experiment:
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    return Experiment(
        load_sample(limit=10),
        BagOfWords(),
        method=Lexical(),
        evaluation=EvaluationOptions(measures=("Success@1", "Success@3"), probes=1),
        statistics=Statistics(resamples=100),
    )


def results(experiment: Experiment) -> dict:
    return json.loads((experiment.run() / "metrics.json").read_text())


def test_a_metric_of_rankings_stands_beside_the_others_with_its_interval(experiment):
    for depth in (1, 3):
        found = results(replace(experiment, metric=FirstIsRelevant(depth)))
        assert found["means"]["first"] == found["means"][f"Success@{depth}"]
        assert found["intervals"]["first"] == found["intervals"][f"Success@{depth}"]
    assert "first" not in results(experiment)["means"]


def test_a_metric_of_answers_is_computed_for_each_condition(experiment):
    ablation = ContextAblation(conditions=("retrieved", "closed_book"), likelihood=())
    means = results(replace(experiment, metric=Words(), ablation=ablation, generator=Parrot))["means"]
    assert means["retrieved/words"] == means["closed_book/words"] == 2.0


def test_where_a_metric_is_not_defined_it_is_none():
    assert own_answer_row(Words(), JudgedAnswer("a b", abstained=True)) == {"words": None}
    assert own_answer_row(FirstIsRelevant(), JudgedAnswer("a b")) == {}
    assert own_ranking_rows(Words(), {"q": {"a": 1}}, {}) == {}
    assert own_ranking_rows(FirstIsRelevant(), {"q": {"a": 1}}, {}) == {"q": {"first": 0.0}}


def test_a_ranking_is_given_best_first_with_the_lower_id_first_among_equal_scores():
    @dataclass(frozen=True)
    class Seen(FirstIsRelevant):
        def of_ranking(self, documents, grades):
            seen.append((documents, grades))
            return 0.0

    seen = []
    own_ranking_rows(Seen(), {"q": {"b": 2}}, {"q": {"b": 0.5, "c": 0.75, "a": 0.5}})
    assert seen == [(["c", "a", "b"], {"b": 2})]


@dataclass(frozen=True)
class Named:
    name: object = "mine"
    value: object = "high"

    def of_ranking(self, documents, grades):
        return self.value


TAKEN = ("nDCG@10", "recall@5", "RR", "RBP(p=0.8)@10", "CharRecall@5", "tokeniou@512t", "rouge-l")


@dataclass(frozen=True)
class Empty:
    name: ClassVar[str] = "empty"


@pytest.mark.parametrize(
    ("metric", "sentence"),
    [
        (Named(""), "give it a name"),
        (Named(None), "give it a name"),
        (Named("ndcg"), "give it a name that no other metric has"),
        (Named("means"), "give it a name"),
        (Named("query"), "give it a name"),
        (Named("two\nlines"), "give it a name"),
        *((Named(name), "give it a name that no other metric has") for name in TAKEN),
        (
            Empty(),
            r"Empty in .*test_own_metric\.py measures nothing: give it a method of_ranking or of_answer",
        ),
    ],
)
def test_a_wrong_metric_is_reported_before_anything_is_computed(metric, sentence):
    with pytest.raises(UserError, match=sentence):
        check_own(metric)


@pytest.mark.parametrize(
    "value", ["high", float("nan"), -np.inf, np.float32("nan"), 10**400, True, np.ones(2)]
)
def test_a_metric_that_returns_no_finite_number_is_reported(value):
    with pytest.raises(UserError, match=r"of_ranking returned [^;]*; it must return a finite number or None"):
        own_ranking_rows(Named(value=value), {"q": {"a": 1}}, {})


@pytest.mark.parametrize("value", [np.int64(2), np.float32(2), 2, Fraction(2)])
def test_a_number_of_any_kind_is_a_value(value):
    [row] = own_ranking_rows(Named(value=value), {"q": {"a": 1}}, {}).values()
    assert row == {"mine": 2.0} and type(row["mine"]) is float
