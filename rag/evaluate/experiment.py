"""One evaluation, from a dataset and a method to its result files, known by what it means.

A job's key is made of contents: dataset, options, fingerprints of models, code of every stage. A job that was done
is not done again; one that was killed finds its stages' batches in the memo and goes on behind the last.
"""

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np

from rag.context import ContextOptions
from rag.embed import Embedder
from rag.embed.vector_cache import CachedEmbedder
from rag.evaluate import ablation, estimate
from rag.evaluate import retrieval as dataset_retrieval
from rag.evaluate import statistics as paired_statistics
from rag.evaluate.ablation import ContextAblation, Reply
from rag.evaluate.costs import costs, measure_latency
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import answers as answer_metrics
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.metrics.retrieval import DEFAULT_MEASURES
from rag.evaluate.metrics.spans import DEFAULT_SPAN_MEASURES, DocumentTokens, is_span_measure, span_measures
from rag.evaluate.statistics import Statistics
from rag.evaluate.tuning.cross_validation import Tuned
from rag.evaluate.tuning.grids import BM25Grid, Tuning, tune_bm25, tune_fusion
from rag.generate import Generator, describe
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk import Chunker
from rag.ops.sampling import Sampling
from rag.pipeline import AnswerOptions, Progress, Reader
from rag.prompt import PromptTemplate
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.search import Hybrid, Lexical, Search
from rag.runtime import cache
from rag.runtime.cache_key import content_key
from rag.runtime.files import cache_root
from rag.runtime.import_closure import code_version
from rag.runtime.machine import forget_peak_memory
from rag.runtime.memo import Cost, Memo, model_version
from rag.runtime.options import Count, Filled, check_fields
from rag.types import Chunk, Hit, UserError

# Of metrics.json, beside the measures' own names: these have an "@", a "/", or are among rag.evaluate.metrics.retrieval'.
ABOUT = frozenset({"label", "key", "dataset", "means", "intervals", "statistics", "warnings"})


@dataclass(frozen=True)
class EvaluationOptions:
    """How deep to look, and what to measure. UserError for what cannot be."""

    depth: Count = 100  # documents retrieved for each query
    measures: Sequence[Filled] = DEFAULT_MEASURES
    span_measures: Sequence[Filled] = DEFAULT_SPAN_MEASURES  # of queries whose evidence is known by its place
    probes: Count = 20  # queries that are timed one at a time

    def __post_init__(self):
        check_fields(self)
        retrieval_metrics.check(self.measures)
        if unknown := [name for name in self.span_measures if not is_span_measure(name)]:
            choices = ", ".join(DEFAULT_SPAN_MEASURES)
            raise UserError(f"There is no measure {unknown[0]!r} of evidence: choose from such as {choices}.")


@dataclass(frozen=True)
class Experiment:
    """All that one evaluation is made of."""

    dataset: Dataset
    chunker: Chunker
    embedder: Embedder
    method: Retriever
    generator: Callable[[], Generator]
    prompt: PromptTemplate  # what a question is asked by when passages are shown ...
    closed_book: PromptTemplate  # ... and when none are
    evaluation: EvaluationOptions = EvaluationOptions()
    statistics: Statistics = Statistics()
    tuning: Tuning | None = None
    ablation: ContextAblation = ContextAblation()
    context: ContextOptions = ContextOptions()
    sampling: Sampling = Sampling()
    options: AnswerOptions = AnswerOptions()

    def __post_init__(self):
        """UserError for a tuning that does not go with the method."""
        match self.tuning and self.tuning.grid:
            case None:
                return
            case BM25Grid():
                bm25 = isinstance(self.method, Lexical) and isinstance(self.method.weights, BM25Weights)
                if not bm25 or self.dataset.drop_self_hits:
                    raise UserError(
                        "tuning=bm25 takes retriever=bm25, and queries that are no documents themselves."
                    )
            case grid if not isinstance(self.method, Hybrid):
                raise UserError(
                    f"tuning={grid.family} takes retriever=hybrid, without transform and reranker."
                )
        if self.ablation.conditions:
            raise UserError("tuning is of retrieval alone: leave ablation.conditions empty, or tuning out.")

    @property
    def _generates(self) -> bool:
        """Whether a language model has a part in the results."""
        return bool(self.ablation.conditions) or "generator" in self.method.uses

    @property
    def _described(self) -> str | None:
        return describe(self.generator()) if self._generates else None

    @cached_property
    def key(self) -> str:
        """64 hex digits of everything that the results depend on; of code, all that this module and the stages import.

        Stages are kept by their own code: after a change elsewhere a job is put together anew from what they kept.
        """
        asks = bool(self.ablation.conditions)
        writing = (self.ablation, self.prompt, self.closed_book, self.context, self.sampling, self.options)
        measuring = (self.evaluation, self.statistics, self.tuning)
        return content_key(
            self.dataset.fingerprint,
            (self.dataset.limit, self.dataset.seed),
            (self.chunker, model_version(self.embedder), self.method),
            measuring,
            (writing, self.embedder.score_threshold) if asks else None,
            model_version(self.generator()) if self._generates else None,
            code_version(type(self), self.chunker, self.method, measuring, writing if asks else None),
        )

    @property
    def kept(self) -> Path:
        """The folder of the results, there once the job was done."""
        return cache_root() / "results" / self.key

    def done(self, progress: Progress = lambda *_: None) -> Path:
        """The folder of the results, after doing the job if that was not done before."""

        def make() -> None:
            forget_peak_memory()
            files = self._run(Memo(cache_root() / "stages"), progress)
            cache.write_folder(self.kept, partial(_write, files))

        return cache.get_or_make(self.kept, make, cache.check_folder)

    def plan(self) -> list[tuple[str, int, int]]:
        """(stage, items, of them kept) of what doing the job would ask for; nothing is computed.

        What follows from something not yet computed is counted as not there: searches before the chunks are
        known, texts that a language model has not written, passages to rerank, prompts to answer.
        """
        if cache.get(self.kept, cache.check_folder):
            return [("result", 1, 1)]
        memo = Memo(cache_root() / "stages", dry=True)
        chunks = dataset_retrieval.chunk_all(self.dataset, self.chunker, self.embedder, memo)
        if chunks is None:
            memo.costs["search"] = Cost(items=len(self.dataset.queries))
        else:
            self._plan_search(
                dataset_retrieval.build_collection(self.dataset, chunks, self.embedder, self.generator, memo),
                chunks,
            )
        if self.ablation.conditions:
            questions = len(self.dataset.queries) + len(self.dataset.unanswerable)
            memo.costs["answer"] = Cost(items=questions * len(self.ablation.conditions))
        return [("result", 1, 0), *((stage, c.items, c.reused) for stage, c in memo.costs.items())]

    def _plan_search(self, collection: Collection, chunks: Sequence[Chunk]) -> None:
        """Count what the method would search, and embed if it has to."""
        estimate.estimate_search(
            collection, self.method, list(self.dataset.queries.values()), self.evaluation.depth + 1
        )
        if "embedder" in self.method.uses and isinstance(collection.embedder, CachedEmbedder):
            texts = list({chunk.text for chunk in chunks})
            missing = collection.embedder.missing(texts)
            collection.memo.costs["embed"] = Cost(items=len(texts), reused=len(texts) - missing)

    def _search(self, collection: Collection) -> dict[str, list[Hit]]:
        return dataset_retrieval.search(collection, self.method, self.dataset, self.evaluation.depth)

    def _run(self, memo: Memo, progress: Progress) -> dict[str, str]:
        """The result files, by name."""
        chunks = dataset_retrieval.chunk_all(self.dataset, self.chunker, self.embedder, memo)
        collection = dataset_retrieval.build_collection(
            self.dataset, chunks, self.embedder, self.generator, memo, progress
        )
        found = self._search(collection)
        tuned = self._tuned(collection) if self.tuning else None
        ranking = (
            tuned.run if tuned else dataset_retrieval.documents(found, self.dataset, self.evaluation.depth)
        )
        replies = self._replies(collection, found)
        per_query = self._per_query(ranking, found, replies, collection)
        latency = measure_latency(self.method, collection, self._probed())
        tokens = sum(reply.prompt_tokens + reply.new_tokens for reply in replies)
        files = {
            "metrics.json": _json(self._summary(per_query, _too_long(replies))),
            "per_query.jsonl": _lines({"query": query} | row for query, row in per_query.items()),
            "run.trec": "".join(retrieval_metrics.trec_lines(ranking)),
            "costs.json": _json({"generator": self._described} | costs(memo, collection, latency, tokens)),
        }
        if tuned:
            files["tuning.json"] = _json(tuned.as_json())
        if replies:
            files["answers.jsonl"] = _lines(self._answer_row(reply) for reply in replies)
        if {"oracle", "retrieved"} <= set(self.ablation.conditions):
            files["losses.json"] = _json(self._losses(replies))
        return files

    def _tuned(self, collection: Collection) -> Tuned:
        """The method with parameters that were never chosen on the queries they are reported for."""
        depth, chunks = self.evaluation.depth, collection.chunks()
        judged = (self.dataset.qrels, self.tuning)

        def document(row: int) -> str:
            return chunks[row].document_id

        if isinstance(self.method, Lexical):
            index, weights = collection.lexical(self.method.analyzer), self.method.weights
            return tune_bm25(index, self.dataset.queries, *judged, document, depth, weights)
        questions = list(self.dataset.queries.values())
        arms = self.method.inner(depth + 1)  # as an untuned search asks for them
        found = [
            dict(zip(self.dataset.queries, collection.search(arm, questions, k), strict=True))
            for arm, k in arms
        ]
        rankings = {
            query: [
                [
                    (collection.row(hit.chunk), hit.score)
                    for hit in dataset_retrieval.without_own_document(arm[query], query, self.dataset)
                ]
                for arm in found
            ]
            for query in self.dataset.queries
        }
        return tune_fusion(rankings, *judged, self.method.lower_bounds, document, depth)

    def _probed(self) -> list[str]:
        """The questions that are timed, a fixed draw."""
        texts = list(self.dataset.queries.values())
        return random.Random(0).sample(texts, min(self.evaluation.probes, len(texts)))

    # --- measures

    def _per_query(
        self,
        ranking: Mapping[str, Mapping[str, float]],
        found: Mapping[str, Sequence[Hit]],
        replies: Sequence[Reply],
        collection: Collection,
    ) -> dict[str, dict[str, float | None]]:
        """Query id -> measure -> value, None where it is not defined; the unanswerable queries come last."""
        _, retrieval = retrieval_metrics.evaluate(self.dataset.qrels, ranking, self.evaluation.measures)
        rows: dict[str, dict[str, float | None]] = {
            query: dict(values) for query, values in retrieval.items()
        }
        tokens = DocumentTokens(self.dataset.corpus, collection.embedder.token_spans)
        for query, evidence in self.dataset.evidence.items():
            if query in rows and not self.tuning:  # which ranks documents, not chunks
                rows[query] |= span_measures(found[query], evidence, tokens, self.evaluation.span_measures)
        for reply in replies:
            row = rows.setdefault(reply.query, {})
            row |= {f"{reply.condition}/{name}": value for name, value in self._judged(reply).items()}
        names = list(dict.fromkeys(name for row in rows.values() for name in row))
        return {query: {name: row.get(name) for name in names} for query, row in rows.items()}

    def _judged(self, reply: Reply) -> dict[str, float | None]:
        """Measure -> value of one answer."""
        judged = self.dataset.qrels.get(reply.query, {})
        values = answer_metrics.measure(
            answer=reply.answer,
            gold=self.dataset.answers.get(reply.query, ()),
            abstained=reply.abstained,
            answerable=reply.query not in self.dataset.unanswerable,
            cited=reply.cited,
            relevant=tuple(name for name, grade in judged.items() if grade > 0),
        )
        if reply.condition in self.ablation.likelihood:
            values["gold log-likelihood"] = reply.log_likelihood
        return values

    def _summary(
        self, per_query: Mapping[str, Mapping[str, float | None]], notes: Sequence[str]
    ) -> dict[str, Any]:
        """What goes into metrics.json but for the names, which are the run's and not the result's.

        Each measure is one number at the top, which is what other programs read, and None where no query defines it;
        what there is to say about them (ABOUT) stands beside, the same numbers under "means" too.
        """
        measures = list(next(iter(per_query.values())))
        values = paired_statistics.table(per_query, measures)
        bounds = paired_statistics.intervals(values, self.statistics)
        means = {name: _mean(column) for name, column in zip(measures, values.T, strict=True)}
        d = self.dataset
        if taken := ABOUT & means.keys():
            raise ValueError(
                f"a measure is called {min(taken)!r}, as what metrics.json says beside the measures"
            )
        return means | {
            "key": self.key,
            "dataset": {
                "fingerprint": d.fingerprint,
                "queries": len(d.queries),
                "limit": d.limit,
                "seed": d.seed,
            },
            "means": means,
            "intervals": dict(zip(measures, map(_interval, bounds), strict=True)),
            "statistics": {
                "confidence": self.statistics.confidence,
                "resamples": self.statistics.resamples,
                "seed": self.statistics.seed,
            },
            "warnings": [*paired_statistics.warnings(values, measures, self.statistics), *notes],
        }

    # --- answers

    def _replies(self, collection: Collection, found: Mapping[str, Sequence[Hit]]) -> list[Reply]:
        if not self.ablation.conditions:
            return []
        extra = self.dataset.unanswerable_queries
        hits = collection.search(self.method, list(extra.values()), self.ablation.k)
        everything = dict(found) | dict(zip(extra, hits, strict=True))
        reader = Reader(self.generator(), self.prompt, self.context, self.sampling, self.options)
        threshold = Search(collection, self.method).score_threshold
        return list(
            ablation.answer_all(
                collection, self.dataset, everything, threshold, reader, self.closed_book, self.ablation
            )
        )

    def _answer_row(self, reply: Reply) -> dict[str, Any]:
        question = self.dataset.queries.get(reply.query) or self.dataset.unjudged[reply.query]
        row = asdict(reply) | {"question": question, "gold": self.dataset.answers.get(reply.query, ())}
        return row | self._judged(reply)

    def _losses(self, replies: Sequence[Reply]) -> dict[str, Any]:
        """What is missing to a perfect score, split by cause."""
        name = self.ablation.measure
        scores = {(reply.query, reply.condition): self._judged(reply).get(name) for reply in replies}
        parts = ablation.error_breakdown(replies, scores)
        values = np.array([parts[cause] for cause in ablation.ERRORS]).T
        if not len(values):
            raise UserError(
                f"no question has the measure {name!r} under oracle and retrieved: choose ablation.measure"
            )
        bounds = paired_statistics.intervals(values, self.statistics)
        means = {
            c: [s for (_, of), s in scores.items() if of == c and s is not None]
            for c in self.ablation.conditions
        }
        return {
            "measure": name,
            "n": len(values),
            "ceiling": 1.0,
            "scores": {condition: float(np.mean(found)) for condition, found in means.items()},
            "losses": dict(zip(ablation.ERRORS, values.mean(axis=0).tolist(), strict=True)),
            "intervals": dict(zip(ablation.ERRORS, map(_interval, bounds), strict=True)),
        }


def _too_long(replies: Sequence[Reply]) -> list[str]:
    """A sentence for questions that no model could be asked."""
    long = {reply.query for reply in replies if not reply.fits}
    named = ", ".join(sorted(long)[:5])
    what = (
        f"{len(long)} questions leave no room for a passage in the model's context and count as not answered"
    )
    return [f"{what}: {named}{' and more' if len(long) > 5 else ''}."] if long else []


def _mean(values: np.ndarray) -> float | None:
    defined = values[np.isfinite(values)]
    return float(defined.mean()) if len(defined) else None


def _interval(bounds: np.ndarray) -> list[float] | None:
    """None where there are too few values for an interval."""
    return bounds.tolist() if np.isfinite(bounds).all() else None


def _write(files: Mapping[str, str], folder: Path) -> None:
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")


def _json(value: object) -> str:
    return json.dumps(value, indent=1, allow_nan=False, ensure_ascii=False) + "\n"


def _lines(rows: Iterable[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, allow_nan=False, ensure_ascii=False) + "\n" for row in rows)
