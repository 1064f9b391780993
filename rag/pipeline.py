"""The two sides of the laboratory, composed of its stages: `ingest` writes an index, `answer` reads from it."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float32

from rag.context import ContextOptions, build_context, cited, trim
from rag.embed import Embedder
from rag.embed.vector_cache import CachedEmbedder, cached
from rag.generate import Generator
from rag.index import store
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.writer import check_writable, tidy, write_index
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.split import chunks_of
from rag.ingest.load import LoadOptions, Skipped, load_folder
from rag.ops.sampling import Sampling
from rag.prompt import PromptTemplate, render, render_passage
from rag.retrieve.search import Search
from rag.runtime.clock import Clock
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

Progress = Callable[[str, int, int], None]  # stage, done, of how many


@dataclass(frozen=True, slots=True)
class IngestReport:
    """What ingesting a folder came to."""

    documents: int  # in the index now
    chunks: int  # in the index now
    tokens: int  # of the chunks made in this run, overlaps counted twice, by the embedder's tokenizer
    embedded: int  # texts that went through the embedder; the other chunks' vectors were known
    seconds: float
    skipped: tuple[Skipped, ...]
    added: int  # documents that the index did not have
    replaced: int  # documents that it had with another text
    postings: Literal["none", "built", "extended", "kept"]


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
    """Load, chunk and embed a folder of files and write its index, replacing one that is there in one step.

    With an `analyzer` the index keeps postings too, which searches by words then need not build. With `add` the
    index keeps its documents, in their order, and those of the folder that it does not have, or has under the
    same id with another text, follow; where there is no index yet, one is made.

    Raises UserError when the folder is missing or holds nothing readable, and when `index` is a folder of
    something else; with `add` also when another embedder or chunker made the index.
    """
    begin = time.perf_counter()
    check_writable(index)
    old = _opened(index, chunker, embedder) if add and store.exists(index) else None
    embedder = cached(embedder)
    loaded, skipped = _load(corpus, load, progress)
    kept = _CachedStages() if old is None else _CachedStages.of(old, loaded)
    known = {document.id for document in kept.documents}
    new = [document for document in loaded if document.id not in known]
    documents = [*kept.documents, *new]
    chunks = [*kept.chunks, *_chunk(new, chunker, embedder, progress)]
    made = [chunk.text for chunk in chunks[len(kept.chunks) :]]
    computed, postings = 0, "none" if analyzer is None else "kept"
    if old is None or new or kept.analyzer != analyzer:
        vectors, fitted, computed = _vectors(kept, chunks, embedder, progress)
        lexical, postings = _postings(kept, chunks, analyzer, progress)
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
        added=len(new) - kept.replaced,
        replaced=kept.replaced,
        postings=postings,
    )


def _opened(index: Path, chunker: Chunker, embedder: Embedder) -> store.Index:
    """The index, if these two made it."""
    old = store.Index.open(index)
    old.check_embedder(embedder)
    old.check()  # or what is damaged would be written again, under new checksums
    cut_by = old.manifest.settings.get("chunker")
    if cut_by != repr(chunker):
        raise UserError(
            f"The documents of the index at {index} were cut by {cut_by}, not by {chunker!r}: choose that chunker, "
            "or ingest all of them again without index.add."
        )
    return old


@dataclass(frozen=True)
class _CachedStages:
    """What stays of an index that a folder is added to; nothing, where it begins anew."""

    documents: Sequence[Document] = ()
    chunks: Sequence[Chunk] = ()
    vectors: Float32[np.ndarray, "N E"] | None = None
    lexical: LexicalIndex | None = None  # of all the index's chunks
    replaced: int = 0  # documents that do not stay

    @property
    def analyzer(self) -> Analyzer | None:
        return None if self.lexical is None else self.lexical.analyzer

    @staticmethod
    def of(old: store.Index, coming: Sequence[Document]) -> "_CachedStages":
        """All documents but those that come with the same id and are not the same."""
        latest, before = {document.id: document for document in coming}, old.all_documents()
        stays = np.array([latest.get(document.id, document) == document for document in before], bool)
        documents = [document for document, same in zip(before, stays, strict=True) if same]
        spans = old.spans()
        rows = np.flatnonzero(stays[spans[:, 0]])
        chunks = [chunk_at(before[place], start, end) for place, start, end in spans[rows].tolist()]
        replaced = len(before) - len(documents)
        return _CachedStages(documents, chunks, old.vectors[rows], old.lexical, replaced)


def _load(
    corpus: Path, options: LoadOptions, progress: Progress
) -> tuple[list[Document], tuple[Skipped, ...]]:
    documents, skipped = [], []
    for item in load_folder(corpus, options=options):
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


def _vectors(
    kept: _CachedStages, chunks: Sequence[Chunk], embedder: Embedder, progress: Progress
) -> tuple[Float32[np.ndarray, "N E"], Embedder, int]:
    """The chunks' vectors, the embedder made ready for them, and how many texts had to be computed."""
    texts = [chunk.text for chunk in chunks]
    fitted = embedder.fit(texts)
    first = (
        len(kept.chunks) if fitted is embedder else 0
    )  # what it learns changes the vectors that were there
    todo = texts[first:]
    computed = fitted.missing(todo) if isinstance(fitted, CachedEmbedder) else len(set(todo))
    vectors = fitted.encode(todo, progress=lambda done: progress("embed", done, len(todo)))
    return np.concatenate([kept.vectors, vectors]) if first else vectors, fitted, computed


def _postings(
    kept: _CachedStages, chunks: Sequence[Chunk], analyzer: Analyzer | None, progress: Progress
) -> tuple[LexicalIndex | None, Literal["none", "built", "extended"]]:
    """Rows can be added to postings, but not removed."""
    if analyzer is None:
        return None, "none"
    extends = kept.analyzer == analyzer and not kept.replaced
    lexical = kept.lexical if extends else LexicalIndex.build([], analyzer)
    texts = [chunk.text for chunk in chunks[len(lexical) :]]
    lexical.add(texts, lambda done: progress("words", done, len(texts)))
    return lexical, "extended" if extends else "built"


@dataclass(frozen=True)
class AnswerOptions:
    """How long an answer may be, by which draw it is written, and what ends it. UserError for what cannot be."""

    max_new_tokens: Count = 128
    seed: Seed = 0  # of sampling; greedy has no use for it
    stop: Sequence[Filled] = ()  # the answer ends before the first of these

    def __post_init__(self):
        check_fields(self)


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
    begin = Clock.now()
    hits = search(question)
    context = select_context(hits, search.collection.index.document_text, search.score_threshold, reader)
    retrieval = Clock.now() - begin
    if not context.sources:
        yield template.abstain_answer
        timings = Timings(retrieval.working, 0.0, 0.0, 0, 0, retrieval.compiling)
        yield Answer(question, template.abstain_answer, True, (), timings)
        return
    messages, shown, notices = fit_context(question, context, reader, history)
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
    seconds = (retrieval.working, usage.prefill_s, usage.decode_s)
    prepare_s = retrieval.compiling + usage.prepare_s
    timings = Timings(*seconds, usage.prompt_tokens, usage.new_tokens, prepare_s)
    text = "".join(pieces).strip()
    marked = cited(text, shown)
    yield Answer(question, text, False, shown.sources, timings, marked, (*notices, *usage.notices))


def select_context(
    hits: Sequence[Hit], document_text: Callable[[str], str], score_threshold: float | None, reader: Reader
) -> Context:
    """The passages to show for these hits, none when none is relevant; `score_threshold` is min_score "auto"."""
    options = reader.context
    if options.min_score == "auto":
        options = replace(options, min_score=score_threshold)
    return build_context(
        hits, document_text, options, reader.generator.count, partial(_shown, reader.template)
    )


def _shown(template: PromptTemplate, source: Source) -> str:
    """A source as it stands in the prompt, to count its tokens."""
    return render_passage(template, source) + template.separator


def fit_context(
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
