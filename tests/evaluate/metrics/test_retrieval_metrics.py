"""Metrics against hand-written formulas, on runs with ties, gaps, grades and self-hits; TREC files."""

import math
import re

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.retrieval import canonical_scores, evaluate, trec_lines
from rag.retrieve.run_file import read_trec_run
from rag.types import UserError
from tests.reference import METRIC_TOLERANCE, metric_oracle, ranking_oracle

NAMES = ["nDCG@10", "nDCG@3", "nDCG", "Recall@100", "Recall@2", "MRR@10", "MRR@2", "MRR", "MAP", "MAP@3"]
NAMES += ["Precision@5", "Success@1", "Success@4"]
UNKNOWN = ["nDGC@10", "nDCG@0", "Recall", "MRR@", "@10", "", "nDCG@1e3", "Success", "MRR@-1", "Rprec@5", "P"]

documents = st.integers(0, 30).map("d{}".format)
# Few different scores make many ties; neighbouring doubles that are one float32 make the hidden ones.
scores = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-12, 0.5, -2.5, 1e-45, 3e38, -3e38]) | st.floats(-1, 1)
grades = st.integers(-1, 3)
queries = st.integers(0, 6).map("q{}".format)
judged_st = st.dictionaries(documents, grades, min_size=1, max_size=8)
qrels_st = st.dictionaries(queries, judged_st, min_size=1, max_size=5)
runs_st = st.dictionaries(queries, st.dictionaries(documents, scores, max_size=25), max_size=7)


def split(name: str) -> tuple[str, int | None]:
    measure, _, cutoff = name.partition("@")
    return measure, int(cutoff) if cutoff else None


def oracle(name: str, qrels: dict, run: dict) -> dict[str, float]:
    rankings = {q: ranking_oracle(run.get(q, {})) for q in qrels}
    return {q: metric_oracle(*split(name), judged, rankings[q]) for q, judged in qrels.items()}


@given(qrels_st, runs_st)
@settings(max_examples=100, deadline=None)
def test_every_measure_is_its_formula(qrels, run):
    means, per_query = evaluate(qrels, run, NAMES)
    assert set(means) == set(NAMES)
    assert set(per_query) == set(qrels)
    for name in NAMES:
        expected = oracle(name, qrels, run)
        for query, value in expected.items():
            assert per_query[query][name] == pytest.approx(value, abs=METRIC_TOLERANCE), (name, query)
        assert means[name] == pytest.approx(np.mean(list(expected.values())), abs=METRIC_TOLERANCE), name


def test_figures_worked_by_hand():
    qrels = {"q": {"a": 2, "b": 1, "c": 0}}
    means, per_query = evaluate(qrels, {"q": {"x": 0.9, "b": 0.8, "a": 0.7, "c": 0.6}})
    ndcg = (1 / math.log2(3) + 2 / 2) / (2 + 1 / math.log2(3))
    average_precision = (1 / 2 + 2 / 3) / 2
    expected = {"nDCG@10": ndcg, "Recall@100": 1.0, "MRR@10": 0.5, "MAP": average_precision}
    assert means == pytest.approx(expected)
    assert per_query == {"q": means}


def test_equal_scores_rank_the_lower_id_first_for_every_provider():
    tied = {"q": {"a": 0.5, "b": 0.5, "c": 0.5}}
    for relevant, rank in (("a", 1), ("b", 2), ("c", 3)):
        means, _ = evaluate({"q": {relevant: 1}}, tied, ["MRR", "MRR@10", "MAP", "nDCG@10"])
        expected = {"MRR": 1 / rank, "MRR@10": 1 / rank, "MAP": 1 / rank, "nDCG@10": 1 / math.log2(rank + 1)}
        assert means == pytest.approx(expected)


def test_a_judged_query_without_results_counts_as_zero_and_an_unjudged_one_not_at_all():
    qrels = {"answered": {"a": 1}, "empty": {"a": 1}, "missing": {"a": 1}, "hopeless": {"a": 0}}
    run = {"answered": {"a": 1.0}, "empty": {}, "unjudged": {"a": 1.0}, "hopeless": {"a": 1.0}}
    means, per_query = evaluate(qrels, run, ["nDCG@10", "MRR@10", "Recall@5"])
    assert means == {"nDCG@10": 0.25, "MRR@10": 0.25, "Recall@5": 0.25}
    assert set(per_query) == set(qrels)
    assert evaluate(qrels, {}, ["MAP"])[0] == {"MAP": 0.0}


def test_the_users_names_come_back_and_case_does_not_matter():
    names = ["ndcg@10", "RR@10", "mrr@10", "R@100", "AP", "map", "p@5", "Rprec"]
    means, _ = evaluate({"q": {"a": 1}}, {"q": {"a": 1.0}}, names)
    assert list(means) == names
    assert means["p@5"] == pytest.approx(0.2)
    assert all(means[name] == 1.0 for name in names if name != "p@5")


@pytest.mark.parametrize("name", UNKNOWN)
def test_an_unknown_measure_is_named_with_examples(name):
    with pytest.raises(UserError, match=r"choose from such as nDCG@10, Recall@100, MRR@10, MAP") as error:
        evaluate({"q": {"a": 1}}, {}, [name])
    assert f'"{name}"' in str(error.value)


def test_empty_qrels_and_bad_scores_are_refused():
    with pytest.raises(UserError, match="no relevance judgements"):
        evaluate({}, {"q": {"a": 1.0}})
    for score in (math.nan, math.inf, -math.inf, 1e39):
        with pytest.raises(ValueError, match="cannot be ranked"):
            evaluate({"q": {"a": 1}}, {"q": {"a": score, "b": 1.0}})
    lowest = float(np.finfo(np.float32).min)  # a tie has no room below it
    with pytest.raises(ValueError, match="cannot be ranked"):
        evaluate({"q": {"a": 1}}, {"q": {"a": lowest, "b": lowest}})


@given(st.dictionaries(documents, scores, max_size=25))
def test_canonical_scores_keep_the_ranking_and_strictly_decrease_in_float32(given_scores):
    canonical = canonical_scores(given_scores)
    assert list(canonical) == ranking_oracle(given_scores)
    values = np.array(list(canonical.values()), np.float32)
    assert (values[1:] < values[:-1]).all()
    assert values.tolist() == list(canonical.values())
    for document, score in canonical.items():
        assert score == pytest.approx(given_scores[document], rel=1e-5, abs=1e-40)


def test_scores_that_need_no_change_get_none():
    assert canonical_scores({"b": 0.25, "a": 0.5}) == {"a": 0.5, "b": 0.25}


@given(qrels_st, runs_st)
@settings(max_examples=40, deadline=None)
def test_trec_eval_gives_our_figures_from_the_file_written(tmp_path_factory, qrels, run):
    path = tmp_path_factory.mktemp("run") / "run.trec"
    path.write_text("".join(trec_lines(run)))
    found = {query: {} for query in run}
    for line in path.read_text().splitlines():
        query, q0, document, rank, score, tag = line.split()
        assert (q0, tag, int(rank)) == ("Q0", "rag", len(found[query]) + 1)
        found[query][document] = float(score)
    positive = {query: {d: max(g, 0) for d, g in judged.items()} for query, judged in qrels.items()}
    theirs = pytrec_eval.RelevanceEvaluator(positive, {"ndcg_cut.10", "map"}).evaluate(found)
    _, ours = evaluate(qrels, run, ["nDCG@10", "MAP"])
    for query, values in theirs.items():
        assert ours[query]["nDCG@10"] == pytest.approx(values["ndcg_cut_10"], abs=METRIC_TOLERANCE)
        assert ours[query]["MAP"] == pytest.approx(values["map"], abs=METRIC_TOLERANCE)
    assert evaluate(qrels, read_trec_run(path), NAMES) == evaluate(qrels, run, NAMES)


# Our name -> trec_eval's, and how many documents it is shown: it has no reciprocal rank with a cut-off.
TREC_EVAL = {
    "nDCG": ("ndcg", None), "nDCG@3": ("ndcg_cut_3", None), "nDCG@10": ("ndcg_cut_10", None),
    "MAP": ("map", None), "MAP@5": ("map_cut_5", None), "Rprec": ("Rprec", None),
    "MRR": ("recip_rank", None), "MRR@10": ("recip_rank", 10), "MRR@2": ("recip_rank", 2),
    "Recall@5": ("recall_5", None), "Recall@100": ("recall_100", None), "Precision@5": ("P_5", None),
    "Precision@10": ("P_10", None), "Success@1": ("success_1", None), "Success@5": ("success_5", None),
}  # fmt: skip


def trec_eval(qrels: dict, run: dict, measure: str, shown: int | None) -> dict[str, float]:
    """trec_eval's own C code on rankings that it cannot see otherwise: whole scores that fall by 1."""
    rankings = {q: ranking_oracle(found)[:shown] for q, found in run.items() if found}
    plain = {q: {d: -float(rank) for rank, d in enumerate(ranking)} for q, ranking in rankings.items()}
    asked = re.sub(r"_(\d+)$", r".\1", measure)
    theirs = pytrec_eval.RelevanceEvaluator(qrels, {asked}).evaluate(plain)
    return {query: theirs.get(query, {}).get(measure, 0.0) for query in qrels}  # a missing query counts as 0


def assert_trec_evals_figures(qrels: dict, run: dict) -> None:
    means, ours = evaluate(qrels, run, list(TREC_EVAL))
    for name, (measure, shown) in TREC_EVAL.items():
        theirs = trec_eval(qrels, run, measure, shown)
        assert {q: ours[q][name] for q in qrels} == pytest.approx(theirs, abs=METRIC_TOLERANCE), name
        assert means[name] == pytest.approx(np.mean(list(theirs.values())), abs=METRIC_TOLERANCE), name


@given(qrels_st, runs_st)
@settings(max_examples=60, deadline=None)
def test_every_measure_is_trec_evals(qrels, run):
    assert_trec_evals_figures(
        {q: {d: max(g, 0) for d, g in judged.items()} for q, judged in qrels.items()}, run
    )


def test_trec_evals_figures_on_long_runs_with_ties_missing_queries_and_graded_qrels():
    """120 queries, 150 documents found for each with eleven different scores, a quarter of the queries missing."""
    rng = np.random.default_rng(0)
    qrels, run = {}, {}
    for i in range(120):
        judged = rng.permutation(400)[: rng.integers(1, 60)]
        qrels[f"q{i}"] = {f"d{d:03}": int(rng.integers(0, 4)) for d in judged}
        if i % 4:
            found = rng.permutation(400)[:150]
            run[f"q{i}"] = {f"d{d:03}": float(rng.integers(0, 11)) / 10 for d in found}
    run["unjudged"] = {"d000": 1.0}
    assert_trec_evals_figures(qrels, run)
    for name in NAMES:  # and both are the formulas
        _, ours = evaluate(qrels, run, [name])
        expected = oracle(name, qrels, run)
        assert {q: ours[q][name] for q in qrels} == pytest.approx(expected, abs=METRIC_TOLERANCE), name


def test_a_negative_grade_is_not_relevant_for_trec_eval_and_for_us():
    qrels = {"q": {"a": 2, "b": -1, "c": 0, "d": 1, "z": 3}}
    run = {"q": {"b": 5.0, "x": 4.0, "a": 3.0, "c": 2.0, "d": 1.0}}
    assert_trec_evals_figures(qrels, run)
    ideal = 3 + 2 / math.log2(3) + 1 / math.log2(4)
    assert evaluate(qrels, run, ["nDCG@3"])[0]["nDCG@3"] == pytest.approx(2 / math.log2(4) / ideal)


def test_ties_that_trec_eval_would_break_the_other_way_are_settled_before_it_sees_them():
    qrels, run = {"q": {"a": 1}}, {"q": {"a": 0.5, "b": 0.5}}
    raw = pytrec_eval.RelevanceEvaluator(qrels, {"recip_rank"}).evaluate(run)
    assert raw["q"]["recip_rank"] == 0.5  # the higher id first
    assert evaluate(qrels, run, ["MRR"])[0]["MRR"] == 1.0


def test_a_run_file_keeps_ids_with_spaces_and_reads_files_of_others(tmp_path):
    run = {"q 1": {"my notes.md": 0.5, "ünïcode.txt": 0.25}}
    (tmp_path / "run.trec").write_text("".join(trec_lines(run, tag="mine")))
    assert read_trec_run(tmp_path / "run.trec") == run
    (tmp_path / "other.trec").write_text("q1 Q0 d2 1 -3 x\n\nq1 Q0 d1 2 1e-3 x\r\n")
    assert read_trec_run(tmp_path / "other.trec") == {"q1": {"d2": -3.0, "d1": 0.001}}
    (tmp_path / "mixed.trec").write_text("\ufeffq1\tQ0 d2\t1  5 x\n", encoding="utf-8")
    assert read_trec_run(tmp_path / "mixed.trec") == {"q1": {"d2": 5.0}}


def test_ids_that_would_break_the_file_are_refused():
    for run in ({"q": {"a\tb": 1.0}}, {"q\n": {"a": 1.0}}):
        with pytest.raises(UserError, match="tab or line break"):
            list(trec_lines(run))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("q Q0 d 1 0.5 x\nq Q0 d 2 0.4 x\n", r'line 2 repeats "d" for "q"'),
        ("q Q0 d 1 0.5\n", "line 1 is not"),
        ("q Q0 d 1 0.5 x\nq Q0 e 2 high x\n", "line 2 is not"),
        ("q Q0 d 1 nan x\n", "line 1 is not"),
        ("q Q0 d 1 inf x\n", "line 1 is not"),
        ("q Q0 d 1 -3.4028235e38 x\n", r"line 1 is not: .* score from -3\.4e\+38 to 3\.4e\+38"),
    ],
)
def test_a_malformed_run_file_names_the_line(tmp_path, content, message):
    path = tmp_path / "run.trec"
    path.write_text(content)
    with pytest.raises(UserError, match=message) as error:
        read_trec_run(path)
    assert str(path) in str(error.value)


def test_a_missing_run_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"nothing\.trec"):
        read_trec_run(tmp_path / "nothing.trec")


def test_no_optional_library_changes_the_figures():
    """RR with a cut-off comes from a provider that is part of ir_measures, whatever else is installed."""
    names = [provider.NAME for provider in retrieval_metrics._PROVIDER.providers]
    assert names[:2] == ["pytrec_eval", "msmarco"]
    ours = [retrieval_metrics._measure(name) for name in NAMES]
    assert all(any(one.supports(m) for one in retrieval_metrics._PROVIDER.providers[:2]) for m in ours)
