"""Context ablation with a fake generator: the passages of each condition, and the error breakdown."""

from dataclasses import replace

import numpy as np
import pytest

from rag.context import ContextOptions
from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.ablation import CONDITIONS, ContextAblation, Reply
from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.error_breakdown import ERRORS, error_parts
from rag.evaluate.experiment import Experiment
from rag.evaluate.statistics import Statistics
from rag.ingest.chunk.fixed import FixedChunker
from rag.prompt import PromptTemplate
from rag.retrieve.search import Dense, Lexical
from rag.types import Document
from tests.evaluate.tiny_experiment import OPTIONS, PROMPT, LastEater, dataset, experiment, read


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_every_condition_is_answered_and_the_errors_are_split_by_cause():
    """k=1: q0's document is ranked first; for the other half of the questions another one is."""
    queries = {"q0": "seal", "q1": "whale gull gull gull", "q2": "gull"}
    some = dataset(queries=queries, qrels={"q0": {"seal": 1}, "q1": {"whale": 1}, "q2": {"gull": 1}})
    reader = LastEater()
    whole = experiment(reader, dataset=some, ablation=ContextAblation(CONDITIONS, k=1), method=Lexical())
    folder = whole.run()
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
    replace(whole, statistics=Statistics(resamples=300)).run()
    assert reader.asked == asked  # another key, the same answers


def test_a_passage_that_does_not_fit_is_truncation_and_one_among_others_distraction():
    queries = {"q0": "seal whale"}
    some = dataset(queries=queries, qrels={"q0": {"seal": 1}}, unjudged={}, unanswerable=frozenset())
    options = ContextOptions(order="reverse", max_tokens=7)
    both = ContextAblation(["oracle", "retrieved"], k=2)
    found = read(experiment(LastEater(), dataset=some, ablation=both).run(), "error_breakdown.json")["errors"]
    cut = read(
        experiment(LastEater(), dataset=some, ablation=both, context=options).run(), "error_breakdown.json"
    )["errors"]
    # "whale" has the score of "seal" and comes before it: the passage of q0 is left out
    assert sum(found.values()) == pytest.approx(
        1 - read_f1(experiment(LastEater(), dataset=some, ablation=both))
    )
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
    one = experiment(
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


def test_evidence_across_two_chunks_is_found_in_their_union():
    text = "x y the seal eats fish now and z w v"
    some = dataset(
        corpus=(Document("d", "d", text),), queries={"q0": "seal fish"}, qrels={"q0": {"d": 1}},
        answers={"q0": ("fish",)}, unjudged={}, unanswerable=frozenset(),
        evidence={"q0": (Evidence("d", text.index("seal"), text.index("fish") + 4),)},
    )  # fmt: skip
    both = ContextAblation(["oracle", "retrieved"], k=2)
    folder = experiment(LastEater(), dataset=some, chunker=FixedChunker(5), ablation=both).run()
    assert [row["found"] and row["shown"] for row in read(folder, "answers.jsonl")] == [True, True]
    assert read(folder, "metrics.json")["means"]["oracle/EM"] == 1.0
    assert read(folder, "error_breakdown.json")["errors"]["retrieval miss"] == 0.0


@pytest.mark.parametrize("k", [1, 2, 3])
@pytest.mark.parametrize("place", [1, 2, 3])
def test_the_relevant_passage_has_the_place_that_is_asked_for(place, k):
    """Also where the retriever does not rank it so, and the last place where there are fewer."""
    queries = {"q0": "seal", "q1": "whale gull gull gull"}
    some = dataset(
        queries=queries, qrels={"q0": {"seal": 1}, "q1": {"whale": 1}}, unjudged={}, unanswerable=frozenset()
    )
    one = experiment(
        LastEater(),
        dataset=some,
        context=ContextOptions(order="score", min_score=None),
        ablation=ContextAblation(["placed"], k=k, place=place),
        method=Dense(),
    )
    for row in read(one.run(), "answers.jsonl"):
        relevant = {"q0": "seal", "q1": "whale"}[row["query"]]
        assert len(row["sources"]) == k and row["sources"].index(relevant) == min(place, k) - 1


@pytest.mark.parametrize("min_score", [0.99, "auto"])
def test_a_threshold_holds_for_the_shuffled_passages_too(min_score):
    embedder = BagOfWords(score_threshold=0.99)
    options = ContextOptions(min_score=min_score)
    contexts = ContextAblation(["retrieved", "shuffled", "oracle"])
    one = experiment(LastEater(), embedder=embedder, method=Dense(), context=options, ablation=contexts)
    rows = read(one.run(), "answers.jsonl")
    assert all(row["abstained"] for row in rows if row["condition"] != "oracle")
    assert read(one.run(), "error_breakdown.json")["errors"]["retrieval miss"] == 1.0
    other = experiment(
        LastEater(),
        embedder=BagOfWords(score_threshold=0.1),
        method=Dense(),
        context=options,
        ablation=contexts,
    )
    assert other.key != one.key


def test_a_question_too_long_for_the_model_is_a_warning_and_the_others_are_answered():
    queries = {"q0": "seal", "q1": "whale " * 500}
    some = dataset(
        queries=queries, qrels={"q0": {"seal": 1}, "q1": {"whale": 1}}, unjudged={}, unanswerable=frozenset()
    )
    folder = experiment(
        LastEater(), dataset=some, ablation=ContextAblation(["closed_book", "retrieved"], k=1)
    ).run()
    rows = {(row["query"], row["condition"]): row for row in read(folder, "answers.jsonl")}
    assert rows["q0", "retrieved"]["answer"] == "fish"
    assert not rows["q1", "retrieved"]["fits"]
    assert not rows["q1", "closed_book"]["fits"]
    assert any(
        "q1" in warning and "no room" in warning for warning in read(folder, "metrics.json")["warnings"]
    )


class CitingLooper(LastEater):
    """Cites a passage that it has and one that it has not, and records how its answers are to end."""

    def __init__(self):
        super().__init__()
        self.endings = set()

    def generate(self, requests):
        self.endings |= {(tuple(request.stop), request.no_repeat) for request in requests}
        return [f"{answer} [1] [9]" for answer in super().generate(requests)]


def test_answers_are_cleaned_up_and_that_is_part_of_their_key():
    some = ContextAblation(("closed_book", "retrieved"), likelihood=(), k=1)
    reader = CitingLooper()
    prompt, closed_book = replace(PROMPT, passage="[{n}] {text}"), PromptTemplate(user="Frage: {question}")
    whole = experiment(reader, ablation=some, prompt=prompt, closed_book=closed_book)

    def endings(rows):
        return {row["condition"]: row["answer"].partition(" ")[2] for row in rows if not row["abstained"]}

    rows = read(whole.run(), "answers.jsonl")
    assert endings(rows) == {"closed_book": "", "retrieved": "[1]"}
    assert reader.endings == {(("\nFrage:",), True), (("\nQ:",), True)}
    reader.endings.clear()
    rows = read(replace(whole, options=replace(OPTIONS, clean_up=False)).run(), "answers.jsonl")
    assert endings(rows) == {"closed_book": "[1] [9]", "retrieved": "[1] [9]"}
    assert reader.endings == {((), False)}  # asked again
