"""Questions with gold answers over a corpus, and the prompts with the passages that each is answered from.

The benchmarks that answer questions share this set.
"""

import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from rag.context import ContextOptions
from rag.embed.bert import BertEmbedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.beir import load_beir
from rag.evaluate.datasets.sample import SAMPLE
from rag.evaluate.retrieval import build_collection, without_own_document
from rag.generate import Generator
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.chunk.split import chunks_of
from rag.ingest.chunk.whole import WholeChunker
from rag.pipeline import AnswerOptions, Reader, fit_context, select_context
from rag.prompt import PromptTemplate, render
from rag.retrieve.cached import cached_search
from rag.retrieve.search import Dense, Search
from rag.runtime.options import Count, Filled, Seed, check_fields
from rag.types import Context, Document, Hit, Message, UserError

_ANOTHER_QUESTION = "What is this about?"


@dataclass(frozen=True, slots=True)
class Task:
    """A prompt and the gold answers to its question."""

    messages: tuple[Message, ...]
    gold: tuple[str, ...]


@dataclass(frozen=True)
class QuestionSet:
    """The source of the questions, and how their prompts are made; conf/questions/ has the defaults."""

    prompt: PromptTemplate
    context: ContextOptions
    path: Filled | None  # None: the sample set
    k: Count
    passage_tokens: Count | None  # None: each document is one passage
    embedder: Filled
    limit: Count | None
    seed: Seed

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> tuple[Search, list[str]]:
        """Return a search over the passages, and the questions that have a gold answer, shuffled by `seed`."""
        dataset, search = self._load()
        asked = [text for query, text in dataset.queries.items() if dataset.answers.get(query)]
        order = np.random.default_rng(self.seed).permutation(len(asked)).tolist()
        return search, [asked[i] for i in order]

    def tasks(self, generator: Generator, max_new_tokens: int, stop: Sequence[str]) -> list[Task]:
        """Return the tasks in the order of the dataset.

        Questions without a gold answer or without a relevant passage are left out, which a line on stderr reports.
        Raises UserError when fewer than two are left.
        """
        dataset, search = self._load()
        reader = self.reader(generator, max_new_tokens, stop)
        # One more, because a question that is a document of the corpus does not count as its own passage.
        found = cached_search(search.collection, search.method, list(dataset.queries.values()), self.k + 1)
        tasks = []
        for (query, text), hits in zip(dataset.queries.items(), found, strict=True):
            gold = dataset.answers.get(query)
            chosen = without_own_document(hits, query, dataset)[: self.k]
            if gold and (context := _select(chosen, search, reader)).sources:
                tasks.append(Task(tuple(fit_context(text, context, reader)[0]), tuple(gold)))
        if left_out := len(dataset.queries) - len(tasks):
            print(f"left out: {left_out} questions without gold answer or relevant passage", file=sys.stderr)
        if len(tasks) < 2:
            raise UserError(f"{self.path} has {len(tasks)} questions to answer: raise bench.questions.limit")
        return tasks

    def reader(self, generator: Generator, max_new_tokens: int, stop: Sequence[str] = ()) -> Reader:
        """Return the stages that answer with this generator."""
        options = AnswerOptions(max_new_tokens, stop=tuple(stop), clean_up=False)  # which peers do not
        return Reader(generator, self.prompt, self.context, options=options)

    def _load(self) -> tuple[Dataset, Search]:
        dataset = load_beir(SAMPLE if self.path is None else self.path, limit=self.limit, seed=self.seed)
        embedder, chunker = BertEmbedder(self.embedder), self._chunker()
        if self.passage_tokens is not None:
            dataset = replace(dataset, corpus=joined(dataset.corpus))
        chunks = [chunk for document in dataset.corpus for chunk in chunks_of(document, chunker, embedder)]
        collection = build_collection(dataset, chunks, embedder)
        return dataset, Search(collection, Dense(), self.k)

    def _chunker(self) -> Chunker:
        return WholeChunker() if self.passage_tokens is None else SentenceChunker(self.passage_tokens)


def joined(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Join neighbouring documents of one title into one, so that passages of any length can be cut from it."""
    found = []
    for title, group in groupby(documents, key=lambda document: document.title or document.id):
        members = list(group)
        text = "\n\n".join(document.text for document in members)
        found.append(Document(members[0].id, members[0].path, text, title))
    return tuple(found)


def messages(question: str, search: Search, reader: Reader) -> list[Message]:
    """Return the prompt that pipeline.answer makes. Raises UserError when no passage is relevant to the question."""
    return fit_context(question, _relevant(question, search, reader), reader)[0]


def another_prompt(question: str, search: Search, reader: Reader) -> list[Message]:
    """Return a prompt with the question's passages in another order and with another question.

    A generator that caches passages has cached these afterwards, as if they had been prefilled at ingest. What it
    caches of whole prompts can serve the question's own prompt only up to the first passage.
    """
    context = _relevant(question, search, reader)
    rotated = replace(context, sources=context.sources[1:] + context.sources[:1])
    return render(reader.template, _ANOTHER_QUESTION, rotated)


def _relevant(question: str, search: Search, reader: Reader) -> Context:
    context = _context(question, search, reader)
    if not context.sources:
        raise UserError(f"no passage is relevant to {question!r}: set bench.questions.context.min_score=null")
    return context


def _context(question: str, search: Search, reader: Reader) -> Context:
    return _select(search(question), search, reader)


def _select(hits: Sequence[Hit], search: Search, reader: Reader) -> Context:
    document_text = search.collection.index.document_text
    return select_context(hits, document_text, search.score_threshold, reader)
