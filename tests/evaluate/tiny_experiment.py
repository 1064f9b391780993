"""A tiny evaluation: six documents that state a fact each, and a generator that copies the last passage."""

import json

from rag.context import ContextOptions
from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.datasets import Dataset
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.statistics import Statistics
from rag.generate import LogLikelihood
from rag.ingest.chunk.whole import WholeChunker
from rag.pipeline import AnswerOptions
from rag.prompt import PromptTemplate
from rag.retrieve.search import Lexical
from rag.types import Document

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
CLOSED_BOOK = PromptTemplate(user="Q: {question}")


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


def experiment(generator=None, **changes) -> Experiment:
    values = {
        "dataset": dataset(),
        "chunker": WholeChunker(),
        "embedder": BagOfWords(),
        "method": Lexical(),
        "generator": lambda: generator,
        "prompt": PROMPT,
        "closed_book": CLOSED_BOOK,
        "evaluation": EvaluationOptions(depth=5, probes=3),
        "statistics": Statistics(resamples=200),
        "context": ContextOptions(order="reverse"),
        "options": OPTIONS,
    }
    return Experiment(**values | changes)


def read(folder, name):
    text = (folder / name).read_text()
    return [json.loads(line) for line in text.splitlines()] if name.endswith("l") else json.loads(text)
