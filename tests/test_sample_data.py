"""The sample corpus and its questions agree with each other, as the loader reads the documents."""

import json
from collections import Counter
from pathlib import Path

import pytest

from rag.evaluate.datasets.beir import load_beir

SAMPLE = Path(__file__).parent.parent / "data" / "sample"
KINDS = {"fact", "number", "cause", "multi-hop", "paraphrase", "unanswerable"}


@pytest.fixture(scope="module")
def dataset():
    return load_beir(SAMPLE)


@pytest.fixture(scope="module")
def texts(dataset):
    return {document.id: document.text for document in dataset.corpus}


@pytest.fixture(scope="module")
def rows():
    return [json.loads(line) for line in (SAMPLE / "queries.jsonl").read_text(encoding="utf-8").splitlines()]


def test_more_than_thirty_documents_in_three_formats(dataset, texts):
    assert dataset.problems == ()
    assert len(texts) == 34
    assert Counter(id.rsplit(".", 1)[1] for id in texts) == {"md": 11, "txt": 11, "html": 12}
    assert len(set(texts.values())) == len(texts)
    for id, text in texts.items():
        assert 250 <= len(text.split()) <= 600, id


def test_pages_are_read_without_their_navigation_scripts_and_styles(texts):
    pages = {id: text for id, text in texts.items() if id.endswith(".html")}
    for id, text in pages.items():
        assert "webmaster" in (SAMPLE / "documents" / id).read_text(encoding="utf-8")
        for word in ("webmaster", "console.log", "sortable", "font-family", "<td>", "&nbsp;"):
            assert word not in text, (id, word)
    assert any(" | " in text for text in pages.values())


def test_a_hundred_questions_a_tenth_without_an_answer(dataset, rows):
    assert len(rows) == 100
    assert len(dataset.queries) == len(dataset.answers) == 90
    assert dataset.unjudged.keys() == dataset.unanswerable
    assert len(dataset.unanswerable) == 10
    assert {row["_id"] for row in rows if not row["answerable"]} == dataset.unanswerable
    assert len({row["_id"] for row in rows}) == len({row["text"] for row in rows}) == 100
    assert {row["kind"] for row in rows} == KINDS
    assert all((row["kind"] == "unanswerable") == (not row["answerable"]) for row in rows)


def test_judgements_are_the_documents_of_the_evidence(dataset, rows):
    for row in rows:
        judged = {item["document"]: 1 for item in row["evidence"]}
        assert dataset.qrels.get(row["_id"], {}) == judged, row["_id"]
        assert len(row["evidence"]) == len(judged)
        assert row["kind"] != "multi-hop" or len(judged) > 1, row["_id"]
    assert {document for judged in dataset.qrels.values() for document in judged} == {
        d.id for d in dataset.corpus
    }


def test_every_quote_stands_in_its_document_once(texts, rows):
    for row in rows:
        for item in row["evidence"]:
            assert texts[item["document"]].count(item["quote"]) == 1, (row["_id"], item["quote"])


def test_the_dataset_knows_every_quote_as_a_span(dataset, texts, rows):
    for row in rows:
        spans = dataset.evidence.get(row["_id"], ())
        quotes = [texts[span.document][span.start : span.end] for span in spans]
        assert quotes == [item["quote"] for item in row["evidence"]], row["_id"]


def test_every_answer_is_short_and_stands_in_a_quote(rows):
    for row in rows:
        quotes = [item["quote"] for item in row["evidence"]]
        assert bool(row["answers"]) == row["answerable"]
        for answer in row["answers"]:
            assert 1 <= len(answer.split()) <= 8, row["_id"]
        assert not quotes or any(answer in quote for answer in row["answers"] for quote in quotes), row["_id"]


def test_every_accepted_answer_stands_in_a_judged_document(texts, dataset):
    for query, answers in dataset.answers.items():
        judged = [texts[document] for document in dataset.qrels[query]]
        for answer in answers:
            assert any(answer in text for text in judged), (query, answer)


def test_a_short_prefix_of_the_questions_has_every_kind(rows):
    assert {row["kind"] for row in rows[:30]} == KINDS
