"""Questions answered from retrieved passages: our engine beside llama.cpp, same weights, same prompts' token ids.

Both decode greedily with the same stops, and both score the first gold answer after the same prompt. Ours has int8
weights on a CPU, llama.cpp activations rounded to 8 bits, so near ties fall differently: what counts is the paired
difference and its interval. llama.cpp scores the gold answer first, then goes back to the prompt's end and
answers: it reads each prompt once, one question at a time. Ours reads it twice, once to answer and once to score,
many questions together; its seconds include compiling, which stands beside them.
"""

import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64

from rag.bench.timing import Row
from rag.context import ContextOptions
from rag.embed.bert import BertEmbedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.beir import load_beir
from rag.evaluate.metrics import answers as answer_metrics
from rag.evaluate.retrieval import build_collection, chunk_all, without_own_document
from rag.evaluate.statistics import Statistics, intervals, randomisation
from rag.generate.local import DTYPES, LocalGenerator
from rag.generate.stop_text import StoppedText
from rag.ingest.chunk.whole import WholeChunker
from rag.models import hub
from rag.models.tokenizer.tokenizer import TextStream, Tokenizer
from rag.pipeline import AnswerOptions, Reader, fit_context, select_context
from rag.prompt import PromptTemplate
from rag.retrieve.search import Dense
from rag.runtime.clock import Clock
from rag.runtime.machine import cores
from rag.runtime.options import Count, Filled, Seed, check_fields
from rag.types import Message, UserError

MEASURES = ("EM", "F1", "contains", "log-likelihood")

_PEER = "llama-cpp-python"


@dataclass(frozen=True, slots=True)
class Task:
    """One question as both are given it."""

    messages: tuple[Message, ...]
    gold: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class ReadingOutcome:
    """What one reader made of all tasks, in their order."""

    texts: Sequence[str]
    log_likelihoods: Sequence[float]  # of each task's first gold answer, natural logarithm
    answering_s: float
    scoring_s: float
    compile_s: float = 0.0  # of both together


@dataclass(frozen=True)
class ReadingBenchmark:
    """bench=reading: answers and likelihoods of questions over a folder in the layout of BEIR."""

    path: Filled
    prompt: PromptTemplate
    context: ContextOptions = ContextOptions(order="reverse", min_score="auto")
    weights: Filled = hub.DEFAULT_GENERATOR  # a GGUF file, which llama.cpp reads too
    embedder: Filled = hub.DEFAULT_EMBEDDER
    dtype: Literal[DTYPES] = "auto"  # of our weights
    # drawn by seed, of those with a gold answer; below 25 say little
    questions: Annotated[int, Ge(2), Le(1_000_000)] = 200
    seed: Seed = 0
    k: Count = 3  # passages
    max_new_tokens: Count = 32
    stop: Sequence[Filled] = ("\n",)

    def __post_init__(self):
        check_fields(self)

    def run(self) -> list[Row]:
        dataset = load_beir(self.path).sample(self.questions, self.seed)
        generator = LocalGenerator(self.weights, self.dtype)
        tasks = self.tasks(dataset, generator)
        outcomes = {"ours": self._ours(generator, tasks)}
        if peer := _LlamaCpp.open(str(hub.local_path(self.weights)), self._room(generator, tasks)):
            outcomes[_PEER] = self._theirs(peer, generator.tokenizer, tasks)
        return rows(tasks, outcomes)

    def tasks(self, dataset: Dataset, generator: LocalGenerator) -> list[Task]:
        """The prompts, as evaluation makes them; where no passage is relevant, no model is asked."""
        embedder = BertEmbedder(self.embedder)
        collection = build_collection(dataset, chunk_all(dataset, WholeChunker(), embedder), embedder)
        options = AnswerOptions(self.max_new_tokens, stop=self.stop)
        reader = Reader(generator, self.prompt, self.context, options=options)
        asked = [query for query in dataset.queries if dataset.answers.get(query)]
        texts = [dataset.queries[query] for query in asked]
        tasks = []
        for query, hits in zip(asked, collection.search(Dense(), texts, self.k + 1), strict=True):
            chosen = without_own_document(hits, query, dataset)[: self.k]
            document_text = collection.index.document_text
            context = select_context(chosen, document_text, collection.embedder.score_threshold, reader)
            if context.sources:
                messages, _, _ = fit_context(dataset.queries[query], context, reader)
                tasks.append(Task(tuple(messages), tuple(dataset.answers[query])))
        if left_out := len(dataset.queries) - len(tasks):
            print(f"left out: {left_out} questions without gold answer or relevant passage", file=sys.stderr)
        if len(tasks) < 2:
            raise UserError(f"{self.path} has {len(tasks)} questions to read: raise bench.questions")
        return tasks

    def _ours(self, generator: LocalGenerator, tasks: Sequence[Task]) -> ReadingOutcome:
        _ = generator.engine  # reads the weights
        begin = Clock.now()
        conversations = [task.messages for task in tasks]
        texts = generator.generate(conversations, max_new_tokens=self.max_new_tokens, stop=self.stop)
        answered = Clock.now()
        scores = generator.log_likelihood([(task.messages, task.gold[0]) for task in tasks])
        scored = Clock.now()
        return ReadingOutcome(
            texts,
            [score.total for score in scores],
            (answered - begin).wall,
            (scored - answered).wall,
            (scored - begin).compiling,
        )

    def _room(self, generator: LocalGenerator, tasks: Sequence[Task]) -> int:
        """Tokens that the longest task takes, answer or gold answer included."""
        tokens = (
            generator.prompt_tokens(task.messages) + max(self.max_new_tokens, generator.count(task.gold[0]))
            for task in tasks
        )
        return max(tokens) + 1

    def _theirs(self, peer: "_LlamaCpp", tokenizer: Tokenizer, tasks: Sequence[Task]) -> ReadingOutcome:
        texts, scores, scoring_s, begin = [], [], 0.0, time.perf_counter()
        for task in tasks:
            prompt = tokenizer.chat(task.messages)
            peer.read(prompt)
            started = time.perf_counter()
            scores.append(peer.log_likelihood(tokenizer.encode(task.gold[0], special=False)))
            scoring_s += time.perf_counter() - started
            texts.append(peer.answer(tokenizer, self.max_new_tokens, self.stop))
        return ReadingOutcome(texts, scores, time.perf_counter() - begin - scoring_s, scoring_s)


class _LlamaCpp:
    """A llama.cpp model that reads a prompt once, and scores and continues it from there."""

    def __init__(self, model, vocab: int):
        self._model, self._vocab = model, vocab
        self._end, self._after = 0, np.zeros(vocab, np.float32)

    @staticmethod
    def open(path: str, context: int) -> "_LlamaCpp | None":
        try:
            from llama_cpp import Llama
        except ImportError:
            print(f"{_PEER} is not installed: its columns are left out (make bench-setup)", file=sys.stderr)
            return None
        threads = cores()
        model = Llama(
            path, n_ctx=context, n_threads=threads, n_threads_batch=threads, n_batch=2048, verbose=False
        )
        return _LlamaCpp(model, model.n_vocab())

    def read(self, prompt: Sequence[int]) -> None:
        self._model.reset()
        self._after = self._next(prompt)
        self._end = len(prompt)

    def log_likelihood(self, continuation: Sequence[int]) -> float:
        """log p(continuation | prompt); like a `Generator`'s without the token that would end the answer."""
        logits, total = self._rewound(), 0.0
        for i, token in enumerate(continuation, 1):
            total += float(logits[token]) - _log_sum_exp(logits)
            if i < len(continuation):
                logits = self._next([token])
        return total

    def answer(self, tokenizer: Tokenizer, max_new_tokens: int, stop: Sequence[str]) -> str:
        """The most likely token, one after another, until one that ends, a stop, or the budget."""
        logits, decoder, text, answer = self._rewound(), TextStream(tokenizer), StoppedText(stop), ""
        for made in range(1, max_new_tokens + 1):
            token = int(logits.argmax())
            if token in tokenizer.eos_ids:
                break
            answer += text.push(decoder.push(token))
            if text.stopped:
                break
            if made < max_new_tokens:
                logits = self._next([token])
        return answer + text.push(decoder.finish()) + text.finish()

    def _rewound(self) -> Float32[np.ndarray, "V"]:
        """Forget what followed the prompt (the next evaluation drops it from the cache); the logits after it."""
        self._model.n_tokens = self._end
        return self._after

    def _next(self, tokens: Sequence[int]) -> Float32[np.ndarray, "V"]:
        from llama_cpp import llama_get_logits_ith

        self._model.eval(tokens)
        return np.ctypeslib.as_array(llama_get_logits_ith(self._model.ctx, -1), (self._vocab,)).copy()


def _log_sum_exp(logits: Float32[np.ndarray, "V"]) -> float:
    exact = logits.astype(np.float64)
    return float(exact.max() + np.log(np.exp(exact - exact.max()).sum()))


def rows(
    tasks: Sequence[Task], outcomes: dict[str, ReadingOutcome], options: Statistics = Statistics()
) -> list[Row]:
    """A row a measure: each reader's mean with its interval, and of a peer ours minus its own, paired; then time.

    `outcomes` holds "ours" and any peers. p is that of a two-sided randomisation test of the difference.
    """
    tables = {
        name: scores_of(tasks, outcome.texts, outcome.log_likelihoods) for name, outcome in outcomes.items()
    }
    spread = {name: _interval_figures(table, options) for name, table in tables.items()}
    ours = spread.pop("ours")
    for name, figures in spread.items():
        paired = tables["ours"] - tables[name]
        p = randomisation(paired, options)
        for i, compared in enumerate(_interval_figures(paired, options)):
            figures[i] |= {f"ours minus it, {key}": value for key, value in compared.items()}
            figures[i]["p"] = float(p[i])
    return [
        Row(f"{measure}, {len(tasks)} questions", ours[i], {name: spread[name][i] for name in spread})
        for i, measure in enumerate(MEASURES)
    ] + [_effort(outcomes)]


def scores_of(
    tasks: Sequence[Task], texts: Sequence[str], log_likelihoods: Sequence[float]
) -> Float64[np.ndarray, "N 4"]:
    """Questions x MEASURES."""
    found = []
    for task, text, likelihood in zip(tasks, texts, log_likelihoods, strict=True):
        scores = answer_metrics.measure(
            answer=text.strip(), gold=task.gold, abstained=False, answerable=True, cited=(), relevant=()
        )
        found.append([scores["EM"], scores["F1"], scores["contains"], likelihood])
    return np.array(found, np.float64)


def _interval_figures(values: np.ndarray, options: Statistics) -> list[dict[str, float]]:
    """Column by column."""
    bounds = intervals(values, options)
    return [
        {"mean": float(mean), "low": float(low), "high": float(high)}
        for mean, (low, high) in zip(values.mean(axis=0), bounds, strict=True)
    ]


def _effort(outcomes: dict[str, ReadingOutcome]) -> Row:
    """Seconds for all questions, and how many answers are not ours to the letter."""
    seconds = {
        name: {"answering s": outcome.answering_s, "scoring s": outcome.scoring_s}
        for name, outcome in outcomes.items()
    }
    ours = outcomes["ours"]
    mine = seconds.pop("ours") | {"of these compiling s": ours.compile_s}
    for name, figures in seconds.items():
        pairs = zip(ours.texts, outcomes[name].texts, strict=True)
        figures["answers that differ"] = sum(a.strip() != b.strip() for a, b in pairs)
    ratios = {name: figures["answering s"] / ours.answering_s for name, figures in seconds.items()}
    return Row("time and agreement", mine, seconds, ratios)
