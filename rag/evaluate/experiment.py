"""One evaluation, from a dataset and a retrieval method to its result files, which are cached under one key.

The key is made of contents: dataset, options, fingerprints of models, code of every stage. An evaluation that was done
is not repeated; one that was killed finds the batches of its stages in the cache and computes the rest.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path

from rag.context import ContextOptions
from rag.embed import Embedder
from rag.evaluate import estimate, per_query
from rag.evaluate import retrieval as dataset_retrieval
from rag.evaluate.ablation import AblationInputs, ContextAblation, Reply, answer_all
from rag.evaluate.costs import costs, draw_probes, measure_latency
from rag.evaluate.datasets import Dataset
from rag.evaluate.error_breakdown import error_breakdown
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.own import OwnMetric, check_own, own_ranking_rows
from rag.evaluate.metrics.retrieval import DEFAULT_MEASURES
from rag.evaluate.metrics.spans import DEFAULT_SPAN_MEASURES, is_span_measure
from rag.evaluate.result_files import json_lines, json_text
from rag.evaluate.statistics import Statistics
from rag.evaluate.summary import beyond_depth, summary, too_long
from rag.evaluate.tuning.grids import Tuning
from rag.evaluate.tuning.method import check_tunable, tune
from rag.generate import Generator, describe
from rag.ingest.chunk import Chunker
from rag.ingest.chunk.whole import WholeChunker
from rag.ops.sampling import Sampling
from rag.pipeline import AnswerOptions, Progress, Reader
from rag.prompt import PromptTemplate
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.dependencies import dependencies_of
from rag.retrieve.run_file import run_problems
from rag.retrieve.search import Dense, Search
from rag.runtime.cache import entries
from rag.runtime.cache.folder import cache_root
from rag.runtime.cache.keys import content_key
from rag.runtime.cache.memo import Cost, Memo, model_version
from rag.runtime.code.import_closure import code_version
from rag.runtime.machine.hardware import forget_peak_memory
from rag.runtime.options import Count, Filled, check_fields
from rag.runtime.stages import check_frozen
from rag.types import Hit, UserError


@dataclass(frozen=True)
class EvaluationOptions:
    """How deep to search, and which metrics to compute. Raises UserError for unknown metrics."""

    depth: Count = 100  # documents retrieved for each query
    measures: Sequence[Filled] = DEFAULT_MEASURES
    span_measures: Sequence[Filled] = DEFAULT_SPAN_MEASURES  # of queries whose evidence is known as spans
    probes: Count = 20  # queries that are timed one at a time

    def __post_init__(self) -> None:
        check_fields(self)
        retrieval_metrics.check(self.measures)
        if unknown := [name for name in self.span_measures if not is_span_measure(name)]:
            choices = ", ".join(DEFAULT_SPAN_MEASURES)
            raise UserError(f"There is no measure {unknown[0]!r} of evidence: choose from such as {choices}.")


def no_generator() -> Generator:
    """Raise UserError: an evaluation that was given no language model asks for one."""
    raise UserError("This evaluation asks a language model: give it one, as in generator=LocalGenerator.")


@dataclass(frozen=True)
class Experiment:
    """One evaluation. Raises UserError for a tuning that the method or the ablation does not allow."""

    dataset: Dataset
    embedder: Embedder
    chunker: Chunker = WholeChunker()
    method: Retriever = Dense()
    generator: Callable[[], Generator] = no_generator
    prompt: PromptTemplate = PromptTemplate()  # for questions with passages ...
    closed_book: PromptTemplate = PromptTemplate(user="Question: {question}")  # ... and without
    evaluation: EvaluationOptions = EvaluationOptions()
    statistics: Statistics = Statistics()
    metric: OwnMetric | None = None  # of the user's own
    tuning: Tuning | None = None
    ablation: ContextAblation = ContextAblation()
    context: ContextOptions = ContextOptions()
    sampling: Sampling = Sampling()
    options: AnswerOptions = AnswerOptions()

    def __post_init__(self) -> None:
        check_frozen((self.chunker, self.method, self.metric, self.tuning))
        if self.metric:
            check_own(self.metric)
        if self.tuning:
            check_tunable(self.tuning, self.method, self.dataset)
            if self.ablation.conditions:
                raise UserError(
                    "tuning is of retrieval alone: leave ablation.conditions empty, or tuning out."
                )

    @property
    def _uses_generator(self) -> bool:
        return bool(self.ablation.conditions) or "generator" in dependencies_of(self.method)

    @cached_property
    def problems(self) -> tuple[str, ...]:
        """Return what is wrong with the dataset, a run file or the measures without being an error."""
        documents = [document.id for document in self.dataset.corpus]
        shallow = beyond_depth(self.evaluation.measures, self.evaluation.depth, len(documents))
        return (*self.dataset.problems, *run_problems(self.method, self.dataset.queries, documents), *shallow)

    @cached_property
    def key(self) -> str:
        """Return the cache key, 64 hex digits, of dataset, options, models and the code of this module and the stages.

        Stages are cached under keys of their own: after a change elsewhere an evaluation reuses their results.
        """
        answering = (self.ablation, self.prompt, self.closed_book, self.context, self.sampling, self.options)
        answers = answering if self.ablation.conditions else None
        measuring = (self.evaluation, self.statistics, self.tuning, self.metric)
        return content_key(
            self.dataset.fingerprint,
            (self.dataset.limit, self.dataset.seed),
            (self.chunker, model_version(self.embedder), self.method),
            measuring,
            (answers, self.embedder.score_threshold) if answers else None,
            model_version(self.generator()) if self._uses_generator else None,
            code_version(type(self), self.chunker, self.method, measuring, answers),
        )

    @property
    def result_folder(self) -> Path:
        """The folder of the result files in the cache; it exists once the evaluation was done."""
        return cache_root() / "results" / self.key

    def run(self, progress: Progress = lambda *_: None) -> Path:
        """Do the evaluation unless its results are cached, and return their folder."""

        def make() -> None:
            forget_peak_memory()
            files = self._result_files(Memo(cache_root() / "stages"), progress)
            entries.write_folder(self.result_folder, partial(_write, files))

        return entries.get_or_make(self.result_folder, make, entries.check_folder)

    def plan(self) -> list[tuple[str, int, int]]:
        """Return (stage, items, of them cached) of what `run` would need, without computing anything.

        What follows from something not yet computed counts as not cached: searches before the chunks are
        known, texts that a language model has not written, passages to rerank, prompts to answer.
        """
        if entries.get(self.result_folder, entries.check_folder):
            return [("result", 1, 1)]
        memo = Memo(cache_root() / "stages", dry=True)
        queries = list(self.dataset.queries.values())
        chunks = dataset_retrieval.chunk_all(self.dataset, self.chunker, self.embedder, memo)
        if chunks is None:
            memo.costs["search"] = Cost(items=len(queries))
        else:
            collection = dataset_retrieval.build_collection(
                self.dataset, chunks, self.embedder, self.generator, memo
            )
            estimate.estimate_search(collection, self.method, queries, self.evaluation.depth + 1)
            if "embedder" in dependencies_of(self.method):
                estimate.estimate_embedding(collection, [chunk.text for chunk in chunks])
        if self.ablation.conditions:
            questions = len(queries) + len(self.dataset.unanswerable)
            memo.costs["answer"] = Cost(items=questions * len(self.ablation.conditions))
        return [("result", 1, 0), *((stage, c.items, c.reused) for stage, c in memo.costs.items())]

    def _result_files(self, memo: Memo, progress: Progress) -> dict[str, str]:
        """Compute the result files: name -> content."""
        dataset, evaluation, method = self.dataset, self.evaluation, self.method
        chunks = dataset_retrieval.chunk_all(dataset, self.chunker, self.embedder, memo)
        collection = dataset_retrieval.build_collection(
            dataset, chunks or (), self.embedder, self.generator, memo, progress
        )
        found = dataset_retrieval.search(collection, method, dataset, evaluation.depth)
        replies = self._replies(collection, found)
        answered = [per_query.reply_metrics(dataset, reply, self.ablation, self.metric) for reply in replies]
        files: dict[str, str] = {}
        spans: dict[str, per_query.Row] = {}  # none of a tuned method, which ranks documents
        if self.tuning:
            tuned = tune(self.tuning, method, collection, dataset, evaluation.depth)
            ranking = tuned.run
            files["tuning.json"] = json_text(tuned.as_json())
        else:
            ranking = dataset_retrieval.documents(found, dataset, evaluation.depth)
            token_spans = collection.embedder.token_spans
            spans = per_query.span_rows(dataset, found, evaluation.span_measures, token_spans)
        rows = per_query.joined(
            per_query.retrieval_rows(dataset, ranking, evaluation.measures),
            own_ranking_rows(self.metric, dataset.qrels, ranking) if self.metric else {},
            spans,
            per_query.answer_rows(replies, answered),
        )
        probes = draw_probes(list(dataset.queries.values()), evaluation.probes)
        latency = measure_latency(method, collection, probes)
        tokens = sum(reply.prompt_tokens + reply.new_tokens for reply in replies)
        generator = describe(self.generator()) if self._uses_generator else None
        figures = summary(dataset, rows, self.statistics, self.key, too_long(replies))
        files |= {
            "metrics.json": json_text(figures),
            "per_query.jsonl": json_lines({"query": query} | row for query, row in rows.items()),
            "run.trec": "".join(retrieval_metrics.trec_lines(ranking)),
            "costs.json": json_text({"generator": generator} | costs(memo, collection, latency, tokens)),
        }
        if replies:
            records = map(partial(per_query.reply_record, dataset), replies, answered)
            files["answers.jsonl"] = json_lines(records)
        if {"oracle", "retrieved"} <= set(self.ablation.conditions):
            parts = error_breakdown(replies, answered, self.ablation.measure, self.statistics)
            files["error_breakdown.json"] = json_text(parts)
        return files

    def _replies(self, collection: Collection, found: Mapping[str, Sequence[Hit]]) -> list[Reply]:
        """Answer the judged and the unanswerable queries under each condition."""
        if not self.ablation.conditions:
            return []
        extra = self.dataset.unanswerable_queries
        hits = cached_search(collection, self.method, list(extra.values()), self.ablation.k)
        reader = Reader(self.generator(), self.prompt, self.context, self.sampling, self.options)
        threshold = Search(collection, self.method).score_threshold
        inputs = AblationInputs(collection, self.dataset, threshold, reader, self.closed_book, self.ablation)
        return list(answer_all(inputs, dict(found) | dict(zip(extra, hits, strict=True))))


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
