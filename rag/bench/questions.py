"""Questions over a corpus with the passages that each is answered from, for the benchmarks of the whole way."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import groupby

import numpy as np

from rag.context import ContextOptions
from rag.embed.bert import BertEmbedder
from rag.evaluate.datasets.beir import load_beir
from rag.evaluate.datasets.sample import SAMPLE
from rag.evaluate.retrieval import build_collection, chunk_all
from rag.generate import Generator
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.chunk.whole import WholeChunker
from rag.models import hub
from rag.pipeline import AnswerOptions, Reader, fit_context, select_context
from rag.prompt import PromptTemplate, render
from rag.retrieve.search import Dense, Search
from rag.runtime.options import Count, Filled, Seed, check_fields
from rag.types import Context, Document, Message, UserError

_ANOTHER_QUESTION = "What is this about?"


@dataclass(frozen=True)
class QuestionSet:
    """Where the questions come from and what a prompt is made of."""

    prompt: PromptTemplate
    path: Filled | None = None  # a folder in the layout of BEIR, with answers; None: the sample set
    context: ContextOptions = ContextOptions(order="reverse", max_tokens=1536)
    k: Count = 3  # passages of a prompt
    # documents of one title are joined and cut into passages of about so many tokens; None: each is one passage
    passage_tokens: Count | None = 300
    embedder: Filled = hub.DEFAULT_EMBEDDER
    seed: Seed = 0  # of the questions' order

    def __post_init__(self) -> None:
        check_fields(self)

    def load(self) -> tuple[Search, list[str]]:
        """A search over the passages, and the questions with a gold answer in random order."""
        dataset = load_beir(SAMPLE if self.path is None else self.path)
        embedder, chunker = BertEmbedder(self.embedder), WholeChunker()
        if self.passage_tokens is not None:
            dataset = replace(dataset, corpus=joined(dataset.corpus))
            chunker = SentenceChunker(self.passage_tokens)
        collection = build_collection(dataset, chunk_all(dataset, chunker, embedder), embedder)
        asked = [text for query, text in dataset.queries.items() if dataset.answers.get(query)]
        order = np.random.default_rng(self.seed).permutation(len(asked)).tolist()
        return Search(collection, Dense(), self.k), [asked[i] for i in order]

    def reader(self, generator: Generator, new_tokens: int, stop: Sequence[str] = ()) -> Reader:
        """The stages that answer with this generator."""
        return Reader(
            generator, self.prompt, self.context, options=AnswerOptions(new_tokens, stop=tuple(stop))
        )


def joined(documents: Sequence[Document]) -> tuple[Document, ...]:
    """Neighbours of one title as one document, so that passages of any length can be cut from it."""
    found = []
    for title, group in groupby(documents, key=lambda document: document.title or document.id):
        members = list(group)
        text = "\n\n".join(document.text for document in members)
        found.append(Document(members[0].id, members[0].path, text, title))
    return tuple(found)


def messages(question: str, search: Search, reader: Reader) -> list[Message]:
    """The prompt that pipeline.answer makes for the question. UserError when no passage is relevant to it."""
    return fit_context(question, _context(question, search, reader), reader)[0]


def another_use(question: str, search: Search, reader: Reader) -> list[Message]:
    """A prompt with the same passages and markers in another order, and another question.

    What a generator keeps of passages, as at ingest, is kept once it has read this; what it keeps of whole prompts
    serves the question's own no further than up to the first passage.
    """
    context = _context(question, search, reader)
    turned = replace(context, sources=context.sources[1:] + context.sources[:1])
    return render(reader.template, _ANOTHER_QUESTION, turned)


def _context(question: str, search: Search, reader: Reader) -> Context:
    document_text = search.collection.index.document_text
    context = select_context(search(question), document_text, search.score_threshold, reader)
    if not context.sources:
        raise UserError(f"no passage is relevant to {question!r}: set bench.questions.context.min_score=null")
    return context
