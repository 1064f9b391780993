"""TREC run files as a retriever: formats of other tools, the order of trec_eval, unknown ids, reranking, cache keys."""

import gzip
import json
import os
import threading
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import pytrec_eval
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate import retrieval
from rag.evaluate.datasets import Dataset
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.metrics.retrieval import evaluate
from rag.evaluate.statistics import Statistics
from rag.ingest.chunk.fixed import FixedChunker
from rag.ingest.chunk.whole import WholeChunker
from rag.retrieve.rerank.mmr import MMR
from rag.retrieve.run_file import RunFile, load_run, trec_eval_order
from rag.retrieve.search import Hybrid, Lexical, Reranked
from rag.types import Document, UserError

WORDS = ("seal", "whale", "gull", "crab")
DATASET = Dataset(
    name="animals",
    corpus=tuple(
        Document(f"d{i}", f"d{i}", f"a {word} eats fish . it sleeps") for i, word in enumerate(WORDS)
    ),
    queries={"q1": "who eats", "q2": "who sleeps"},
    qrels={"q1": {"d2": 1, "d0": 2}, "q2": {"d3": 1}},
    answers={},
    unjudged={},
    unanswerable=frozenset(),
    drop_self_hits=False,
    problems=(),
)
PYSERINI = """q1 Q0 d2 1 12.345600 Anserini
q1 Q0 d0 2 12.3 Anserini
q1 Q0 d1 3 -1.500000 Anserini
q2 Q0 d3 1 7 Anserini
"""
PYTERRIER = """q1 Q0 d2 0 24.69120063 BR(BM25)
q1 Q0 d0 1 24.6 BR(BM25)
q1 Q0 d1 2 0.1 BR(BM25)
q2 Q0 d3 0 7.0 BR(BM25)
"""
FORMATS = {"pyserini": PYSERINI, "pyterrier": PYTERRIER, "tabs": PYSERINI.replace(" ", "\t")}


def run_of(folder: Path, text: str) -> RunFile:
    (folder / "run.txt").write_text(text)
    return load_run(folder / "run.txt")


def found(run: RunFile, chunker=WholeChunker(), k: int = 10) -> dict[str, list]:
    chunks = retrieval.chunk_all(DATASET, chunker, BagOfWords())
    collection = retrieval.build_collection(DATASET, chunks, BagOfWords())
    hits = run.search(collection, list(DATASET.queries.values()), k)
    return dict(zip(DATASET.queries, hits, strict=True))


@pytest.mark.parametrize("text", FORMATS.values(), ids=FORMATS)
def test_the_output_of_other_tools_is_found_in_its_order(tmp_path, text, capsys):
    hits = found(run_of(tmp_path, text))
    assert [hit.chunk.document_id for hit in hits["q1"]] == ["d2", "d0", "d1"]
    assert [hit.chunk.document_id for hit in hits["q2"]] == ["d3"]
    first = float(text.split()[4])
    assert hits["q1"][0].score == pytest.approx(first)
    assert capsys.readouterr().err == ""


def test_a_document_of_several_chunks_gives_all_of_them_in_order(tmp_path):
    hits = found(run_of(tmp_path, PYSERINI), FixedChunker(3))["q1"]
    assert [hit.chunk.document_id for hit in hits] == ["d2"] * 3 + ["d0"] * 3 + ["d1"] * 3
    assert [hit.chunk.start for hit in hits[:3]] == sorted(hit.chunk.start for hit in hits[:3])
    assert len(found(run_of(tmp_path, PYSERINI), FixedChunker(3), k=4)["q1"]) == 4


def test_unknown_documents_and_missing_queries_are_counted_for_every_evaluation(tmp_path):
    """The sentences do not depend on what is cached, and unjudged queries may be missing."""
    run = run_of(tmp_path, "q1 Q0 other 1 9 x\nq1 Q0 d1 2 8 x\nq1 Q0 another 3 7 x\nq9 Q0 d1 1 1 x\n")
    hits = found(run)
    assert [hit.chunk.document_id for hit in hits["q1"]] == ["d1"]
    assert hits["q2"] == []
    unjudged = {"q3": "who swims"}
    dataset = replace(
        DATASET, unjudged=unjudged, unanswerable=frozenset(unjudged), problems=("It is small.",)
    )
    for method in (run, Reranked(run, MMR()), Hybrid({"run": run, "words": Lexical(), "again": run})):
        assert Experiment(dataset, BagOfWords(), method=method).problems == (
            "It is small.",
            "2 documents of the run are not in the corpus, such as 'another'.",
            "1 of 2 queries are not in the run, such as 'q2'.",
        )
    assert Experiment(dataset, BagOfWords(), method=Lexical()).problems == ("It is small.",)


def test_a_text_that_is_no_query_is_reported(tmp_path):
    chunks = retrieval.chunk_all(DATASET, WholeChunker(), BagOfWords())
    collection = retrieval.build_collection(DATASET, chunks, BagOfWords())
    with pytest.raises(UserError, match=r"'something else' is none of them: use scripts/eval\.py"):
        run_of(tmp_path, PYSERINI).search(collection, ["something else"], 3)


@pytest.mark.parametrize(("text", "sentence"), [("", "is empty"), ("q1 Q0 d1 1 x\n", "line 1 is not")])
def test_a_wrong_file_is_reported(tmp_path, text, sentence):
    with pytest.raises(UserError, match=sentence):
        run_of(tmp_path, text)
    with pytest.raises(UserError, match="cannot be read"):
        load_run(tmp_path / "nowhere.txt")


names = st.integers(0, 30).map("d{}".format)
# Few different scores make many ties; neighbouring doubles that are one float32 make the hidden ones.
scores = st.sampled_from([0.0, -0.0, 1.0, 1.0 + 1e-12, 0.5, -2.5]) | st.floats(-1, 1, width=32)


@given(st.dictionaries(names, st.integers(0, 3), min_size=1), st.dictionaries(names, scores, min_size=1))
@settings(max_examples=200, deadline=None)
def test_figures_are_those_of_trec_eval_on_the_file_itself(judged, listed):
    theirs = pytrec_eval.RelevanceEvaluator({"q": judged}, {"ndcg_cut.10", "map", "recip_rank"})
    [expected] = theirs.evaluate({"q": listed}).values()
    ours, _ = evaluate({"q": judged}, {"q": trec_eval_order(listed)}, ["nDCG@10", "MAP", "MRR"])
    wanted = {"nDCG@10": expected["ndcg_cut_10"], "MAP": expected["map"], "MRR": expected["recip_rank"]}
    assert ours == pytest.approx(wanted, abs=1e-6)
    values = np.array(list(trec_eval_order(listed).values()), np.float32)
    assert (values[1:] < values[:-1]).all()


def experiment(method, tmp_path, monkeypatch, dataset: Dataset = DATASET) -> dict[str, float]:
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    options = {"evaluation": EvaluationOptions(probes=1), "statistics": Statistics(resamples=100)}
    folder = Experiment(dataset, BagOfWords(), method=method, **options).run()
    return json.loads((folder / "metrics.json").read_text())["means"]


def test_an_evaluation_of_a_run_has_its_figures_and_another_run_has_its_own(tmp_path, monkeypatch):
    perfect = "q1 Q0 d0 1 2 x\nq1 Q0 d2 2 1 x\nq2 Q0 d3 1 1 x\n"
    assert experiment(run_of(tmp_path, perfect), tmp_path, monkeypatch)["nDCG@10"] == 1.0
    worse = experiment(run_of(tmp_path, PYSERINI), tmp_path, monkeypatch)["nDCG@10"]
    assert 0.5 < worse < 1.0
    for method in (
        Reranked(run_of(tmp_path, PYSERINI), MMR()),
        Hybrid({"run": run_of(tmp_path, PYSERINI), "words": Lexical()}),
    ):
        assert 0 < experiment(method, tmp_path, monkeypatch)["nDCG@10"] <= 1


def test_the_same_questions_under_other_ids_are_another_result(tmp_path, monkeypatch):
    """The run is the same, and so are the texts: only the ids say which ranking is whose."""
    swapped = replace(DATASET, queries={"q2": "who eats", "q1": "who sleeps"})
    run = run_of(tmp_path, PYSERINI)
    first = experiment(run, tmp_path, monkeypatch)
    assert experiment(run, tmp_path, monkeypatch, swapped)["nDCG@10"] == pytest.approx(first["nDCG@10"])


def test_a_packed_run_and_one_from_a_pipe_are_those_of_the_plain_file(tmp_path):
    (tmp_path / "run.txt").write_text(PYSERINI)
    (tmp_path / "run.txt.gz").write_bytes(gzip.compress(PYSERINI.encode()))
    plain = load_run(tmp_path / "run.txt")
    assert load_run(tmp_path / "run.txt.gz") == plain
    os.mkfifo(tmp_path / "pipe")
    for text, same in ((PYSERINI, True), (PYSERINI.replace("12.3", "12.2"), False)):
        writer = threading.Thread(target=(tmp_path / "pipe").write_text, args=(text,))
        writer.start()
        assert (load_run(tmp_path / "pipe") == plain) is same
        writer.join()
    (tmp_path / "cut.gz").write_bytes(gzip.compress(PYSERINI.encode())[:-12])
    with pytest.raises(UserError, match="cannot be read"):
        load_run(tmp_path / "cut.gz")


@pytest.mark.parametrize("score", ["3.4e38", "-3.4e38"])
def test_equal_scores_at_the_ends_of_the_range_can_be_evaluated(tmp_path, score):
    lines = "".join(f"q1 Q0 d{i} {i} {score} t\n" for i in range(4))
    ranking = {
        query: {hit.chunk.document_id: hit.score for hit in hits}
        for query, hits in found(run_of(tmp_path, lines)).items()
    }
    _, values = evaluate(DATASET.qrels, ranking, ["nDCG@10", "MRR@10"])
    assert values["q1"]["MRR@10"] == 1 / 2  # d3, d2, d1, d0
    with pytest.raises(UserError, match=r"score from -3\.4e\+38 to 3\.4e\+38"):
        run_of(tmp_path, lines.replace("3.4e38", "3.41e38"))
