"""Context ablation: the same questions answered under conditions that differ in the passages of the prompt.

    closed_book  no passage at all: what the model knows by itself
    oracle       passages of the relevant documents, none but those: the best that the reader can do
    random       as many passages of other documents: the effect of a prompt's mere length
    retrieved    the k best of the retriever: the system itself
    shuffled     those in a random order: the effect of the order
    placed       the best relevant passage at the rank `place` among irrelevant ones of the retriever: the effect of its
                 place (Liu et al. 2023, arXiv:2307.03172); context=score shows passages in the order of their ranks

rag.evaluate.error_breakdown compares `oracle` and `retrieved`.
"""

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import numpy as np
from annotated_types import DocInfo, Predicate
from jaxtyping import Int

from rag.citations import KnownCitations, cited
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import GOLD_METRICS
from rag.evaluate.retrieval import without_own_document
from rag.generate import scorer_of
from rag.ops.sampling import Sampling
from rag.pipeline import AnswerOptions, Reader, fit_context, select_context
from rag.prompt import PromptTemplate, render
from rag.retrieve.collection import Collection
from rag.runtime.options import Count, Seed, check_fields
from rag.runtime.stages import wrong_result
from rag.types import Chunk, Context, Hit, Message, UserError

Span = tuple[str, int, int]  # document id, characters from and to, the end exclusive
Condition = Literal["closed_book", "oracle", "random", "retrieved", "shuffled", "placed"]
CONDITIONS: tuple[Condition, ...] = get_args(Condition)

_COVERED = (
    0.9  # share of a span that counts as all of it: adjoining chunks leave out the white space between them
)
_BATCH = 16  # questions answered together, and lost together when the process is killed


def is_gold_metric(name: str) -> bool:
    """Return whether a metric compares an answer with gold answers."""
    return name in GOLD_METRICS


GoldMetric = Annotated[
    str, Predicate(is_gold_metric), DocInfo(f"{', '.join(GOLD_METRICS[:-1])} or {GOLD_METRICS[-1]}")
]


@dataclass(frozen=True)
class ContextAblation:
    """The conditions under which questions are answered, and what is computed beside the answers."""

    conditions: Sequence[Condition] = ()  # none: retrieval is evaluated alone
    likelihood: Sequence[Condition] = ("closed_book", "retrieved")  # of these: score the gold answer too
    measure: GoldMetric = "F1"  # of the error breakdown
    k: Count = 3  # passages in a prompt
    place: Count = 1  # rank of the relevant passage under "placed", the last one if there are fewer
    seed: Seed = 0  # of the random passages and the shuffling

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True)
class AblationInputs:
    """Everything that the conditions have in common.

    Attributes:
        collection: The passages, with the models and the cache.
        dataset: Questions, judgements and evidence.
        score_threshold: The value of the context's min_score "auto"; it applies to retrieved passages.
        reader: Generator, prompt with passages, and options of context and answer.
        closed_book: The prompt without passages.
        ablation: The conditions.
    """

    collection: Collection
    dataset: Dataset
    score_threshold: float | None
    reader: Reader
    closed_book: PromptTemplate
    ablation: ContextAblation


@dataclass(frozen=True, slots=True)
class Reply:
    """One question answered under one condition."""

    query: str
    condition: Condition
    answer: str
    abstained: bool  # the model said so, or was not asked: nothing was found, or the question was too long
    fits: bool  # the question leaves room for a passage in the model's context
    sources: tuple[str, ...]  # document ids of the prompt's passages, in prompt order
    cited: tuple[str, ...]  # document ids of the sources that the answer cites
    prompt_tokens: int
    new_tokens: int
    found: bool  # something relevant is among the passages for the prompt ...
    shown: bool  # ... and in the prompt
    log_likelihood: float | None  # of the first gold answer, natural logarithm; None where not asked for


@dataclass(frozen=True, slots=True)
class _Prompt:
    """The prompt of one question; without messages where nothing relevant was found."""

    query: str
    messages: tuple[Message, ...]
    context: Context
    hits: tuple[Hit, ...]
    fits: bool = True


@dataclass(frozen=True)
class _AnswerSettings:
    """The options that answers depend on, for their cache key."""

    sampling: Sampling
    options: AnswerOptions
    labels: tuple[str, ...]  # of the prompt; an answer may end before a line that begins with one

    depends_on: ClassVar[tuple[str, ...]] = ("generator",)


@dataclass(frozen=True)
class _LikelihoodSettings:
    """The options that likelihoods depend on, for their cache key."""

    depends_on: ClassVar[tuple[str, ...]] = ("generator",)


def answer_all(inputs: AblationInputs, found: Mapping[str, Sequence[Hit]]) -> Iterator[Reply]:
    """Answer every question of `found` (query id -> hits), the unanswerable ones too, under every condition."""
    for condition in inputs.ablation.conditions:
        prompts = [_prompt(inputs, condition, query, hits) for query, hits in found.items()]
        template = inputs.closed_book if condition == "closed_book" else inputs.reader.template
        answers = _answers(inputs, replace(inputs.reader, template=template), prompts)
        scores = _likelihoods(inputs, prompts) if condition in inputs.ablation.likelihood else {}
        for prompt in prompts:
            text, score = answers.get(prompt.query), scores.get(prompt.query)
            yield _reply(inputs, condition, prompt, text, score)


def _prompt(inputs: AblationInputs, condition: Condition, query: str, hits: Sequence[Hit]) -> _Prompt:
    reader, ablation = inputs.reader, inputs.ablation
    question = inputs.dataset.question(query)
    if condition == "closed_book":
        nothing = Context((), 0)
        messages = tuple(render(inputs.closed_book, question, nothing))
        room = reader.generator.context_length - reader.options.max_new_tokens
        fits = reader.generator.prompt_tokens(messages) <= room
        return _Prompt(query, messages if fits else (), nothing, (), fits)
    chosen = passages(condition, inputs.collection, inputs.dataset, query, hits, ablation)
    threshold = inputs.score_threshold if reader.context.min_score == "auto" else reader.context.min_score
    if condition in ("retrieved", "shuffled") and threshold is not None:
        chosen = [hit for hit in chosen if hit.score >= threshold]
    if condition == "shuffled":
        chosen = _shuffled(chosen, query, ablation.seed)
    reader = replace(
        reader, context=replace(reader.context, min_score=None)
    )  # the threshold was applied above
    context = select_context(chosen, inputs.collection.index.document_text, None, reader)
    if not context.sources:
        return _Prompt(query, (), context, tuple(chosen))
    try:
        rendered, shown, _ = fit_context(question, context, reader)
    except UserError:  # the summary warns of it: one long question is no reason to lose the others
        return _Prompt(query, (), Context((), 0), tuple(chosen), fits=False)
    return _Prompt(query, tuple(rendered), shown, tuple(chosen))


def passages(
    condition: Condition,
    collection: Collection,
    dataset: Dataset,
    query: str,
    hits: Sequence[Hit],
    ablation: ContextAblation,
) -> list[Hit]:
    """Return the passages that a condition chooses for the prompt, best first.

    Args:
        condition: The condition.
        collection: All passages.
        dataset: Judgements and evidence, which "oracle" and "random" depend on.
        query: The query's id.
        hits: The retriever's results for it, best first.
        ablation: How many passages, and the seed of the random ones.
    """
    judged = dataset.qrels.get(query, {})
    match condition:
        case "oracle":
            documents = {e.document for e in dataset.evidence.get(query, ())} or _relevant(judged)
            rows = collection.rows_of(documents)
            hits = collection.hits(rows, np.zeros(len(rows)))
            weights = [_relevance(hit.chunk, query, dataset) for hit in hits]
            useful = [(weight, hit) for weight, hit in zip(weights, hits, strict=True) if weight > 0]
            best = sorted(useful, key=lambda pair: -pair[0])[: ablation.k]
            return [replace(hit, score=1.0 - i / len(best)) for i, (_, hit) in enumerate(best)]
        case "random":
            related = collection.rows_of(_relevant(judged))
            others = range(len(collection.index) - len(related))
            drawn = random.Random(f"{ablation.seed} {query}").sample(others, min(ablation.k, len(others)))
            rows = _without(related, drawn)
            return collection.hits(rows, [1.0 - i / ablation.k for i in range(len(rows))])
        case "placed":
            relevant = passages("oracle", collection, dataset, query, hits, ablation)[:1]
            found = without_own_document(hits, query, dataset)
            irrelevant = [hit for hit in found if not _relevance(hit.chunk, query, dataset)]
            place = min(ablation.place, ablation.k) - 1
            ranked = [*irrelevant[:place], *relevant, *irrelevant[place:]][: ablation.k]
            return [replace(hit, score=1.0 - i / len(ranked)) for i, hit in enumerate(ranked)]
        case _:
            return without_own_document(hits, query, dataset)[: ablation.k]


def _relevant(judged: Mapping[str, int]) -> set[str]:
    """Return the documents with a grade above 0."""
    return {document for document, grade in judged.items() if grade > 0}


def _without(left_out: Int[np.ndarray, "n"], positions: Sequence[int]) -> Int[np.ndarray, "k"]:
    """Return the rows at these positions among all rows but those left out, which ascend."""
    wanted = np.array(positions, np.int64)
    return wanted + np.searchsorted(left_out - np.arange(len(left_out)), wanted, side="right")


def _shuffled(hits: Sequence[Hit], query: str, seed: int) -> list[Hit]:
    """Return the same chunks with their scores exchanged at random: a context orders by score."""
    shuffled = list(hits)
    random.Random(f"{seed} {query}").shuffle(shuffled)
    return [replace(hit, score=ranked.score) for hit, ranked in zip(shuffled, hits, strict=True)]


def _relevance(chunk: Chunk, query: str, dataset: Dataset) -> int:
    """Return the characters of evidence in a chunk; without evidence, its document's grade; 0 is irrelevant."""
    if spans := dataset.evidence.get(query):
        shared = (
            min(e.end, chunk.end) - max(e.start, chunk.start)
            for e in spans
            if e.document == chunk.document_id
        )
        return max(0, *shared, 0)
    return max(0, dataset.qrels.get(query, {}).get(chunk.document_id, 0))


def _cover_one(spans: Sequence[Span], wanted: Sequence[Span]) -> bool:
    """Return whether at least one of the wanted spans is, nearly whole, in the union of `spans`."""

    def covered(document: str, start: int, end: int) -> int:
        inside = sorted((max(a, start), min(b, end)) for name, a, b in spans if name == document)
        total, reached = 0, start
        for a, b in inside:
            total += max(0, b - max(a, reached))
            reached = max(reached, b)
        return total

    return any(covered(*span) >= _COVERED * (span[2] - span[1]) for span in wanted)


def _wanted(prompt: _Prompt, dataset: Dataset) -> list[Span]:
    """Return the evidence for a question; without evidence, the chosen passages that are relevant."""
    if spans := dataset.evidence.get(prompt.query):
        return [(e.document, e.start, e.end) for e in spans]
    chunks = [hit.chunk for hit in prompt.hits]
    return [(c.document_id, c.start, c.end) for c in chunks if _relevance(c, prompt.query, dataset)]


def _answers(inputs: AblationInputs, reader: Reader, prompts: Sequence[_Prompt]) -> dict[str, str]:
    """Return query id -> answer, of the prompts with messages, which are made from the reader's template."""
    asking = [prompt for prompt in prompts if prompt.messages]

    def compute(items: Sequence[Any]) -> list[str]:
        requests = [reader.request(_messages(item)) for item in items]
        generator = inputs.collection.generator
        texts = generator.generate(requests)
        if not isinstance(texts, list) or len(texts) != len(requests):
            raise wrong_result(generator, "generate", texts, f"a list of {len(requests)} texts")
        return texts

    items = [_plain(prompt.messages) for prompt in asking]
    settings = _AnswerSettings(reader.sampling, reader.options, reader.template.labels)
    texts = inputs.collection.cached_map("answer", settings, items, compute, batch=_BATCH, passages=False)
    answers = {}
    for prompt, text in zip(asking, texts, strict=True):
        if text and reader.checks_citations:
            citations = KnownCitations(prompt.context)
            text = citations.push(text) + citations.finish()
        answers[prompt.query] = (text or "").strip()
    return answers


def _likelihoods(inputs: AblationInputs, prompts: Sequence[_Prompt]) -> dict[str, float | None]:
    """Return query id -> log p(first gold answer | prompt)."""
    answers = inputs.dataset.answers
    asking = [prompt for prompt in prompts if prompt.messages and answers.get(prompt.query)]

    def compute(items: Sequence[Any]) -> list[float]:
        pairs = [(_messages(messages), gold) for messages, gold in items]
        return [score.total for score in scorer_of(inputs.collection.generator).log_likelihood(pairs)]

    items = [[_plain(prompt.messages), answers[prompt.query][0]] for prompt in asking]
    scores = inputs.collection.cached_map(
        "likelihood", _LikelihoodSettings(), items, compute, batch=_BATCH, passages=False
    )
    return {prompt.query: score for prompt, score in zip(asking, scores, strict=True)}


def _plain(messages: Sequence[Message]) -> list[tuple]:
    """Return a conversation as values that JSON can hold."""
    return [(message.role, message.content, message.reusable, message.fixed) for message in messages]


def _messages(plain: Sequence[Sequence]) -> list[Message]:
    """Return the conversation that _plain was given."""
    return [
        Message(role, text, tuple((start, end) for start, end in spans), fixed)
        for role, text, spans, fixed in plain
    ]


def _reply(
    inputs: AblationInputs, condition: Condition, prompt: _Prompt, text: str | None, score: float | None
) -> Reply:
    reader = inputs.reader
    template = inputs.closed_book if condition == "closed_book" else reader.template
    names = {hit.chunk.path: hit.chunk.document_id for hit in prompt.hits}
    sources = prompt.context.sources
    marked = set(cited(text or "", prompt.context))
    wanted = _wanted(prompt, inputs.dataset)
    chosen = [(hit.chunk.document_id, hit.chunk.start, hit.chunk.end) for hit in prompt.hits]
    return Reply(
        query=prompt.query,
        condition=condition,
        answer=reader.template.abstain_answer if text is None else text,
        abstained=text is None or template.abstains(text),
        fits=prompt.fits,
        sources=tuple(names[source.path] for source in sources),
        cited=tuple(dict.fromkeys(names[source.path] for source in sources if source.n in marked)),
        prompt_tokens=reader.generator.prompt_tokens(prompt.messages) if prompt.messages else 0,
        new_tokens=0 if text is None else reader.generator.count(text),
        found=_cover_one(chosen, wanted),
        shown=_cover_one([(names[source.path], source.start, source.end) for source in sources], wanted),
        log_likelihood=score,
    )
