"""Small workloads that are killed (ingest, add, prefill, a sweep), in numpy alone, each with a reader of its files.

A home is a folder with an index in `index` and a cache in `cache`. A workload is deterministic, down to the bits of
vectors, which depend on the batch in which they were computed.

Letters: L layers, K kv heads, T tokens, D head dim, E embedding dim.
"""

import dataclasses
import hashlib
import os
import random
import re
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np

from rag import pipeline
from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.evaluate import statistics
from rag.evaluate.datasets import Dataset
from rag.evaluate.experiment import EvaluationOptions, Experiment
from rag.evaluate.statistics import Statistics
from rag.generate.kv import chunk_cache
from rag.generate.kv.chunk_cache import ChunkKVCache
from rag.generate.kv.prompt_parts import split_prompt
from rag.index import store
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk.fixed import FixedChunker
from rag.models.llama.model import LlamaConfig
from rag.prompt import PromptTemplate, render
from rag.retrieve.search import Lexical
from rag.runtime.code.import_closure import code_version
from rag.types import Context, Document, Hit, Source
from tests.tiny_models import byte_level

Found = Mapping[str, Any]  # what a reader finds, by name

ANALYZER = Analyzer(stop_words=["ab"])
CHUNKER = FixedChunker(size=12, overlap=2)
_WORDS = tuple(a + b for a in "abcdefgh" for b in "abcdefgh")
_ENVIRONMENT = {"commit": "0" * 40}


@dataclass(frozen=True)
class Workload:
    """A writer, its initial state, and what a reader of its home must find."""

    name: str
    before: Callable[[Path], None]  # makes the old state in an empty home
    write: Callable[[Path], None]
    look: Callable[[Path], Found]
    whole: bool  # a reader finds exactly the old or the new state; otherwise it may find parts of the new one


class Hashed:
    """An embedder by hashes; a text's vector also depends on its batch, by about a rounding error."""

    dim, score_threshold = 8, None
    fingerprint, spec = "hashed", {"kind": "hashed", "dim": 8}

    def encode(self, texts: Sequence[str], progress: Callable[[int], None] = lambda done: None) -> np.ndarray:
        batch = _numbers("\0".join(texts), self.dim) * 1e-6
        rows = [_numbers(text, self.dim) + batch for text in texts]
        progress(len(texts))
        vectors = np.array(rows, np.float32).reshape(-1, self.dim)
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return self.encode(texts)

    def token_spans(self, text: str) -> np.ndarray:
        return np.array([found.span() for found in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)

    def fit(self, texts: Sequence[str]) -> "Hashed":
        return self

    def save(self, folder: Path) -> None:
        """Write nothing, because nothing was learned."""

    def restore(self, folder: Path) -> "Hashed":
        return self


def _numbers(text: str, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.sha512(text.encode()).digest(), np.int16)[:count] / 2**15


@dataclass(frozen=True)
class Cosine:
    """Dense search in numpy."""

    depends_on: ClassVar[tuple[str, ...]] = ("embedder",)
    lowest: ClassVar[float] = -1.0

    def search(self, collection: Any, questions: Sequence[str], k: int) -> list[list[Hit]]:
        scores = collection.embedder.encode_queries(questions) @ np.asarray(collection.index.vectors).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [collection.hits(rows, row[rows]) for rows, row in zip(best, scores, strict=True)]


# --- homes and corpora


def enter(home: Path) -> None:
    """Make this process use a home, and prevent it from starting programs or JAX."""
    os.environ["RAG_CACHE"] = str(home / "cache")
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("rag.") and hasattr(module, "environment"):
            module.environment = lambda: dict(_ENVIRONMENT)


def warm_up() -> None:
    """Compute code versions in this process, with the machine's own cache of sources if it exists."""
    code_version(Hashed(), Cosine(), BagOfWords, BertEmbedder, Experiment)


def write_corpus(folder: Path, draw: random.Random, count: int, longest: int) -> Path:
    folder.mkdir(parents=True)
    for i in range(count):
        words = draw.choices(_WORDS, k=draw.randint(1, longest))
        (folder / f"{i}.txt").write_text(" ".join(words))
    return folder


# --- ingest and add


def _ingest(corpus: Path, embedder: Any, home: Path, *, add: bool = False) -> None:
    enter(home)
    pipeline.ingest(corpus, home / "index", CHUNKER, embedder(), ANALYZER, add=add)


def look_at_index(embedder: Any, home: Path) -> Found:
    """Return the contents of an index and its answers, or nothing if there is no index."""
    enter(home)
    if not store.exists(home / "index"):
        return {}
    index = store.Index.open(home / "index")
    restored, lexical = index.restore(embedder()), index.lexical
    questions = [" ".join(_WORDS[i : i + 3]) for i in (0, 20, 40)]
    scores = restored.encode_queries(questions) @ np.asarray(index.vectors).T
    found = lexical.search(questions, 5, BM25Weights())
    return {
        "documents": index.all_documents(),
        "texts": [index.document_text(document.id) for document in index.all_documents()],
        "chunks": index.chunks(range(len(index))),
        "vectors": np.asarray(index.vectors).tobytes(),
        "nearest": np.argsort(-scores, axis=1, kind="stable").tolist(),
        "by words": [(s.tolist(), rows.tolist()) for s, rows in found],
        "postings": [
            np.asarray(getattr(lexical.postings, f.name)).tolist()
            for f in dataclasses.fields(lexical.postings)
        ],
        "settings": dict(index.manifest.settings),
    }


# --- prefill

_CONFIG = LlamaConfig(
    vocab_size=300,
    hidden_size=16,
    intermediate_size=16,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    head_dim=8,
    max_position_embeddings=512,
)
_TEMPLATE = PromptTemplate(user="{context} {question}", passage="{text}", system="Hi")


def _read(packed: None, tokens: np.ndarray) -> np.ndarray:
    """Return keys and values [B, L, 2, K, T, D] that depend on each token and its position, without a decoder."""
    shape = (len(tokens), 2, 2, 1, tokens.shape[1], 8)
    waves = np.sin(np.arange(2 * 2 * 8).reshape(2, 2, 1, 1, 8) + 1)
    positions = np.asarray(tokens)[:, None, None, None, :, None] + np.arange(tokens.shape[1])[:, None] / 7
    return np.broadcast_to(positions * waves / 300, shape).astype(np.float16)


def chunk_reader(dtype: str = "float16") -> ChunkKVCache:
    """Return a chunk reader without a decoder, whose `fill` calls `_read`."""
    chunk_cache.prefill_passages = _read
    engine = SimpleNamespace(model=SimpleNamespace(config=_CONFIG), packed=None)
    return ChunkKVCache(engine, byte_level(), "f" * 64, None, dtype)


def prompts(texts: Sequence[str]) -> list[list]:
    """Return a prompt for each text, as the only passage."""
    shown = (Context((Source(1, "a", 0, len(text), 1.0, text),), tokens=0) for text in texts)
    return [render(_TEMPLATE, "", context) for context in shown]


def passages_of(reader: ChunkKVCache, texts: Sequence[str]) -> Found:
    """Return the passages in the store."""
    entries = {}
    for messages in prompts(texts):
        entries |= dict.fromkeys(split_prompt(reader._tokenizer, messages).entries())
    found = {str(entry): reader.store.load(*entry) for entry in entries}
    return {name: kv.tobytes() for name, kv in found.items() if kv is not None}


def _prefill(texts: Sequence[str], home: Path) -> None:
    enter(home)
    chunk_reader().fill(prompts(texts))


def _look_at_passages(texts: Sequence[str], home: Path) -> Found:
    enter(home)
    return passages_of(chunk_reader(), texts)


# --- sweep


def jobs(draw: random.Random, count: int, longest: int) -> list[Experiment]:
    """Return two evaluations of one dataset: lexical and dense."""
    statistics.intervals = lambda values, options: np.stack(
        [values.min(0), values.max(0)], axis=1
    )  # without JAX
    texts = {f"d{i}": " ".join(draw.choices(_WORDS, k=draw.randint(3, longest))) for i in range(count)}
    dataset = Dataset(
        name="drawn",
        corpus=tuple(Document(name, name, text) for name, text in texts.items()),
        queries={f"q{i}": " ".join(draw.sample(text.split(), 2)) for i, text in enumerate(texts.values())},
        qrels={f"q{i}": {name: 1} for i, name in enumerate(texts)},
        answers={},
        unjudged={},
        unanswerable=frozenset(),
        drop_self_hits=False,
        problems=(),
    )
    prompt = PromptTemplate(user="{context} {question}", passage="{text}")
    common = {
        "dataset": dataset,
        "chunker": CHUNKER,
        "embedder": Hashed(),
        "generator": lambda: None,
        "prompt": prompt,
        "closed_book": PromptTemplate(user="{question}"),
        "evaluation": EvaluationOptions(depth=4, probes=1),
        "statistics": Statistics(resamples=100),
    }
    return [Experiment(**common, method=method) for method in (Lexical(analyzer=ANALYZER), Cosine())]


def _sweep(made: Sequence[Experiment], home: Path) -> None:
    enter(home)
    for job in made:
        job.run()


RESULTS = ("metrics.json", "per_query.jsonl", "run.trec")  # costs has seconds, which differ


def look_at_results(made: Sequence[Experiment], home: Path) -> Found:
    enter(home)
    done = [(i, job.result_folder) for i, job in enumerate(made) if job.result_folder.exists()]
    return {f"{i}/{name}": (folder / name).read_bytes() for i, folder in done for name in RESULTS}


# --- all of them


def workloads(folder: Path, seed: int) -> list[Workload]:
    """Return the workloads of one seed, and write their corpora into `folder`. Seed 0 has the smallest."""
    warm_up()
    draw = random.Random(seed)
    count, longest = (3, 30) if seed == 0 else (draw.randint(2, 12), draw.choice([20, 60, 600]))
    first = write_corpus(folder / "first", draw, count, longest)
    second = write_corpus(folder / "second", draw, count + 1, longest)  # with the same names and other texts
    texts = [" ".join(draw.choices(_WORDS, k=draw.randint(2, 12))) for _ in range(count + 2)]
    made = jobs(draw, 2 * count, longest)
    bag, hashed = partial(look_at_index, BagOfWords), partial(look_at_index, Hashed)
    return [
        Workload("ingest", lambda home: None, partial(_ingest, first, Hashed), hashed, True),
        Workload(
            "ingest again",
            partial(_ingest, first, BagOfWords),
            partial(_ingest, second, BagOfWords),
            bag,
            True,
        ),
        Workload(
            "add", partial(_ingest, first, Hashed), partial(_ingest, second, Hashed, add=True), hashed, True
        ),
        Workload(
            "prefill", lambda home: None, partial(_prefill, texts), partial(_look_at_passages, texts), False
        ),
        Workload("sweep", lambda home: None, partial(_sweep, made), partial(look_at_results, made), False),
    ]
