"""The two sides of the laboratory, composed of its stages: `ingest` writes an index, `answer` reads from it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
from jaxtyping import Float32

from rag.context import ContextOptions, build_context, cited, trim
from rag.embed import Embedder
from rag.embed_cache import CachedEmbedder
from rag.generate import Generator
from rag.index import store
from rag.index.analyzer import Analyzer
from rag.index.lexical import LexicalIndex
from rag.ingest.chunk import Chunker, chunks_of
from rag.ingest.load import Skipped, load_folder
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate, render, render_passage
from rag.retrieve.search import Search
from rag.types import Answer, Chunk, Context, Document, Hit, Message, Source, Timings, Usage, UserError

Progress = Callable[[str, int, int], None]  # stage, done, of how many


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What ingesting a folder came to."""

    documents: int
    chunks: int
    tokens: int  # of all chunks, overlaps counted twice, by the embedder's tokenizer
    embedded: int  # texts that went through the embedder; the other chunks' vectors were known
    seconds: float
    skipped: tuple[Skipped, ...]


def ingest(
    corpus: Path,
    index: Path,
    chunker: Chunker,
    embedder: Embedder,
    analyzer: Analyzer | None = None,
    progress: Progress = lambda *_: None,
) -> IngestReport:
    """Load, chunk and embed a folder of files and write its index, replacing one that is there in one step.

    With an `analyzer` the index keeps postings too, which searches by words then need not build. Raises
    UserError when the folder is missing or holds nothing readable, and when `index` is a folder of something
    else.
    """
    begin = time.perf_counter()
    store.check_writable(index)
    documents, skipped = _load(corpus, progress)
    if embedder.fit([]) is embedder:  # else a vector depends on the corpus, not on its text alone
        embedder = CachedEmbedder(embedder)
    chunks = _chunk(documents, chunker, embedder, progress)
    texts = [chunk.text for chunk in chunks]
    embedder = embedder.fit(texts)
    vectors, embedded = _embed(texts, embedder, progress)
    lexical = None if analyzer is None else _postings(texts, analyzer, progress)
    store.write(index, documents, chunks, vectors, embedder, {"chunker": repr(chunker)}, lexical)
    tokens = sum(len(embedder.token_spans(text)) for text in texts)
    seconds = time.perf_counter() - begin
    return IngestReport(len(documents), len(chunks), tokens, embedded, seconds, skipped)


def _load(corpus: Path, progress: Progress) -> tuple[list[Document], tuple[Skipped, ...]]:
    documents, skipped = [], []
    for item in load_folder(corpus):
        (documents if isinstance(item, Document) else skipped).append(item)
        progress("load", len(documents) + len(skipped), 0)
    count = len(documents) + len(skipped)
    progress("load", count, count)
    if not documents:
        reasons = "; ".join(f"{item.path}: {item.reason}" for item in skipped[:3]) or "the folder is empty"
        raise UserError(
            f"no document in {corpus} can be read ({reasons}); give a folder of txt, md or html files"
        )
    return documents, tuple(skipped)


def _chunk(
    documents: Sequence[Document], chunker: Chunker, embedder: Embedder, progress: Progress
) -> list[Chunk]:
    chunks: list[Chunk] = []
    for done, document in enumerate(documents, 1):
        chunks += chunks_of(document, chunker, embedder)
        progress("chunk", done, len(documents))
    return chunks


def _embed(
    texts: Sequence[str], embedder: Embedder, progress: Progress
) -> tuple[Float32[np.ndarray, "N E"], int]:
    """The texts' vectors, and how many texts had to be computed."""
    computed = embedder.missing(texts) if isinstance(embedder, CachedEmbedder) else len(set(texts))
    return embedder.encode(texts, progress=lambda done: progress("embed", done, len(texts))), computed


def _postings(texts: Sequence[str], analyzer: Analyzer, progress: Progress) -> LexicalIndex:
    return LexicalIndex.build(texts, analyzer, lambda done: progress("words", done, len(texts)))


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, by which draw it is written, and what ends it. UserError for what cannot be."""

    max_new_tokens: int = 128
    seed: int = 0  # of sampling; greedy has no use for it
    stop: Sequence[str] = ()  # the answer ends before the first of these

    def __post_init__(self):
        if isinstance(self.stop, str):
            raise UserError(
                f"answer.stop={self.stop} is one text: write a list, answer.stop='[\"{self.stop}\"]'"
            )
        object.__setattr__(self, "stop", tuple(self.stop))  # a YAML list must become hashable
        if self.max_new_tokens < 1:
            raise UserError(f"answer.max_new_tokens is {self.max_new_tokens}; ask for at least one token")
        if not 0 <= self.seed < 1 << 32:
            raise UserError(f"answer.seed is {self.seed}; give a number from 0 to 4294967295")


@dataclass(frozen=True)
class Reader:
    """The stages that turn hits into an answer."""

    generator: Generator
    template: PromptTemplate
    context: ContextOptions
    sampling: Sampling = Sampling()
    options: AnswerOptions = AnswerOptions()


def answer(
    question: str, search: Search, reader: Reader, history: Sequence[Message] = ()
) -> Iterator[str | Answer]:
    """Yield the answer's text piece by piece as it is decoded, then the whole Answer.

    When no hit reaches the context's min_score, the template's abstaining sentence is the answer and the
    model is not asked. A prompt that is too long loses its least relevant passages, and before the last of
    them its oldest turns; a notice says so. Raises UserError when not even one passage fits beside the question.
    """
    generator, template = reader.generator, reader.template
    _ = generator.context_length  # reads the weights, which is not retrieval
    begin = time.perf_counter()
    hits = search(question)
    context = relevant(hits, search.collection.index.document_text, search.relevant_from, reader)
    retrieve_s = time.perf_counter() - begin
    if not context.sources:
        yield template.abstain_answer
        yield Answer(question, template.abstain_answer, True, (), Timings(retrieve_s, 0.0, 0.0, 0, 0))
        return
    messages, shown, notices = fit(question, context, reader, history)
    pieces: list[str] = []
    usage = Usage(0, 0, 0.0, 0.0)
    options = reader.options
    for piece in generator.stream(
        messages, reader.sampling, options.max_new_tokens, options.seed, options.stop
    ):
        if isinstance(piece, Usage):
            usage = piece
        else:
            pieces.append(piece)
            yield piece
    timings = Timings(
        retrieve_s, usage.prefill_s, usage.decode_s, usage.prompt_tokens, usage.new_tokens, usage.prepare_s
    )
    text = "".join(pieces).strip()
    marked = cited(text, shown)
    yield Answer(question, text, False, shown.sources, timings, marked, (*notices, *usage.notices))


def relevant(
    hits: Sequence[Hit], document_text: Callable[[str], str], relevant_from: float | None, reader: Reader
) -> Context:
    """The passages to show for these hits, none when none is relevant; `relevant_from` is min_score "auto"."""
    options = reader.context
    if options.min_score == "auto":
        options = replace(options, min_score=relevant_from)
    return build_context(
        hits, document_text, options, reader.generator.count, partial(_shown, reader.template)
    )


def _shown(template: PromptTemplate, source: Source) -> str:
    """A source as it stands in the prompt, to count its tokens."""
    return render_passage(template, source) + template.separator


def fit(
    question: str, context: Context, reader: Reader, history: Sequence[Message] = ()
) -> tuple[list[Message], Context, tuple[str, ...]]:
    """Messages that leave room for an answer, the context as shown in them, and what had to go.

    Raises UserError when not even one passage fits beside the question.
    """
    generator, template = reader.generator, reader.template
    room = generator.context_length - reader.options.max_new_tokens
    shown, turns = context, tuple(history)
    while True:
        messages = render(template, question, shown, turns)
        excess = generator.prompt_tokens(messages) - room
        if excess <= 0 and shown.sources:
            return messages, shown, tuple(_notices(context, shown, len(history) - len(turns)))
        if shown.sources and (excess < shown.tokens or not turns):
            budget = max(0, shown.tokens - excess)
            shown = trim(shown, budget, generator.count, partial(_shown, template))
        elif turns:
            shown, turns = context, turns[2:]  # a question and its answer go
        else:
            raise UserError(
                f"the question leaves no room for a passage in a context of {generator.context_length} tokens with "
                f"{reader.options.max_new_tokens} to answer in; shorten it, or lower answer.max_new_tokens"
            )


def _notices(context: Context, shown: Context, forgotten: int) -> Iterator[str]:
    if shown.dropped > context.dropped:
        yield (
            f"The prompt was longer than the model's context: {len(shown.sources)} of {len(context.sources)} "
            f"passages are shown, {shown.tokens} tokens of {context.tokens}."
        )
    if forgotten:
        yield f"The oldest {forgotten} messages of the conversation no longer fit and were left out."
