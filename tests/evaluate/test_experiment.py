"""Whole evaluations with a bag of words and a fake generator: result files, cache keys, plans, tuning."""

from dataclasses import replace

import pytest

from rag.evaluate.ablation import ContextAblation
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.statistics import Statistics
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk.fixed import FixedChunker
from rag.retrieve.search import Dense, Hybrid, Lexical
from rag.types import Document, UserError
from tests.damage import WAYS
from tests.evaluate.default_options import bm25_grid, convex_grid, tuning
from tests.evaluate.tiny_experiment import CLOSED_BOOK, LastEater, dataset, experiment, read
from tests.typecheck import unchecked


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_an_evaluation_writes_its_metrics_and_their_intervals():
    folder = experiment(
        dataset=dataset(qrels={"q0": {"seal": 1}, "q1": {"seal": 1}}, queries={"q0": "seal", "q1": "whale"})
    ).run()
    metrics = read(folder, "metrics.json")
    assert metrics["means"]["MRR@10"] == pytest.approx(0.5)
    low, high = metrics["intervals"]["MRR@10"]
    assert low <= 0.5 <= high
    assert metrics["dataset"] == {
        "fingerprint": metrics["dataset"]["fingerprint"], "queries": 2, "limit": None, "seed": 0,
    }  # fmt: skip
    assert [row["MRR@10"] for row in read(folder, "per_query.jsonl")] == [1.0, 0.0]
    costs = read(folder, "costs.json")
    assert costs["stages"]["search Lexical"]["items"] == 2
    assert costs["query_n"] == 2
    assert costs["index_bytes"] > 0
    assert "environment" not in metrics


def test_a_cached_evaluation_is_not_repeated(monkeypatch):
    first = experiment().run()
    stamp = (first / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(Experiment, "_result_files", None)
    again = experiment().run()
    assert again == first
    assert (again / "metrics.json").stat().st_mtime_ns == stamp


@pytest.mark.parametrize(
    "change",
    [
        {"method": Lexical(BM25Weights(k1=1.0))},
        {"chunker": FixedChunker(3)},
        {"evaluation": EvaluationOptions(depth=4)},
        {"statistics": Statistics(resamples=200, seed=1)},
        {"dataset": dataset(answers={})},
        {"dataset": dataset().sample(3, 0)},
        {"tuning": tuning(bm25_grid(), folds=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_the_key_changes_with_what_results_depend_on(change):
    assert experiment(**change).key != experiment().key


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_result_is_computed_again(way, capsys):
    done = experiment().run()
    names = sorted(path.name for path in done.iterdir())
    before = (done / "metrics.json").read_bytes()
    for name in names:
        WAYS[way](done / name)
        assert experiment().plan()[0] == ("result", 1, 0)
        assert experiment().run() == done and (done / "metrics.json").read_bytes() == before
        assert f"{done / name} " in capsys.readouterr().err
        assert experiment().plan() == [("result", 1, 1)]
    assert sorted(path.name for path in done.iterdir()) == names


def test_the_key_ignores_what_results_do_not_depend_on():
    assert experiment(dataset=dataset(name="another name")).key == experiment().key
    assert experiment(prompt=CLOSED_BOOK).key == experiment().key  # no question is answered
    asking = ContextAblation(["retrieved"])
    answering = experiment(LastEater(), ablation=asking)
    assert replace(answering, prompt=CLOSED_BOOK).key != answering.key


def test_a_plan_counts_what_would_run_and_what_is_cached():
    assert experiment().plan()[:2] == [("result", 1, 0), ("chunk", 6, 0)]
    experiment().run()
    assert experiment().plan() == [("result", 1, 1)]
    assert ("answer", 14, 0) in experiment(
        LastEater(), ablation=ContextAblation(["retrieved", "oracle"])
    ).plan()
    deeper = {
        stage: (items, reused)
        for stage, items, reused in experiment(evaluation=EvaluationOptions(depth=2)).plan()
    }
    assert deeper["chunk"] == (6, 6)
    assert deeper["search Lexical"] == (6, 0)


def test_a_plan_of_a_method_names_the_stages_inside_it():
    both = Hybrid({"dense": Dense(), "lexical": Lexical()})
    experiment(
        evaluation=EvaluationOptions(depth=99)
    ).run()  # the lexical arm, as deep as the hybrid asks for it
    plan = {
        stage: (items, reused)
        for stage, items, reused in experiment(method=both, evaluation=EvaluationOptions(depth=99)).plan()
    }
    assert plan["search Hybrid"] == (6, 0)
    assert plan["search Dense"] == (6, 0)
    assert plan["search Lexical"] == (6, 6)


def test_tuning_reports_queries_it_was_not_tuned_on():
    arms = Hybrid({"dense": Dense(), "lexical": Lexical()})
    folder = experiment(
        method=arms, tuning=tuning(convex_grid(normalizers=["min_max"], steps=2), folds=2)
    ).run()
    tuned = read(folder, "tuning.json")
    assert tuned["nested"] == pytest.approx(read(folder, "metrics.json")["means"]["nDCG@10"])
    assert tuned["optimism"] == pytest.approx(tuned["naive"] - tuned["nested"])
    assert sum(fold["queries"] for fold in tuned["folds"]) == 6
    folder = experiment(tuning=tuning(bm25_grid(k1=(0.5, 1.5), b=(0.0, 1.0)), folds=3)).run()
    assert read(folder, "tuning.json")["family"] == "bm25"


@pytest.mark.parametrize(
    "change",
    [
        {"tuning": tuning(convex_grid())},
        {"method": Dense(), "tuning": tuning(bm25_grid())},
        {"tuning": tuning(bm25_grid()), "ablation": ContextAblation(["retrieved"])},
    ],
)
def test_a_method_that_cannot_be_tuned_is_an_error(change):
    with pytest.raises(UserError, match="tuning"):
        experiment(LastEater(), **change).run()


@pytest.mark.parametrize(
    "make",
    [
        lambda: unchecked(ContextAblation, conditions=["retrieved"], measure="f1"),
        lambda: EvaluationOptions(probes=0),
        lambda: unchecked(ContextAblation, conditions=["retreived"]),
        lambda: unchecked(ContextAblation, conditions="retrieved"),
        lambda: ContextAblation(k=0),
        lambda: EvaluationOptions(measures="MAP"),
        lambda: EvaluationOptions(measures=["nDGC"]),
        lambda: EvaluationOptions(span_measures=["TokenRecall"]),
        lambda: EvaluationOptions(depth=0),
        lambda: experiment(dataset=dataset(corpus=(Document("a", "a", ""),), qrels={"q0": {"a": 1}})).run(),
    ],
)
def test_an_invalid_option_is_one_sentence(make):
    with pytest.raises(UserError) as error:
        make()
    assert len(str(error.value).splitlines()) == 1


def test_a_cutoff_above_the_size_of_the_corpus_and_unusual_questions_are_evaluated():
    odd = {"q0": "the a of", "q1": "🦭 ŧ", "q2": "seal " * 200_000, "q3": "seal"}
    folder = experiment(
        dataset=dataset(queries=odd, qrels={query: {"seal": 1} for query in odd}),
        method=Hybrid({"dense": Dense(), "lexical": Lexical()}),
        evaluation=EvaluationOptions(depth=1000, measures=["nDCG@1000", "Recall@1000"], probes=1),
    ).run()
    assert read(folder, "metrics.json")["means"]["Recall@1000"] >= 0.5


def test_a_measure_that_is_cut_off_beyond_the_retrieved_documents_gives_a_warning():
    documents = len(dataset().corpus)
    measures = [f"nDCG@{documents}", "P@1", "MAP"]

    def warnings(depth):
        options = EvaluationOptions(depth=depth, measures=measures, probes=1)
        return [
            problem for problem in experiment(evaluation=options).problems if "evaluation.depth" in problem
        ]

    sentence = f"nDCG@{documents} saw only the first 2 documents of each query: raise evaluation.depth."
    assert warnings(2) == [sentence]
    assert not warnings(documents)
