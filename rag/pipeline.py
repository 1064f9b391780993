"""Compose the stages: `ingest` makes an index of a folder of files, `answer` answers a question from an index."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from rag.citations import KnownCitations, cited, locate
from rag.context import ContextOptions, build_context, trim
from rag.embed import Embedder
from rag.embed.encode import encode_passages
from rag.embed.vector_cache import CachedEmbedder, cached
from rag.generate import Generator, Request
from rag.index import store
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.writer import check_writable, tidy, write_index
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.split import chunks_of
from rag.ingest.load.folder import LoadOptions, Skipped, load_folder
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate, render, render_passage
from rag.retrieve.dependencies import dependencies_of
from rag.retrieve.search import Search
from rag.runtime.machine.clock import Clock
from rag.runtime.options import Count, Filled, Seed, check_fields
from rag.types import (
    Answer,
    Chunk,
    Context,
    Document,
    Hit,
    Message,
    Source,
    Timings,
    Usage,
    UserError,
    chunk_at,
)

PostingsChange = Literal["none", "built", "extended", "unchanged"]  # what became of the postings
Progress = Callable[[str, int, int], None]  # the stage, how many items are done, how many there are


@dataclass(frozen=True, slots=True)
class IngestReport:
    """The result of ingesting a folder."""

    documents: int  # in the index now
    chunks: int  # in the index now
    tokens: int  # of the chunks made in this run, overlaps counted twice, by the embedder's tokenizer
    embedded: int  # texts that the embedder computed; the other chunks' vectors were cached
    seconds: float
    skipped: tuple[Skipped, ...]
    added: int  # documents that the index did not have
    replaced: int  # documents that it had with another text
    postings: PostingsChange


def ingest(
    corpus: Path,
    index: Path,
    chunker: Chunker,
    embedder: Embedder,
    analyzer: Analyzer | None = None,
    progress: Progress = lambda *_: None,
    *,
    add: bool = False,
    load: LoadOptions = LoadOptions(),
) -> IngestReport:
    """Load, chunk and embed a folder of files and write its index, replacing an index that is there in one step.

    Args:
        corpus: the folder of files.
        index: the folder of the index.
        chunker: splits the documents.
        embedder: makes the vectors.
        analyzer: stores postings with the index, so that lexical search need not build them; None stores none.
        progress: is called after each item of a stage.
        add: add to the index that is there: its documents stay, in their order, and those of the folder that are new,
            or have another text under the same id, follow. Where there is no index yet, one is made.
        load: which files are loaded.

    Raises:
        UserError: when the folder is missing or has no readable file, and when `index` is a folder of something else;
            with `add` also when another embedder or chunker made the index.
    """
    begin = time.perf_counter()
    check_writable(index)
    old = _opened(index, chunker, embedder) if add and store.exists(index) else None
    embedder = cached(embedder)
    loaded, skipped = _load(corpus, load, progress)
    reused = _Reused() if old is None else _Reused.of(old, loaded)
    known = {document.id for document in reused.documents}
    new = [document for document in loaded if document.id not in known]
    documents = [*reused.documents, *new]
    chunks = [*reused.chunks, *_chunk(new, chunker, embedder, progress)]
    made = [chunk.text for chunk in chunks[len(reused.chunks) :]]
    computed = 0
    postings: PostingsChange = "none" if analyzer is None else "unchanged"
    if old is None or new or reused.analyzer != analyzer:
        vectors, fitted, computed = _vectors(reused, chunks, embedder, progress)
        lexical, postings = _postings(reused, chunks, analyzer, progress)
        base = None if not add else "" if old is None else old.manifest.segment
        if old is not None:
            old.close()
        write_index(index, documents, chunks, vectors, fitted, {"chunker": repr(chunker)}, lexical, base)
    else:
        tidy(index)
    return IngestReport(
        documents=len(documents),
        chunks=len(chunks),
        tokens=sum(len(embedder.token_spans(text)) for text in made),
        embedded=computed,
        seconds=time.perf_counter() - begin,
        skipped=skipped,
        added=len(new) - reused.replaced,
        replaced=reused.replaced,
        postings=postings,
    )


def _opened(index: Path, chunker: Chunker, embedder: Embedder) -> store.Index:
    """Open the index. Raises UserError where another chunker or embedder made it."""
    old = store.Index.open(index)
    old.check_embedder(embedder)
    old.check()  # otherwise damaged data would be written again, under new checksums
    cut_by = old.manifest.settings.get("chunker")
    if cut_by != repr(chunker):
        raise UserError(
            f"The documents of the index at {index} were cut by {cut_by}, not by {chunker!r}: choose that chunker, "
            "or ingest all of them again without index.add."
        )
    return old


@dataclass(frozen=True)
class _Reused:
    """The parts of an index that stay when a folder is added to it; nothing for a new index."""

    documents: Sequence[Document] = ()
    chunks: Sequence[Chunk] = ()
    vectors: Float32[np.ndarray, "N E"] | None = None
    lexical: LexicalIndex | None = None  # of all the index's chunks
    replaced: int = 0  # documents of the index that do not stay

    @property
    def analyzer(self) -> Analyzer | None:
        return None if self.lexical is None else self.lexical.analyzer

    @staticmethod
    def of(old: store.Index, loaded: Sequence[Document]) -> "_Reused":
        """Return all documents of the index except those that were loaded with the same id and another text."""
        latest, before = {document.id: document for document in loaded}, old.all_documents()
        stays = np.array([latest.get(document.id, document) == document for document in before], bool)
        documents = [document for document, same in zip(before, stays, strict=True) if same]
        spans = old.spans
        rows = np.flatnonzero(stays[spans[:, 0]])
        chunks = [chunk_at(before[document], start, end) for document, start, end in spans[rows].tolist()]
        replaced = len(before) - len(documents)
        return _Reused(documents, chunks, old.vectors[rows], old.lexical, replaced)


def _load(
    corpus: Path, options: LoadOptions, progress: Progress
) -> tuple[list[Document], tuple[Skipped, ...]]:
    documents: list[Document] = []
    skipped: list[Skipped] = []
    for item in load_folder(corpus, options=options):
        if isinstance(item, Document):
            documents.append(item)
        else:
            skipped.append(item)
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


def _vectors(
    reused: _Reused, chunks: Sequence[Chunk], embedder: Embedder, progress: Progress
) -> tuple[Float32[np.ndarray, "N E"], Embedder, int]:
    """Return the chunks' vectors, the embedder fitted to them, and how many texts had to be computed."""
    texts = [chunk.text for chunk in chunks]
    fitted = embedder.fit(texts)
    reused_vectors = reused.vectors if fitted is embedder else None  # a fit changes all vectors
    todo = texts if reused_vectors is None else texts[len(reused_vectors) :]
    computed = fitted.missing(todo) if isinstance(fitted, CachedEmbedder) else len(set(todo))
    vectors = encode_passages(fitted, todo, lambda done: progress("embed", done, len(todo)))
    if reused_vectors is not None:
        vectors = np.concatenate([reused_vectors, vectors])
    return vectors, fitted, computed


def _postings(
    reused: _Reused, chunks: Sequence[Chunk], analyzer: Analyzer | None, progress: Progress
) -> tuple[LexicalIndex | None, PostingsChange]:
    """Return the chunks' postings. Passages can be added to old postings, but not removed."""
    if analyzer is None:
        return None, "none"
    extends = reused.analyzer == analyzer and not reused.replaced
    old = reused.lexical if extends else None
    lexical = LexicalIndex.build([], analyzer) if old is None else old
    texts = [chunk.text for chunk in chunks[len(lexical) :]]
    lexical.add(texts, lambda done: progress("words", done, len(texts)))
    return lexical, "built" if old is None else "extended"


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, how it is sampled, and where it ends."""

    max_new_tokens: Count = 128
    seed: Seed = 0  # of sampling; greedy decoding does not use it
    stop: Sequence[Filled] = ()  # the answer ends before the first of these
    # End before a sentence that the answer already has and before a line that begins like one of the prompt's own
    # ("Question:"), and leave out citation marks of passages that the prompt does not have.
    clean_up: bool = True

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True)
class Reader:
    """The stages that make an answer of hits."""

    generator: Generator
    template: PromptTemplate = PromptTemplate()
    context: ContextOptions = ContextOptions()
    sampling: Sampling = Sampling()
    options: AnswerOptions = AnswerOptions()

    def request(self, messages: Sequence[Message]) -> Request:
        """Return the request to answer a prompt made from the template."""
        options, clean_up = self.options, self.options.clean_up
        labels = [f"\n{label}" for label in self.template.labels] if clean_up else []
        stop = (*options.stop, *labels)
        return Request(messages, self.sampling, options.max_new_tokens, options.seed, stop, clean_up)

    @property
    def checks_citations(self) -> bool:
        """Return whether marks such as [4] are citations, and those of no passage are left out."""
        return self.options.clean_up and "{n}" in self.template.passage


def answer(
    question: str, search: Search, reader: Reader, search_text: str | None = None
) -> Iterator[str | Answer]:
    """Yield the answer's text piece by piece as it is decoded, then the whole Answer.

    When no hit reaches the context's min_score, the template's `abstain_answer` is the answer and the model is not
    asked. A prompt that is too long loses its least relevant passages; a notice says so.

    Args:
        question: as the user asks it.
        search: finds passages.
        reader: makes an answer of them.
        search_text: what passages are searched for, such as the question and earlier ones; None: the question.

    Raises:
        UserError: when not even one passage fits beside the question.
    """
    generator, template = reader.generator, reader.template
    search_text = search_text or question
    _ = generator.context_length  # loads the weights, which is not part of retrieval
    begin = Clock.now()
    hits = search(search_text)
    document_text = search.collection.index.document_text
    context = select_context(hits, document_text, search.score_threshold, reader)
    retrieval = Clock.now() - begin
    truncated = tuple(_truncated_question(question, search_text, search))
    if not context.sources:
        yield template.abstain_answer
        timings = Timings(retrieval.working, 0.0, 0.0, 0, 0, retrieval.compiling)
        yield Answer(question, template.abstain_answer, True, (), timings, notices=truncated)
        return
    messages, shown, notices = fit_context(question, context, reader)
    pieces: list[str] = []
    usage = Usage(0, 0, 0.0, 0.0)
    citations = KnownCitations(shown) if reader.checks_citations else None
    for piece in generator.stream(reader.request(messages)):
        if isinstance(piece, Usage):
            usage, text = piece, citations.finish() if citations else ""
        else:
            text = citations.push(piece) if citations else piece
        if text:
            pieces.append(text)
            yield text
    seconds = (retrieval.working, usage.prefill_s, usage.decode_s)
    prepare_s = retrieval.compiling + usage.prepare_s
    timings = Timings(*seconds, usage.prompt_tokens, usage.new_tokens, prepare_s)
    text = "".join(pieces).strip()
    marked = cited(text, shown)
    sources = tuple(locate(source, document_text(source.document_id)) for source in shown.sources)
    notices = (*truncated, *notices, *usage.notices)
    yield Answer(
        question, text, template.abstains(text), sources, timings, marked, notices, usage.finish_reason
    )


def _truncated_question(question: str, search_text: str, search: Search) -> Iterator[str]:
    """Yield a notice if the embedder cuts the text; an embedder says by `max_query_tokens` that it may."""
    embedder = search.collection.embedder
    limit = getattr(embedder, "max_query_tokens", None)
    if limit is not None and "embedder" in dependencies_of(search.method):
        tokens = len(embedder.token_spans(search_text))
        if tokens > limit:
            text = "The question" if search_text == question else "The question with the earlier ones"
            yield f"{text} has {tokens:,} tokens, of which the embedder reads the first {limit}."


def select_context(
    hits: Sequence[Hit], document_text: Callable[[str], str], score_threshold: float | None, reader: Reader
) -> Context:
    """Return the passages to show, none when no hit is relevant.

    Args:
        hits: in any order.
        document_text: returns the text of a document by its id.
        score_threshold: replaces min_score "auto".
        reader: the stages that show and count passages.
    """
    options = reader.context
    if options.min_score == "auto":
        options = replace(options, min_score=score_threshold)
    return build_context(
        hits, document_text, options, reader.generator.count, partial(_shown, reader.template)
    )


def _shown(template: PromptTemplate, source: Source) -> str:
    """Return a source as it is in the prompt, to count its tokens."""
    return render_passage(template, source) + template.separator


def fit_context(
    question: str, context: Context, reader: Reader
) -> tuple[list[Message], Context, tuple[str, ...]]:
    """Make the prompt, without the passages for which there is no space beside the answer.

    Args:
        question: as the user asks it.
        context: the passages to show.
        reader: the stages that make an answer.

    Returns:
        The messages, the context that they show, and notices of what was left out.

    Raises:
        UserError: when not even one passage fits beside the question.
    """
    generator, template = reader.generator, reader.template
    longest = generator.context_length - reader.options.max_new_tokens
    shown = context
    while True:
        messages = render(template, question, shown)
        excess = generator.prompt_tokens(messages) - longest
        if excess <= 0 and shown.sources:
            return messages, shown, tuple(_notices(context, shown))
        if not shown.sources:
            raise UserError(
                f"the question leaves no room for a passage in a context of {generator.context_length} tokens with "
                f"{reader.options.max_new_tokens} to answer in; shorten it, or lower answer.max_new_tokens"
            )
        shown = trim(shown, max(0, shown.tokens - excess), generator.count, partial(_shown, template))


def _notices(context: Context, shown: Context) -> Iterator[str]:
    if shown.dropped > context.dropped:
        yield (
            f"The prompt was longer than the model's context: {len(shown.sources)} of {len(context.sources)} "
            f"passages are shown, {shown.tokens} tokens of {context.tokens}."
        )
