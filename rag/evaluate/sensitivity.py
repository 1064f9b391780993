"""How much results depend on what should not matter: batch sizes, padding, number formats.

The same evaluation is done again with one setting changed at a time, and compared with the reference: the system as
it is configured, all questions searched for at once and answered in one call.

    tokens_per_batch   of the embedder: which texts run together, and how far they are padded
    search_batches     questions that are embedded and searched for together
    vector_dtypes      the vectors of passages and questions are rounded to it before the search
    answer_batches     questions that are answered together, from the reference's passages
    answer_budgets     lengths of answers at which prompts that are prefilled together end on both sides of a size of
                       cache: a short and a long prompt in one call, beside each one alone
    answer_dtypes      the arithmetic of the generator, which reads the reference's passages

A setting that is the configured one is a plain repetition. Nothing comes from kept results: no memo is used here.

Letters: N texts, E embedding dim.
"""

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache, partial
from itertools import groupby
from typing import Any, Literal, get_args

import numpy as np

from rag.embed import Embedder
from rag.evaluate import retrieval
from rag.evaluate.ablation import ContextAblation, Reply, answer_all
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import answers as answer_metrics
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.reduced_precision import ReducedPrecisionEmbedder, reduce_precision
from rag.generate import Generator
from rag.generate.local import DTYPES
from rag.generate.prefill_batches import boundary_budgets
from rag.index.memory import MemoryIndex
from rag.ingest.chunk import Chunker
from rag.pipeline import Reader
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.search import Search
from rag.runtime.options import Count, Filled, Whole, check_fields
from rag.runtime.shapes import round_up_prompt
from rag.types import Hit

Progress = Callable[[str, int, int], None]  # "reference", "lists" or "answers", how many done, of how many
Trial = tuple[str, str, Callable[[], Any]]  # axis, setting, what is to be computed

VectorDtype = Literal["float32", "bfloat16", "float16"]
ANSWER_MEASURES = ("F1", "contains")

_BATCH_AXES = ("tokens_per_batch", "search_batches", "answer_batches", "answer_budgets")
_WHOLE = 1 << 24  # tokens: more than any batch of answers has, so that it is never divided


@dataclass(frozen=True)
class SensitivityOptions:
    """What is varied, and what is compared; an empty list leaves its axis out. UserError for what cannot be."""

    k: Count = 10  # passages of a list
    questions: Count | None = None  # drawn by the dataset's seed; None: all
    measure: Filled = "nDCG@10"
    tokens_per_batch: Sequence[Count] = (64, 256, 1024, 4096)
    search_batches: Sequence[Count | Literal["all"]] = (1, 7, "all")
    vector_dtypes: Sequence[VectorDtype] = get_args(VectorDtype)
    answers: Whole = 20  # questions that are answered; 0: none
    passages: Count = 3  # shown to the generator
    answer_batches: Sequence[Count] = (1, 4, 16)
    answer_budgets: Whole = 3  # how many are tried; 0: none
    answer_dtypes: Sequence[Literal[DTYPES]] = ("float32", "bfloat16", "int8")

    def __post_init__(self):
        check_fields(self)
        retrieval_metrics.check([self.measure])

    @property
    def depth(self) -> int:
        """Documents to look for: as many as the list, the prompt and the measure need."""
        return max(self.k, self.passages, int(self.measure.partition("@")[2] or 0))


@dataclass(frozen=True)
class SystemUnderTest:
    """The system that is certified, and how to make its parts anew with one setting changed.

    A maker is None where the part does not have the setting. Without that of an embedder's batches or a generator's
    dtypes the axis is left out; without that of a generator's batches, it divides what it is given as it likes.
    """

    dataset: Dataset
    chunker: Chunker
    embedder: Embedder
    method: Retriever
    generator: Callable[[], Generator]
    reader: Callable[[Generator], Reader]
    embedder_of_batch: Callable[[int], Embedder] | None = None  # by tokens_per_batch
    generator_of_batch: Callable[[int], Generator] | None = None  # by tokens_per_batch
    generator_of_dtype: Callable[[str], Generator] | None = None


@dataclass(frozen=True, slots=True)
class MetricChange:
    """A measure under a variation against the reference; None where no query has the measure."""

    mean: float | None
    change: float | None  # of the mean
    largest: float | None  # change of a single query, without its sign

    @staticmethod
    def between(before: Sequence[float | None], after: Sequence[float | None]) -> "MetricChange":
        """Of the queries that have a value both times."""
        both = [pair for pair in zip(before, after, strict=True) if None not in pair]
        if not both:
            return MetricChange(None, None, None)
        old, new = np.array(both, np.float64).T
        return MetricChange(float(new.mean()), float((new - old).mean()), float(np.abs(new - old).max()))


@dataclass(frozen=True, slots=True)
class ListChanges:
    """The top-k lists of a variation beside the reference's."""

    axis: str
    setting: str
    lists: int
    changed: tuple[str, ...]  # ids of the queries whose list is another, if only in its order
    replaced: tuple[str, ...]  # of those, the queries whose list has other passages
    score_difference: float  # the largest, of a passage that is in both lists of a query
    movements: Mapping[str, MetricChange]  # by measure


@dataclass(frozen=True, slots=True)
class AnswerChanges:
    """The answers of a variation beside the reference's."""

    axis: str
    setting: str
    answers: int
    changed: tuple[str, ...]  # ids of the queries whose text differs
    movements: Mapping[str, MetricChange]  # by measure


@dataclass(frozen=True)
class SensitivityReport:
    """How much each variation changed."""

    variations: SensitivityOptions
    dataset: Mapping[str, Any]  # its name, fingerprint, queries
    method: str
    means: Mapping[str, float | None]  # of the reference, by measure
    lists: tuple[ListChanges, ...]
    answers: tuple[AnswerChanges, ...]
    skipped: tuple[str, ...]  # a sentence for each axis that was left out

    @property
    def verdict(self) -> str:
        """One sentence."""
        lists = _effects(self.lists, self.variations.measure)
        texts = _effects(self.answers, "F1")
        parts = [f"of {self.lists[0].lists} top-{self.variations.k} lists {lists}"] if lists else []
        parts += [f"of {self.answers[0].answers} answers {texts}"] if texts else []
        sentence = "; ".join(parts) or "nothing was varied"
        return f"{sentence[0].upper()}{sentence[1:]}."

    def summary(self) -> dict[str, Any]:
        """Plain values, ready for JSON."""
        return {"verdict": self.verdict} | asdict(self)


def _effects(rows: Sequence[ListChanges] | Sequence[AnswerChanges], measure: str) -> str:
    """How many lists or answers change with each cause, and how far the mean moves then."""
    causes: dict[str, list] = {}
    for row in rows:
        dtype = f"with {row.setting} vectors" if row.axis == "vector_dtypes" else f"in {row.setting}"
        cause = "with the batch size" if row.axis in _BATCH_AXES else dtype
        if cause != "with float32 vectors":  # which the vectors are
            causes.setdefault(cause, []).append(row)
    parts = []
    for cause, some in causes.items():
        changed = {query for row in some for query in row.changed}
        farthest = max(abs(row.movements[measure].change or 0.0) for row in some)
        moved = f" and move {measure} by up to {farthest:.4f}" if changed else ""
        parts.append(f"{len(changed)} change {cause}{moved}")
    return ", ".join(parts)


def measure_sensitivity(
    subject: SystemUnderTest,
    variations: SensitivityOptions = SensitivityOptions(),
    progress: Progress = lambda *_: None,
) -> SensitivityReport:
    """Compute the reference and every variation, and compare them.

    Raises UserError when the corpus has no text, and what the parts of the system raise.
    """
    dataset = subject.dataset.sample(variations.questions, subject.dataset.seed)
    progress("reference", 0, 1)
    reference = _Reference(replace(subject, dataset=dataset), variations)
    progress("reference", 1, 1)
    searches, unsearched = reference.searches()
    readings, unread = reference.readings()
    lists = [
        reference.list_changes(axis, setting, search())
        for axis, setting, search in _reported("lists", searches, progress)
    ]
    texts = [
        reference.answer_changes(axis, setting, *answer_again())
        for axis, setting, answer_again in _reported("answers", readings, progress)
    ]
    about = {"name": dataset.name, "fingerprint": dataset.fingerprint, "queries": len(dataset.queries)}
    rows, skipped = (tuple(lists), tuple(texts)), (*unsearched, *unread)
    return SensitivityReport(variations, about, repr(subject.method), reference.means(), *rows, skipped)


def _reported(stage: str, trials: Sequence[Trial], progress: Progress) -> Iterator[Trial]:
    for done, trial in enumerate(trials):
        progress(stage, done, len(trials))
        yield trial
        progress(stage, done + 1, len(trials))


class _Reference:
    """The system as it is configured, what it finds and answers, and how a variation is set beside it."""

    def __init__(self, subject: SystemUnderTest, variations: SensitivityOptions):
        self.subject, self.dataset, self.variations = subject, subject.dataset, variations
        self.collection = self._collection(subject.embedder)
        self.found = self._search(self.collection)
        self.replies = self._answer(subject.generator) if variations.answers else {}

    def means(self) -> dict[str, float | None]:
        """Measure -> mean."""
        columns = {self.variations.measure: self._values(self.found)} | self._scores(self.replies)
        return {name: MetricChange.between(values, values).mean for name, values in columns.items()}

    # --- lists

    def searches(self) -> tuple[list[Trial], list[str]]:
        """What is to be searched again, and a sentence for each axis that is left out."""
        subject, varied = self.subject, self.variations
        trials: list[Trial] = []
        skipped: list[str] = []
        embeds = "embedder" in subject.method.uses
        if not embeds:
            skipped.append("tokens_per_batch and vector_dtypes are left out: the method uses no vectors.")
        elif subject.embedder_of_batch is None:
            skipped.append("tokens_per_batch is left out: the embedder has no such setting.")
        else:
            for n in varied.tokens_per_batch:
                trials.append(("tokens_per_batch", str(n), partial(self._embed_again, n)))
        for n in varied.search_batches:
            size = None if n == "all" else n
            trials.append(("search_batches", str(n), partial(self._search, self.collection, size)))
        for dtype in varied.vector_dtypes if embeds else ():
            trials.append(("vector_dtypes", dtype, partial(self._round, dtype)))
        return trials, skipped

    def list_changes(self, axis: str, setting: str, found: dict[str, list[Hit]]) -> ListChanges:
        changed, replaced, farthest = [], [], 0.0
        for query in self.dataset.queries:
            old, new = (
                {hit.chunk.id: hit.score for hit in each[query][: self.variations.k]}
                for each in (self.found, found)
            )
            if list(old) != list(new):
                changed.append(query)
            if old.keys() != new.keys():
                replaced.append(query)
            farthest = max([farthest, *(abs(new[name] - old[name]) for name in old.keys() & new.keys())])
        movement = MetricChange.between(self._values(self.found), self._values(found))
        moved = {self.variations.measure: movement}
        count = len(self.dataset.queries)
        return ListChanges(axis, setting, count, tuple(changed), tuple(replaced), farthest, moved)

    def _collection(self, embedder: Embedder) -> Collection:
        chunks = retrieval.chunk_all(self.dataset, self.subject.chunker, embedder)
        return retrieval.build_collection(self.dataset, chunks, embedder, self.subject.generator)

    def _search(self, collection: Collection, batch: int | None = None) -> dict[str, list[Hit]]:
        """Query id -> hits, best first, searched for `batch` questions at a time; None: all at once."""
        found: dict[str, list[Hit]] = {}
        for some in _batches(self.dataset.queries, batch):
            part = replace(self.dataset, queries=some)
            found |= retrieval.search(collection, self.subject.method, part, self.variations.depth)
        return found

    def _embed_again(self, tokens_per_batch: int) -> dict[str, list[Hit]]:
        return self._search(self._collection(self.subject.embedder_of_batch(tokens_per_batch)))

    def _round(self, dtype: str) -> dict[str, list[Hit]]:
        chunks = self.collection.chunks()
        vectors = reduce_precision(self.collection.index.vectors, dtype)
        index = MemoryIndex(self.dataset.corpus, chunks, lambda _: vectors)
        embedder = ReducedPrecisionEmbedder(self.collection.embedder, dtype)
        return self._search(Collection(index, embedder, self.subject.generator))

    def _values(self, found: dict[str, list[Hit]]) -> list[float]:
        """The measure of each query, of the ranking of documents that an evaluation judges."""
        measure = self.variations.measure
        ranking = retrieval.documents(found, self.dataset, self.variations.depth)
        _, per_query = retrieval_metrics.evaluate(self.dataset.qrels, ranking, [measure])
        return [per_query[query][measure] for query in self.dataset.queries]

    # --- answers

    def readings(self) -> tuple[list[Trial], list[str]]:
        """What is to be answered again, and a sentence for each axis that is left out."""
        subject, varied = self.subject, self.variations
        if not varied.answers:
            return [], []
        whole = subject.generator
        if subject.generator_of_batch is not None:  # one that does not divide what it is given
            whole = cache(partial(subject.generator_of_batch, _WHOLE))
        trials: list[Trial] = [
            ("answer_batches", str(n), partial(self._answer_again, whole, n)) for n in varied.answer_batches
        ]
        skipped, lengths = [], self._lengths(whole()) if varied.answer_budgets else {}
        sizes = boundary_budgets(list(lengths.values()), varied.answer_budgets)
        trials += [
            ("answer_budgets", f"{n} tokens", partial(self._answer_both_ways, whole, lengths, n))
            for n in sizes
        ]
        if varied.answer_budgets and not sizes:
            skipped.append(
                "answer_budgets is left out: no two prompts are prefilled together and need caches of two sizes."
            )
        if subject.generator_of_dtype is None:
            return trials, [*skipped, "answer_dtypes is left out: the generator has no such setting."]
        for dtype in varied.answer_dtypes:
            make = partial(subject.generator_of_dtype, dtype)
            trials.append(("answer_dtypes", dtype, partial(self._answer_again, make)))
        return trials, skipped

    def answer_changes(
        self, axis: str, setting: str, before: dict[str, Reply], after: dict[str, Reply]
    ) -> AnswerChanges:
        changed = tuple(query for query, reply in before.items() if reply.answer != after[query].answer)
        old, new = self._scores(before), self._scores(after)
        movements = {name: MetricChange.between(old[name], new[name]) for name in ANSWER_MEASURES}
        return AnswerChanges(axis, setting, len(before), changed, movements)

    def _asked(self) -> dict[str, list[Hit]]:
        """Query id -> hits, of the questions that are answered."""
        asked = self.dataset.sample(self.variations.answers, self.dataset.seed).queries
        return {query: self.found[query] for query in asked}

    def _mixed(self) -> dict[str, list[Hit]]:
        """The same with one passage, two, three ... in turn, so that the prompts are of many lengths."""
        most = self.variations.passages
        return {query: hits[: 1 + i % most] for i, (query, hits) in enumerate(self._asked().items())}

    def _lengths(self, generator: Generator) -> dict[str, int]:
        """Query id -> tokens of its prompt, of the mixed prompts that ask the model something."""
        replies = self._answer(lambda: generator, found=self._mixed(), new_tokens=1)
        return {query: reply.prompt_tokens for query, reply in replies.items() if reply.prompt_tokens}

    def _answer_again(
        self, make: Callable[[], Generator], batch: int | None = None
    ) -> tuple[dict[str, Reply], dict[str, Reply]]:
        return self.replies, self._answer(make, batch)

    def _answer_both_ways(
        self, make: Callable[[], Generator], lengths: Mapping[str, int], new_tokens: int
    ) -> tuple[dict[str, Reply], dict[str, Reply]]:
        """The mixed prompts one at a time; and in pairs of a short and a long one that are prefilled together."""
        found, together = self._mixed(), {}
        alone = self._answer(make, 1, found={query: found[query] for query in lengths}, new_tokens=new_tokens)
        order = sorted(lengths, key=lengths.__getitem__)
        for _, alike in groupby(order, key=lambda query: round_up_prompt(lengths[query])):
            left = deque(alike)
            while left:  # a third prompt could widen the cache of the two
                pair = [left.popleft(), *([left.pop()] if left else [])]
                together |= self._answer(make, found={q: found[q] for q in pair}, new_tokens=new_tokens)
        return alone, together

    def _answer(
        self,
        make: Callable[[], Generator],
        batch: int | None = None,
        *,
        found: dict[str, list[Hit]] | None = None,
        new_tokens: int | None = None,
    ) -> dict[str, Reply]:
        """Query id -> the answer from these hits, by default the reference's, `batch` in one call; None: all."""
        generator = make()
        collection = Collection(self.collection.index, self.collection.embedder, lambda: generator)
        reader = self.subject.reader(generator)
        if new_tokens is not None:
            reader = replace(reader, options=replace(reader.options, max_new_tokens=new_tokens))
        threshold = Search(collection, self.subject.method).score_threshold
        ablation = ContextAblation(conditions=("retrieved",), likelihood=(), k=self.variations.passages)
        replies: dict[str, Reply] = {}
        for some in _batches(self._asked() if found is None else found, batch):
            read_now = answer_all(
                collection, self.dataset, some, threshold, reader, reader.template, ablation
            )
            replies |= {reply.query: reply for reply in read_now}
        return replies

    def _scores(self, replies: Mapping[str, Reply]) -> dict[str, list[float | None]]:
        """Measure -> a value for each answer, None where it is not defined."""
        rows = [
            answer_metrics.measure(
                answer=reply.answer,
                gold=self.dataset.answers.get(query, ()),
                abstained=reply.abstained,
                answerable=True,  # only judged queries are asked
                cited=(),
                relevant=(),
            )
            for query, reply in replies.items()
        ]
        return {name: [row[name] for row in rows] for name in ANSWER_MEASURES}


def _batches(items: Mapping[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    pairs = list(items.items())
    size = size or len(pairs)
    for start in range(0, len(pairs), size):
        yield dict(pairs[start : start + size])
