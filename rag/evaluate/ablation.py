"""Where an answer's quality is lost: the same questions read under conditions that differ in the passages shown.

    closed_book  no passage at all: what the model knows by itself
    oracle       passages of the relevant documents, none but those: what the reader can do at best
    random       as many passages of other documents: what the mere length of a prompt does
    retrieved    the k best of the retriever: the system itself
    shuffled     those in a random order: how much the order matters

What `retrieved` misses of a perfect score is then split, question by question, into four parts that sum to it:
the reader's part is what even the oracle misses; the rest, oracle - retrieved, is a retrieval miss where nothing
relevant was among the k (or above the context's min_score), truncation where it was but the prompt had no room
for it, and distraction where it was shown and the answer is worse (or better) than from the oracle's passages.
Relevant is the evidence, nine tenths of a span of it; without evidence a passage of a document judged so.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import numpy as np
from jaxtyping import Int

from rag.context import cited
from rag.evaluate.datasets import Dataset
from rag.evaluate.retrieval import without_own_document
from rag.ops.sampling import Sampling
from rag.pipeline import AnswerOptions, Reader, fit_context, select_context
from rag.prompt import PromptTemplate, render
from rag.retrieve.collection import Collection
from rag.runtime.options import Count, Seed, check_fields
from rag.types import Chunk, Context, Hit, Message, UserError

Span = tuple[str, int, int]  # document id, characters from and to, the end exclusive
ContextKind = Literal["closed_book", "oracle", "random", "retrieved", "shuffled"]
CONTEXT_KINDS = get_args(ContextKind)
ERRORS = ("retrieval miss", "truncation", "distraction", "reader")
BreakdownMeasure = Literal["F1", "EM", "contains", "ROUGE-L"]  # whose best value is 1

_ENOUGH = 0.9  # of a span: chunks that adjoin leave out the white space between them
_BATCH = 16  # questions answered together: what a kill can lose


@dataclass(frozen=True)
class ContextAblation:
    """Under which conditions questions are read, and what is measured beside the answers."""

    conditions: Sequence[ContextKind] = ()  # none: retrieval is evaluated alone
    likelihood: Sequence[ContextKind] = ("closed_book", "retrieved")  # of those: score the gold answer too
    measure: BreakdownMeasure = "F1"  # that the losses are counted in
    k: Count = 3  # passages shown
    seed: Seed = 0  # of the random passages and the shuffling

    def __post_init__(self):
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Reply:
    """One question answered under one condition."""

    query: str
    condition: ContextKind
    answer: str
    abstained: bool  # no model was asked: nothing relevant was found, or the question was too long
    fits: bool  # the question leaves room for a passage in the model's context
    sources: tuple[str, ...]  # document ids of the passages shown, in prompt order
    cited: tuple[str, ...]  # document ids of the sources that the answer marks
    prompt_tokens: int
    new_tokens: int
    found: bool  # something relevant was given to the prompt ...
    shown: bool  # ... and stands in it
    log_likelihood: float | None  # of the first gold answer, natural logarithm; None where not asked for


@dataclass(frozen=True, slots=True)
class _Prompt:
    """What the model is asked for one question; no messages where nothing relevant was found."""

    query: str
    messages: tuple[Message, ...]
    context: Context
    hits: tuple[Hit, ...]
    fits: bool = True


@dataclass(frozen=True)
class _AnswerSettings:
    """What answers depend on beside the messages, as a key."""

    sampling: Sampling
    options: AnswerOptions

    uses: ClassVar[tuple[str, ...]] = ("generator",)


@dataclass(frozen=True)
class _LikelihoodSettings:
    """What likelihoods depend on beside the messages and the text, as a key."""

    uses: ClassVar[tuple[str, ...]] = ("generator",)


def answer_all(
    collection: Collection,
    dataset: Dataset,
    found: Mapping[str, Sequence[Hit]],
    score_threshold: float | None,
    reader: Reader,
    closed_book: PromptTemplate,
    ablation: ContextAblation,
) -> Iterator[Reply]:
    """Every question of `found`, the unanswerable ones too, under every condition of `reading`.

    `score_threshold` is what the context's min_score "auto" stands for; it holds for what was retrieved.
    """
    for condition in ablation.conditions:
        prompts = [
            _prompt(
                query, condition, collection, dataset, hits, score_threshold, reader, closed_book, ablation
            )
            for query, hits in found.items()
        ]
        answers = _answers(collection, prompts, reader)
        scores = _likelihoods(collection, dataset, prompts) if condition in ablation.likelihood else {}
        for prompt in prompts:
            text = answers.get(prompt.query)
            yield _reply(prompt, condition, text, scores.get(prompt.query), dataset, reader)


def _prompt(
    query: str,
    condition: ContextKind,
    collection: Collection,
    dataset: Dataset,
    hits: Sequence[Hit],
    score_threshold: float | None,
    reader: Reader,
    closed_book: PromptTemplate,
    ablation: ContextAblation,
) -> _Prompt:
    question = dataset.queries.get(query) or dataset.unjudged[query]
    if condition == "closed_book":
        nothing = Context((), 0)
        messages = tuple(render(closed_book, question, nothing, ()))
        room = reader.generator.context_length - reader.options.max_new_tokens
        fits = reader.generator.prompt_tokens(messages) <= room
        return _Prompt(query, messages if fits else (), nothing, (), fits)
    chosen = passages(condition, collection, dataset, query, hits, ablation)
    threshold = score_threshold if reader.context.min_score == "auto" else reader.context.min_score
    if condition in ("retrieved", "shuffled") and threshold is not None:
        chosen = [hit for hit in chosen if hit.score >= threshold]
    if condition == "shuffled":
        chosen = _shuffled(chosen, query, ablation.seed)
    reader = replace(reader, context=replace(reader.context, min_score=None))  # what is below it has gone
    context = select_context(chosen, collection.index.document_text, None, reader)
    if not context.sources:
        return _Prompt(query, (), context, tuple(chosen))
    try:
        messages, shown, _ = fit_context(question, context, reader)
    except UserError:  # counted and told by the job: one long question is no reason to lose the others
        return _Prompt(query, (), Context((), 0), tuple(chosen), fits=False)
    return _Prompt(query, tuple(messages), shown, tuple(chosen))


def passages(
    condition: ContextKind,
    collection: Collection,
    dataset: Dataset,
    query: str,
    hits: Sequence[Hit],
    ablation: ContextAblation,
) -> list[Hit]:
    """The passages given to the prompt under a condition, best first."""
    judged = dataset.qrels.get(query, {})
    match condition:
        case "oracle":
            documents = {e.document for e in dataset.evidence.get(query, ())} or _relevant(judged)
            chunks = collection.index.chunks(collection.rows_of(documents))
            weighed = [(_relevance(chunk, query, dataset), chunk) for chunk in chunks]
            useful = [(weight, chunk) for weight, chunk in weighed if weight > 0]
            best = sorted(useful, key=lambda pair: -pair[0])[: ablation.k]
            return [Hit(chunk, 1.0 - i / len(best)) for i, (_, chunk) in enumerate(best)]
        case "random":
            related = collection.rows_of(_relevant(judged))
            foreign = range(len(collection.index) - len(related))
            drawn = random.Random(f"{ablation.seed} {query}").sample(foreign, min(ablation.k, len(foreign)))
            chunks = collection.index.chunks(_without(related, drawn))
            return [Hit(chunk, 1.0 - i / ablation.k) for i, chunk in enumerate(chunks)]
        case _:
            return without_own_document(hits, query, dataset)[: ablation.k]


def _relevant(judged: Mapping[str, int]) -> set[str]:
    """The documents with a grade above 0."""
    return {document for document, grade in judged.items() if grade > 0}


def _without(left_out: Int[np.ndarray, "n"], places: Sequence[int]) -> Int[np.ndarray, "k"]:
    """The rows at these places among all rows but those left out, which ascend."""
    wanted = np.array(places, np.int64)
    return wanted + np.searchsorted(left_out - np.arange(len(left_out)), wanted, side="right")


def _shuffled(hits: Sequence[Hit], query: str, seed: int) -> list[Hit]:
    """The same chunks with their scores dealt out at random: a context orders by score."""
    chunks = [hit.chunk for hit in hits]
    random.Random(f"{seed} {query}").shuffle(chunks)
    return [Hit(chunk, hit.score) for chunk, hit in zip(chunks, hits, strict=True)]


def _relevance(chunk: Chunk, query: str, dataset: Dataset) -> int:
    """Characters of evidence in a chunk; without evidence, its document's grade; 0 is irrelevant."""
    if spans := dataset.evidence.get(query):
        shared = (
            min(e.end, chunk.end) - max(e.start, chunk.start)
            for e in spans
            if e.document == chunk.document_id
        )
        return max(0, *shared, 0)
    return max(0, dataset.qrels.get(query, {}).get(chunk.document_id, 0))


def _holds(spans: Sequence[Span], wanted: Sequence[Span]) -> bool:
    """Whether at least one of the wanted spans is, nearly whole, in the union of the others."""

    def covered(document: str, start: int, end: int) -> int:
        inside = sorted((max(a, start), min(b, end)) for name, a, b in spans if name == document)
        total, reached = 0, start
        for a, b in inside:
            total += max(0, b - max(a, reached))
            reached = max(reached, b)
        return total

    return any(covered(*span) >= _ENOUGH * (span[2] - span[1]) for span in wanted)


def _wanted(prompt: _Prompt, dataset: Dataset) -> list[Span]:
    """The evidence for a question; without evidence, the passages given that are relevant."""
    if spans := dataset.evidence.get(prompt.query):
        return [(e.document, e.start, e.end) for e in spans]
    chunks = [hit.chunk for hit in prompt.hits]
    return [(c.document_id, c.start, c.end) for c in chunks if _relevance(c, prompt.query, dataset)]


def _answers(collection: Collection, prompts: Sequence[_Prompt], reader: Reader) -> dict[str, str]:
    """Query id -> answer, of the prompts that ask something."""
    asking = [prompt for prompt in prompts if prompt.messages]
    options = reader.options

    def compute(items: Sequence) -> list[str]:
        conversations = [_messages(item) for item in items]
        seeds = [options.seed] * len(items)
        generate = collection.generator.generate
        return generate(conversations, reader.sampling, options.max_new_tokens, seeds, options.stop)

    items = [_plain(prompt.messages) for prompt in asking]
    meaning = _AnswerSettings(reader.sampling, options)
    texts = collection.keep("answer", meaning, items, compute, batch=_BATCH, passages=False)
    return {prompt.query: (text or "").strip() for prompt, text in zip(asking, texts, strict=True)}


def _likelihoods(
    collection: Collection, dataset: Dataset, prompts: Sequence[_Prompt]
) -> dict[str, float | None]:
    """Query id -> log p(first gold answer | prompt)."""
    asking = [prompt for prompt in prompts if prompt.messages and dataset.answers.get(prompt.query)]

    def compute(items: Sequence) -> list[float]:
        pairs = [(_messages(messages), gold) for messages, gold in items]
        return [score.total for score in collection.generator.log_likelihood(pairs)]

    items = [[_plain(prompt.messages), dataset.answers[prompt.query][0]] for prompt in asking]
    scores = collection.keep(
        "likelihood", _LikelihoodSettings(), items, compute, batch=_BATCH, passages=False
    )
    return {prompt.query: score for prompt, score in zip(asking, scores, strict=True)}


def _plain(messages: Sequence[Message]) -> list[tuple]:
    """A conversation as JSON can hold it."""
    return [(message.role, message.content, message.reusable, message.fixed) for message in messages]


def _messages(plain: Sequence[Sequence]) -> list[Message]:
    """What `_plain` was made of."""
    return [Message(role, text, tuple(map(tuple, spans)), fixed) for role, text, spans, fixed in plain]


def _reply(
    prompt: _Prompt,
    condition: ContextKind,
    text: str | None,
    score: float | None,
    dataset: Dataset,
    reader: Reader,
) -> Reply:
    names = {hit.chunk.path: hit.chunk.document_id for hit in prompt.hits}
    sources = prompt.context.sources
    marked = set(cited(text or "", prompt.context))
    wanted = _wanted(prompt, dataset)
    given = [(hit.chunk.document_id, hit.chunk.start, hit.chunk.end) for hit in prompt.hits]
    return Reply(
        query=prompt.query,
        condition=condition,
        answer=reader.template.abstain_answer if text is None else text,
        abstained=text is None,
        fits=prompt.fits,
        sources=tuple(names[source.path] for source in sources),
        cited=tuple(dict.fromkeys(names[source.path] for source in sources if source.n in marked)),
        prompt_tokens=reader.generator.prompt_tokens(prompt.messages) if prompt.messages else 0,
        new_tokens=0 if text is None else reader.generator.count(text),
        found=_holds(given, wanted),
        shown=_holds([(names[source.path], source.start, source.end) for source in sources], wanted),
        log_likelihood=score,
    )


def error_breakdown(
    replies: Sequence[Reply], scores: Mapping[tuple[str, ContextKind], float | None]
) -> dict[str, list[float]]:
    """Loss -> its part in each question that was read both with the oracle's and with the retrieved passages.

    `scores`: (query, condition) -> a measure whose best value is 1. For each question the parts sum to 1 minus the
    score of `retrieved`. Questions without a score are left out.
    """
    parts: dict[str, list[float]] = {name: [] for name in ERRORS}
    for reply in replies:
        oracle = scores.get((reply.query, "oracle"))
        retrieved = scores.get((reply.query, "retrieved"))
        if reply.condition != "retrieved" or oracle is None or retrieved is None:
            continue
        cause = "distraction" if reply.shown else "truncation" if reply.found else "retrieval miss"
        row = dict.fromkeys(ERRORS, 0.0) | {"reader": 1.0 - oracle, cause: oracle - retrieved}
        for name in ERRORS:
            parts[name].append(row[name])
    return parts
