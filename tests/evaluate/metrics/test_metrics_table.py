"""The table of metrics: names are unique, and every metric is found and computed by its row."""

import jax.numpy as jnp
import pytest

from rag.evaluate.metrics import ANSWER_METRICS, GOLD_METRICS, METRICS, find, measure_answer
from rag.evaluate.metrics.answers import JudgedAnswer
from rag.evaluate.metrics.overlap import Overlap


def test_no_two_metrics_share_a_name():
    names = [name for metric in METRICS for name in (metric.name.lower(), *metric.aliases)]
    assert len(set(names)) == len(names)


def test_a_metric_is_found_by_name_and_alias_among_those_that_need_the_same():
    assert find("NDCG", "qrels").name == "nDCG"
    assert find("rr", "qrels").name == "MRR"
    assert find("recall", "evidence") is None
    assert find("TokenRecall", "qrels") is None


def test_a_perfect_system_has_the_best_value_of_every_metric():
    perfect = {True: JudgedAnswer("fish", ["Fish"], cited=["a"], relevant=["a"], log_likelihood=0.0),
               False: JudgedAnswer("none", abstained=True, answerable=False)}  # fmt: skip
    for metric in METRICS:
        match metric.needs:
            case "qrels":
                if metric.gain:
                    grades = jnp.array([2.0, 1.0])
                    gain = metric.gain.of_ranking(grades) / metric.gain.ideal([2, 1], 2)
                    assert float(gain) == pytest.approx(metric.best), metric.name
            case "evidence":
                assert metric.function(Overlap(5, 5, 5)) == metric.best
            case needs:
                answer = perfect[needs != "an unanswerable question"]
                assert metric.function(answer) == metric.best, metric.name


def test_only_the_metrics_asked_for_are_computed_in_the_order_of_the_table():
    values = measure_answer(JudgedAnswer("a seal", ["seal"]), ("contains", "F1"))
    assert values == {"F1": 1.0, "contains": 1.0}
    assert list(measure_answer(JudgedAnswer("x"))) == list(ANSWER_METRICS)
    assert set(GOLD_METRICS) < set(ANSWER_METRICS)
