"""Synthetic questions lead back to their passages and answers, are the same for a seed, and can be read again."""

import json
import re

import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.datasets.jsonl import load_jsonl
from rag.train.examples import has_answer
from rag.train.synthetic import BLANK, SyntheticOptions, load_synthetic
from rag.types import UserError
from tests.tiny_models import GenerateOnly

FILES = {
    "station.md": "# The station\n\nAstley House stands on 46 legs above the snow of Halden Island. "
    "The wind turbine Beate was raised by Solveig Marchetti in March 1998 beside the old hall.\n",
    "ship.txt": "The supply ship sails in March 1998 from Port Selwyn with food and fuel for everyone. "
    "On the deck of the ship Solveig Marchetti counts the crates twice before they leave the harbour.\n",
}


class Asker(GenerateOnly):
    """Asks about the words before an answer, and finds it again where it is a name; it asks nothing about dates."""

    context_length, fingerprint = 4000, "asker"

    def __init__(self):
        self.asked = 0
        self._answers = {}

    def generate(self, requests):
        self.asked += len(requests)
        return [self._line(request.messages[-1].content) for request in requests]

    def _line(self, prompt):
        text, kind, given = re.match(r"Text: (.*)\n(Answer|Question): (.*)\n", prompt, re.DOTALL).groups()
        if kind == "Question":
            answer = self._answers[given]
            return f"It is {answer}" if answer in text and answer.istitle() else "many"
        if "1998" in given:
            return "A ship."
        question = f"What is said of {' '.join(text[: text.index(given)].split()[-4:])}?"
        self._answers[question] = given
        return f"Question: {question}"


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "files"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text)
    return folder


def made(corpus, generator=None, output=None, **options):
    questions = SyntheticOptions(**{"passage_tokens": 60, "per_passage": 20, "k": 2} | options)
    return load_synthetic(corpus, BagOfWords(), generator or Asker(), questions, output)


def answers_of(dataset):
    return {answer for some in dataset.answers.values() for answer in some}


def test_questions_lead_back_to_their_passages_and_can_be_read_again(corpus, tmp_path):
    file = tmp_path / "made.jsonl"
    dataset = made(corpus, output=file)
    texts = {document.id: document.text for document in dataset.corpus}
    assert {document.path for document in dataset.corpus} == set(FILES)
    for query, question in dataset.queries.items():
        [answer], [passage] = dataset.answers[query], dataset.qrels[query]
        assert has_answer(texts[passage], [answer]) and not has_answer(question, [answer])
        assert (BLANK in question) == (not query.startswith("model"))
    again = load_jsonl(file)
    assert again.queries == dataset.queries and again.answers == dataset.answers
    contexts = {document.id: document.text for document in again.corpus}
    for query in again.queries:
        [before], [after] = dataset.qrels[query], again.qrels[query]
        assert texts[before] == contexts[after]
    for row in map(json.loads, file.read_text().splitlines()):
        assert set(row) == {"id", "question", "context", "answers", "source"}
        assert row["source"].startswith(f"synthetic ({row['id'].partition('-')[0]}), ")


def test_a_recurring_span_is_asked_of_the_other_passage(corpus):
    dataset = made(corpus, kinds=["recurring"])
    texts = {document.id: document.text for document in dataset.corpus}
    assert answers_of(dataset) == {"March 1998", "Solveig Marchetti"}
    for query, question in dataset.queries.items():
        [passage] = dataset.qrels[query]
        assert not any(part in texts[passage] for part in question.split(BLANK))


def test_what_a_model_asks_is_kept_where_it_gives_the_answer_back(corpus):
    dataset = made(corpus, kinds=["model"], min_f1=0.5)
    assert answers_of(dataset) == {
        "Astley House",
        "Halden Island",
        "Beate",
        "Solveig Marchetti",
        "Port Selwyn",
    }
    [problem] = dataset.problems
    assert "2 no question was written" in problem and "1 the model gives another answer" in problem


def test_a_seed_makes_the_same_questions_without_asking_again(corpus):
    first, idle = made(corpus, per_passage=2), Asker()
    assert made(corpus, idle, per_passage=2).fingerprint == first.fingerprint
    assert idle.asked == 0
    assert made(corpus, per_passage=2, seed=1).fingerprint != first.fingerprint
    assert len(made(corpus, kinds=["cloze"], passages=1).queries) < len(made(corpus, kinds=["cloze"]).queries)


def test_where_no_question_can_be_made_nothing_is_written(corpus, tmp_path):
    for name in FILES:
        (corpus / name).write_text("Nothing to ask about here.")
    with pytest.raises(UserError, match=r"No question could be made of .*files: cloze 0 of 0 kept\."):
        made(corpus, kinds=["cloze"], output=tmp_path / "made.jsonl")
    assert not (tmp_path / "made.jsonl").exists()


def test_a_folder_without_documents_is_one_sentence(corpus):
    for name in FILES:
        (corpus / name).unlink()
    with pytest.raises(UserError, match="has text"):
        made(corpus)
