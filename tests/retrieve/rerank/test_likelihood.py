"""Reranking by likelihood: the prompts that are scored, and the mean over the question's tokens."""

from dataclasses import dataclass, field

import pytest

from rag.generate import LogLikelihood
from rag.retrieve.rerank.likelihood import Likelihood
from rag.types import Message, UserError
from tests.retrieve.passages import hits_of
from tests.tiny_collections import collection_of
from tests.typecheck import unchecked


@dataclass
class WordCounter:
    """A generator whose token is a word and whose log-likelihood is minus the words of the prompt and the text."""

    asked: list = field(default_factory=list)
    fingerprint: str = "0" * 64
    context_length: int = 1000

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def stream(self, request):
        raise NotImplementedError

    def generate(self, requests):
        raise NotImplementedError

    def log_likelihood(self, pairs):
        self.asked += pairs
        return [LogLikelihood(-float(self.prompt_tokens(m) + self.count(t)), self.count(t)) for m, t in pairs]

    def text_log_likelihood(self, pairs):
        self.asked += pairs
        return [LogLikelihood(-float(self.count(p) + self.count(t)), self.count(t)) for p, t in pairs]


def test_the_prompt_is_before_the_question(embedder):
    generator = WordCounter()
    collection = collection_of(["{question} one two three", "four"], embedder, generator)
    reranker = Likelihood(prompt="Passage: {passage} {x}\nQuestion:  {question}", average="sum")
    [found] = reranker.rerank(collection, ["why {passage}?"], [hits_of(collection, [0, 1])])
    assert generator.asked == [
        ("Passage: {question} one two three {x}\nQuestion:", "  why {passage}?"),
        ("Passage: four {x}\nQuestion:", "  why {passage}?"),
    ]
    assert [(hit.chunk.document_id, hit.score) for hit in found] == [("d1", -6.0), ("d0", -9.0)]


def test_the_mean_over_the_questions_tokens(embedder):
    collection = collection_of(["one two", "three"], embedder, WordCounter())
    [found] = Likelihood(prompt="{passage}{question}").rerank(
        collection, ["a b c d"], [hits_of(collection, [0, 1])]
    )
    assert [hit.score for hit in found] == [-5 / 4, -6 / 4]


def test_in_the_chat_format_the_prompt_is_the_users_message(embedder):
    generator = WordCounter()
    collection = collection_of(["text"], embedder, generator)
    Likelihood(prompt="Ask about {passage}. {question}", chat=True).rerank(
        collection, ["why?"], [hits_of(collection, [0])]
    )
    assert generator.asked == [([Message("user", "Ask about text.")], "why?")]


def test_long_texts_are_cut_at_a_word(embedder):
    generator = WordCounter()
    collection = collection_of(["one two  three four five"], embedder, generator)
    Likelihood(prompt="{passage}|{question}", passage_tokens=3, question_tokens=2).rerank(
        collection, ["a b c"], [hits_of(collection, [0])]
    )
    assert generator.asked == [("one two  three|", "a b")]


def test_a_likelihood_of_the_real_engine(collection, generator):
    reranker = Likelihood(prompt="P: {passage}\nQ: {question}")
    [found] = reranker.rerank(collection, ["what eats fish"], [hits_of(collection, [0, 1, 3])])
    for hit in found:
        [value] = generator.text_log_likelihood([(f"P: {hit.chunk.text}\nQ:", " what eats fish")])
        assert value.tokens == len(" what eats fish")
        assert hit.score == pytest.approx(value.total / value.tokens, abs=1e-4)


@pytest.mark.parametrize(
    "prompt",
    ["{passage}", "{question}", "{question} {passage}", "{passage} {question}?", "{passage}{passage}{question}",
     "{question}{passage}{question}", "{passage} {question}{question}", ""],
)  # fmt: skip
def test_prompts_of_another_form_are_refused(prompt):
    with pytest.raises(UserError, match=r"reranker\.prompt must hold"):
        Likelihood(prompt=prompt)


def test_other_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"average=max .*mean or sum"):
        unchecked(Likelihood, average="max")
    with pytest.raises(UserError, match="passage_tokens=0"):
        Likelihood(passage_tokens=0)
    with pytest.raises(UserError, match="question_tokens=-1"):
        Likelihood(question_tokens=-1)
