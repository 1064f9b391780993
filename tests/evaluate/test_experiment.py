"""Whole evaluations with a bag of words and a fake generator: results, keys, plans, and the error breakdown."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rag.context import ContextOptions
from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.ablation import CONDITIONS, ContextAblation, Reply
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.error_breakdown import ERRORS, error_parts
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.statistics import Statistics
from rag.evaluate.tuning.grids import BM25Grid, ConvexGrid, Tuning
from rag.generate import LogLikelihood
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk.fixed import FixedChunker
from rag.ingest.chunk.whole import WholeChunker
from rag.pipeline import AnswerOptions
from rag.prompt import PromptTemplate
from rag.retrieve.search import Dense, Hybrid, Lexical
from rag.types import Document, UserError
from tests.damage import WAYS
from tests.typecheck import unchecked

FACTS = {
    "seal": "fish",
    "whale": "krill",
    "gull": "chicks",
    "crab": "algae",
    "tern": "sprats",
    "skua": "eggs",
}
DOCUMENTS = tuple(Document(name, name, f"the {name} eats {food} every day") for name, food in FACTS.items())
OPTIONS = AnswerOptions(max_new_tokens=8)
PROMPT = PromptTemplate(user="{context}\nQ: {question}", passage="{text}", separator="\n")
CLOSED = PromptTemplate(user="Q: {question}")


def dataset(**changes) -> Dataset:
    queries = {f"q{i}": f"what eats the {name}" for i, name in enumerate(FACTS)}
    values = {
        "name": "facts",
        "corpus": DOCUMENTS,
        "queries": queries,
        "qrels": {f"q{i}": {name: 1} for i, name in enumerate(FACTS)},
        "answers": {f"q{i}": (food,) for i, food in enumerate(FACTS.values())},
        "unjudged": {"u0": "neutrino mass"},
        "unanswerable": frozenset({"u0"}),
        "drop_self_hits": False,
        "problems": (),
    }
    return Dataset(**values | changes)


class LastEater:
    """Answers with what the last passage of its prompt says is eaten; a token is a word."""

    context_length, fingerprint = 200, "last eater"

    def __init__(self):
        self.asked = 0

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def generate(self, requests):
        self.asked += len(requests)
        return [self._answer(request.messages[-1].content) for request in requests]

    def _answer(self, prompt):
        passages = [line for line in prompt.splitlines() if " eats " in line and not line.startswith("Q:")]
        return passages[-1].split(" eats ")[1].split()[0] if passages else "unknown"

    def stream(self, request):
        raise NotImplementedError

    def log_likelihood(self, pairs):
        return [LogLikelihood(-1.0 if text in messages[-1].content else -9.0, 1) for messages, text in pairs]

    def text_log_likelihood(self, pairs):
        raise NotImplementedError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def job(generator=None, **changes) -> Experiment:
    values = {
        "dataset": dataset(),
        "chunker": WholeChunker(),
        "embedder": BagOfWords(),
        "method": Lexical(),
        "generator": lambda: generator,
        "prompt": PROMPT,
        "closed_book": CLOSED,
        "evaluation": EvaluationOptions(depth=5, probes=3),
        "statistics": Statistics(resamples=200),
        "context": ContextOptions(order="reverse"),
        "options": OPTIONS,
    }
    return Experiment(**values | changes)


def read(folder, name):
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)


def test_a_job_leaves_its_figures_and_their_uncertainty():
    folder = job(
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


def test_a_job_is_done_once(monkeypatch):
    first = job().run()
    stamp = (first / "metrics.json").stat().st_mtime_ns
    monkeypatch.setattr(Experiment, "_result_files", None)
    again = job().run()
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
        {"tuning": Tuning(BM25Grid(), folds=2)},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_key_follows_what_results_depend_on(change):
    assert job(**change).key != job().key


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_result_is_put_together_again(way, capsys):
    done = job().run()
    names = sorted(path.name for path in done.iterdir())
    before = (done / "metrics.json").read_bytes()
    for name in names:
        WAYS[way](done / name)
        assert job().plan()[0] == ("result", 1, 0)
        assert job().run() == done and (done / "metrics.json").read_bytes() == before
        assert f"{done / name} " in capsys.readouterr().err
        assert job().plan() == [("result", 1, 1)]
    assert sorted(path.name for path in done.iterdir()) == names


def test_a_key_ignores_what_results_do_not_depend_on():
    assert job(dataset=dataset(name="another name")).key == job().key
    assert job(prompt=CLOSED).key == job().key  # no question is answered
    asking = ContextAblation(["retrieved"])
    assert job(LastEater(), ablation=asking, prompt=CLOSED).key != job(LastEater(), ablation=asking).key


def test_a_plan_says_what_would_run_and_what_is_there():
    assert job().plan()[:2] == [("result", 1, 0), ("chunk", 6, 0)]
    job().run()
    assert job().plan() == [("result", 1, 1)]
    assert ("answer", 14, 0) in job(LastEater(), ablation=ContextAblation(["retrieved", "oracle"])).plan()
    deeper = {
        stage: (items, reused) for stage, items, reused in job(evaluation=EvaluationOptions(depth=2)).plan()
    }
    assert deeper["chunk"] == (6, 6)
    assert deeper["search Lexical"] == (6, 0)


def test_a_plan_of_a_method_names_the_stages_inside_it():
    both = Hybrid({"dense": Dense(), "lexical": Lexical()})
    job(evaluation=EvaluationOptions(depth=99)).run()  # the lexical arm, as deep as the hybrid asks for it
    plan = {
        stage: (items, reused)
        for stage, items, reused in job(method=both, evaluation=EvaluationOptions(depth=99)).plan()
    }
    assert plan["search Hybrid"] == (6, 0)
    assert plan["search Dense"] == (6, 0)
    assert plan["search Lexical"] == (6, 6)


def test_tuning_reports_queries_it_was_not_tuned_on():
    arms = Hybrid({"dense": Dense(), "lexical": Lexical()})
    folder = job(method=arms, tuning=Tuning(ConvexGrid(("min_max",), steps=2), folds=2)).run()
    tuned = read(folder, "tuning.json")
    assert tuned["nested"] == pytest.approx(read(folder, "metrics.json")["means"]["nDCG@10"])
    assert tuned["optimism"] == pytest.approx(tuned["naive"] - tuned["nested"])
    assert sum(fold["queries"] for fold in tuned["folds"]) == 6
    folder = job(tuning=Tuning(BM25Grid(k1=(0.5, 1.5), b=(0.0, 1.0)), folds=3)).run()
    assert read(folder, "tuning.json")["family"] == "bm25"


@pytest.mark.parametrize(
    "change",
    [
        {"tuning": Tuning()},
        {"method": Dense(), "tuning": Tuning(BM25Grid())},
        {"tuning": Tuning(BM25Grid()), "ablation": ContextAblation(["retrieved"])},
    ],
)
def test_what_cannot_be_tuned_is_told(change):
    with pytest.raises(UserError, match="tuning"):
        job(LastEater(), **change).run()


# --- context ablation


def test_every_condition_is_answered_and_the_errors_are_split_by_cause():
    """k=1: q0's document is ranked first; for the other half of the questions another one is."""
    queries = {"q0": "seal", "q1": "whale gull gull gull", "q2": "gull"}
    some = dataset(queries=queries, qrels={"q0": {"seal": 1}, "q1": {"whale": 1}, "q2": {"gull": 1}})
    reader = LastEater()
    everything = job(reader, dataset=some, ablation=ContextAblation(CONDITIONS, k=1), method=Lexical())
    folder = everything.run()
    means = read(folder, "metrics.json")["means"]
    assert means["oracle/F1"] == 1.0
    assert means["closed_book/F1"] == 0.0
    assert means["random/F1"] == 0.0
    assert means["retrieved/F1"] == pytest.approx(2 / 3)
    assert means["retrieved/gold log-likelihood"] > means["closed_book/gold log-likelihood"] == -9.0
    breakdown = read(folder, "error_breakdown.json")
    assert breakdown["errors"] == {
        "retrieval miss": pytest.approx(1 / 3),
        "truncation": 0,
        "distraction": 0,
        "reader": 0,
    }
    missed = breakdown["ceiling"] - breakdown["scores"]["retrieved"]
    assert missed == pytest.approx(sum(breakdown["errors"].values()))
    rows = read(folder, "answers.jsonl")
    assert len(rows) == 4 * len(CONDITIONS)  # the unanswerable question too
    abstained = {row["query"] for row in rows if row["condition"] == "retrieved" and row["abstained"]}
    assert abstained == {"u0"}  # no passage shares a word with it
    assert means["retrieved/abstention recall"] == 1.0
    assert means["retrieved/false abstention"] == 0.0
    assert means["random/abstention recall"] == 0.0  # of u0, which is answered from any passage
    asked = reader.asked
    replace(everything, statistics=Statistics(resamples=300)).run()
    assert reader.asked == asked  # another key, the same answers


def test_a_passage_that_does_not_fit_is_truncation_and_one_among_others_distraction():
    queries = {"q0": "seal whale"}
    some = dataset(queries=queries, qrels={"q0": {"seal": 1}}, unjudged={}, unanswerable=frozenset())
    options = ContextOptions(order="reverse", max_tokens=7)
    both = ContextAblation(["oracle", "retrieved"], k=2)
    found = read(job(LastEater(), dataset=some, ablation=both).run(), "error_breakdown.json")["errors"]
    cut = read(job(LastEater(), dataset=some, ablation=both, context=options).run(), "error_breakdown.json")[
        "errors"
    ]
    # "whale" ties with "seal" and stands before it: q0's own passage is the one that goes
    assert sum(found.values()) == pytest.approx(1 - read_f1(job(LastEater(), dataset=some, ablation=both)))
    assert {name for name, error in cut.items() if error} <= {"truncation"}


def read_f1(one: Experiment) -> float:
    return read(one.run(), "metrics.json")["means"]["retrieved/F1"]


def test_errors_sum_to_what_is_missing_question_by_question():
    rng = np.random.default_rng(0)
    replies, scores = [], {}
    for i in range(200):
        found, shown = bool(rng.integers(2)), bool(rng.integers(2))
        for condition in ("oracle", "retrieved"):
            reply = Reply(f"q{i}", condition, "", False, True, (), (), 0, 0, found, found and shown, None)
            replies.append(reply)
            scores[f"q{i}", condition] = float(rng.random())
    parts = error_parts(replies, scores)
    total = np.sum([parts[name] for name in ERRORS], axis=0)
    wanted = [1 - scores[f"q{i}", "retrieved"] for i in range(200)]
    np.testing.assert_allclose(total, wanted)


def test_evidence_decides_which_passage_is_relevant():
    text = "the seal eats fish. " + "it sleeps on ice. " * 10
    document = Document("d", "d", text)
    evidence = {"q0": (Evidence("d", text.index("fish"), text.index("fish") + 4),)}
    some = dataset(
        corpus=(document,), queries={"q0": "ice"}, qrels={"q0": {"d": 1}}, answers={"q0": ("fish",)},
        unjudged={}, unanswerable=frozenset(), evidence=evidence,
    )  # fmt: skip
    one = job(
        LastEater(),
        dataset=some,
        chunker=FixedChunker(4),
        ablation=ContextAblation(["oracle", "retrieved"], k=1),
    )
    folder = one.run()
    assert read(folder, "metrics.json")["means"]["oracle/EM"] == 1.0
    assert (
        read(folder, "error_breakdown.json")["errors"]["retrieval miss"] == 1.0
    )  # another passage of the right document
    assert "TokenRecall@512t" in read(folder, "metrics.json")["means"]


def test_evidence_across_the_border_of_chunks_is_found_in_their_union():
    text = "x y the seal eats fish now and z w v"
    some = dataset(
        corpus=(Document("d", "d", text),), queries={"q0": "seal fish"}, qrels={"q0": {"d": 1}},
        answers={"q0": ("fish",)}, unjudged={}, unanswerable=frozenset(),
        evidence={"q0": (Evidence("d", text.index("seal"), text.index("fish") + 4),)},
    )  # fmt: skip
    both = ContextAblation(["oracle", "retrieved"], k=2)
    folder = job(LastEater(), dataset=some, chunker=FixedChunker(5), ablation=both).run()
    assert [row["found"] and row["shown"] for row in read(folder, "answers.jsonl")] == [True, True]
    assert read(folder, "metrics.json")["means"]["oracle/EM"] == 1.0
    assert read(folder, "error_breakdown.json")["errors"]["retrieval miss"] == 0.0


@pytest.mark.parametrize("min_score", [0.99, "auto"])
def test_a_threshold_holds_for_the_shuffled_passages_too(min_score):
    embedder = BagOfWords(score_threshold=0.99)
    options = ContextOptions(min_score=min_score)
    contexts = ContextAblation(["retrieved", "shuffled", "oracle"])
    one = job(LastEater(), embedder=embedder, method=Dense(), context=options, ablation=contexts)
    rows = read(one.run(), "answers.jsonl")
    assert all(row["abstained"] for row in rows if row["condition"] != "oracle")
    assert read(one.run(), "error_breakdown.json")["errors"]["retrieval miss"] == 1.0
    other = job(
        LastEater(),
        embedder=BagOfWords(score_threshold=0.1),
        method=Dense(),
        context=options,
        ablation=contexts,
    )
    assert other.key != one.key


def test_one_question_too_long_for_the_model_is_told_and_loses_no_other():
    queries = {"q0": "seal", "q1": "whale " * 500}
    some = dataset(
        queries=queries, qrels={"q0": {"seal": 1}, "q1": {"whale": 1}}, unjudged={}, unanswerable=frozenset()
    )
    folder = job(LastEater(), dataset=some, ablation=ContextAblation(["closed_book", "retrieved"], k=1)).run()
    rows = {(row["query"], row["condition"]): row for row in read(folder, "answers.jsonl")}
    assert rows["q0", "retrieved"]["answer"] == "fish"
    assert not rows["q1", "retrieved"]["fits"]
    assert not rows["q1", "closed_book"]["fits"]
    assert any(
        "q1" in warning and "no room" in warning for warning in read(folder, "metrics.json")["warnings"]
    )


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
        lambda: job(dataset=dataset(corpus=(Document("a", "a", ""),), qrels={"q0": {"a": 1}})).run(),
    ],
)
def test_what_cannot_be_evaluated_is_told(make):
    with pytest.raises(UserError) as told:
        make()
    assert len(str(told.value).splitlines()) == 1


def test_a_cut_off_beyond_the_corpus_and_odd_questions_are_evaluated():
    odd = {"q0": "the a of", "q1": "🦭 ŧ", "q2": "seal " * 200_000, "q3": "seal"}
    folder = job(
        dataset=dataset(queries=odd, qrels={query: {"seal": 1} for query in odd}),
        method=Hybrid({"dense": Dense(), "lexical": Lexical()}),
        evaluation=EvaluationOptions(depth=1000, measures=["nDCG@1000", "Recall@1000"], probes=1),
    ).run()
    assert read(folder, "metrics.json")["means"]["Recall@1000"] >= 0.5
