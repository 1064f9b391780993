"""What is killed: ingest, add, prefill and a sweep, small, in numpy alone, and each with a reader of what it wrote.

A home is a folder with an index in `index` and a cache in `cache`. All that a workload does is the same each time, down
to the bits of vectors, which depend on the batch that they were computed in.

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
from rag.generate.kv import chunk as chunk_kv
from rag.generate.kv.chunk import ChunkKVCache, ChunkKVOptions
from rag.index import store
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk.fixed import FixedChunker
from rag.models.llama.model import LlamaConfig
from rag.prompt import PromptTemplate, render
from rag.retrieve.search import Lexical
from rag.runtime.import_closure import code_version
from rag.types import Context, Document, Hit, Source
from tests.tiny_tokenizers import byte_level

Found = Mapping[str, Any]  # what a reader finds, by name

ANALYZER = Analyzer(stop_words=["ab"])
CHUNKER = FixedChunker(size=12, overlap=2)
_WORDS = tuple(a + b for a in "abcdefgh" for b in "abcdefgh")
_ENVIRONMENT = {"commit": "0" * 40}


@dataclass(frozen=True)
class Workload:
    """A writer, the state that it begins with, and what a reader of its home must find."""

    name: str
    before: Callable[[Path], None]  # makes the old state in an empty home
    write: Callable[[Path], None]
    look: Callable[[Path], Found]
    whole: (
        bool  # a reader finds all of the old or all of the new state, else no more than parts of the new one
    )


class Hashed:
    """An embedder of hashes: a text's vector depends on its batch too, as much as a rounding error would."""

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
        """Nothing was learned."""

    def restore(self, folder: Path) -> "Hashed":
        return self


def _numbers(text: str, count: int) -> np.ndarray:
    return np.frombuffer(hashlib.sha512(text.encode()).digest(), np.int16)[:count] / 2**15


@dataclass(frozen=True)
class Cosine:
    """Dense search in numpy."""

    uses: ClassVar[tuple[str, ...]] = ("embedder",)
    lowest: ClassVar[float] = -1.0

    def search(self, collection: Any, questions: Sequence[str], k: int) -> list[list[Hit]]:
        scores = collection.embedder.encode_queries(questions) @ np.asarray(collection.index.vectors).T
        best = np.argsort(-scores, axis=1, kind="stable")[:, :k]
        return [collection.hits(rows, row[rows]) for rows, row in zip(best, scores, strict=True)]


# --- homes and corpora


def enter(home: Path) -> None:
    """Let this process work in a home, and nothing in it start programs or JAX."""
    os.environ["RAG_CACHE"] = str(home / "cache")
    for module in list(sys.modules.values()):
        if getattr(module, "__name__", "").startswith("rag.") and hasattr(module, "environment"):
            module.environment = lambda: dict(_ENVIRONMENT)


def warm_up() -> None:
    """Let this process remember the code behind results, from the machine's own cache if it is there."""
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
    """All that an index holds, and what it answers; nothing where there is none."""
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
    """In place of the decoder: keys and values [B, L, 2, K, T, D] that depend on each token and its position."""
    shape = (len(tokens), 2, 2, 1, tokens.shape[1], 8)
    waves = np.sin(np.arange(2 * 2 * 8).reshape(2, 2, 1, 1, 8) + 1)
    places = np.asarray(tokens)[:, None, None, None, :, None] + np.arange(tokens.shape[1])[:, None] / 7
    return np.broadcast_to(places * waves / 300, shape).astype(np.float16)


def chunk_reader(dtype: str = "float16") -> ChunkKVCache:
    """Of a decoder that is not there: `fill` computes by `_read`."""
    chunk_kv.prefill_passages = _read
    engine = SimpleNamespace(model=SimpleNamespace(config=_CONFIG), packed=None)
    return ChunkKVCache(engine, byte_level(), "f" * 64, ChunkKVOptions(dtype=dtype))


def prompts(texts: Sequence[str]) -> list[list]:
    """A prompt for each text, shown alone."""
    shown = (Context((Source(1, "a", 0, len(text), 1.0, text),), tokens=0) for text in texts)
    return [render(_TEMPLATE, "", context) for context in shown]


def passages_of(reader: ChunkKVCache, texts: Sequence[str]) -> Found:
    """The passages that are in the store."""
    entries = {}
    for messages in prompts(texts):
        parts = chunk_kv.split_prompt(reader._tokenizer, messages)
        entries |= dict.fromkeys(
            [((), parts.beginning), *((parts.beginning, ids) for _, ids in parts.passages)]
        )
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
    """Two evaluations, by words and by vectors, of one dataset."""
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
        job.done()


RESULTS = ("metrics.json", "per_query.jsonl", "run.trec")  # the ledger tells seconds, which differ


def look_at_results(made: Sequence[Experiment], home: Path) -> Found:
    enter(home)
    done = [(i, job.kept) for i, job in enumerate(made) if job.kept.exists()]
    return {f"{i}/{name}": (folder / name).read_bytes() for i, folder in done for name in RESULTS}


# --- all of them


def workloads(folder: Path, seed: int) -> list[Workload]:
    """Those of one draw; their corpora are written into `folder`. Seed 0 is the smallest."""
    warm_up()
    draw = random.Random(seed)
    count, longest = (3, 30) if seed == 0 else (draw.randint(2, 12), draw.choice([20, 60, 600]))
    first = write_corpus(folder / "first", draw, count, longest)
    second = write_corpus(folder / "second", draw, count + 1, longest)  # the same names, other texts
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
