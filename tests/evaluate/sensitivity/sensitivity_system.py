"""Systems for tests of numerical sensitivity: a dataset of random words, models that depend on their batch, oracles."""

import math

import numpy as np
import pytest

from rag.context import ContextOptions
from rag.evaluate.datasets import Dataset
from rag.evaluate.sensitivity.options import SystemUnderTest
from rag.ingest.chunk.whole import WholeChunker
from rag.pipeline import AnswerOptions, Reader
from rag.prompt import PromptTemplate
from rag.retrieve.search import Dense
from rag.types import Document

WORDS = "seal whale gull krill fish ice cliff storm tide moss reef wind".split()
TEMPLATE = PromptTemplate(
    system="", user="{context} {question}", passage="{text}", separator=" ", abstain_answer=""
)
FEW = {"tokens_per_batch": (16, 512), "search_batches": (1, 3, "all"), "answers": 0}


def dataset(count: int = 12, questions: int = 7) -> Dataset:
    """Texts of random words; each question is about the document of its number, graded 2, and the next one, 1."""
    draw = np.random.default_rng(0)
    texts = [" ".join(draw.choice(WORDS, draw.integers(3, 9))) for _ in range(count)]
    names = [f"q{i}" for i in range(questions)]
    return Dataset(
        name="tiny",
        corpus=tuple(Document(f"d{i}", f"d{i}", text) for i, text in enumerate(texts)),
        queries={name: " ".join(draw.choice(WORDS, 3)) for name in names},
        qrels={name: {f"d{i}": 2, f"d{i + 1}": 1} for i, name in enumerate(names)},
        answers=dict.fromkeys(names, ("stand still",)),
        unjudged={},
        unanswerable=frozenset(),
        drop_self_hits=False,
        problems=(),
    )


class RandomEmbedder:
    """An embedder with faults: random unit vectors of the first `characters` of a text.

    With `flips_single` the vector of a question that is embedded alone has the opposite sign.
    """

    dim, score_threshold, spec = 4, None, {"kind": "random"}

    def __init__(self, characters: int | None = None, flips_single: bool = False):
        self.characters, self.flips_single = characters, flips_single
        self.fingerprint = f"random {characters} {flips_single}"

    def encode(self, texts, progress=lambda done: None):
        rows = [self.point(text[: self.characters]) for text in texts]
        return np.array(rows, np.float32).reshape(-1, self.dim)

    def encode_queries(self, texts):
        return self.encode(texts) * np.float32(-1 if self.flips_single and len(texts) == 1 else 1)

    def point(self, text):
        vector = np.random.default_rng(list(text.encode())).normal(size=self.dim)
        return vector / np.linalg.norm(vector)

    def token_spans(self, text):
        return np.zeros((0, 2), np.int64)

    def fit(self, texts):
        return self

    def save(self, folder):
        pass

    def restore(self, folder):
        return self


class BatchDependentGenerator:
    """A generator whose answer is right for a batch of one, and cut short in bfloat16."""

    fingerprint, description, context_length = "batch dependent", "one that depends on its batch", 10_000

    def __init__(self, dtype: str = "float32"):
        self.dtype, self.calls = dtype, []

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def generate(self, requests):
        self.calls.append(len(requests))
        text = "stand" if self.dtype == "bfloat16" else "stand still" if len(requests) == 1 else "run"
        return [text] * len(requests)

    def stream(self, request):
        raise NotImplementedError


def reader(generator) -> Reader:
    return Reader(generator, TEMPLATE, ContextOptions(min_score=None), options=AnswerOptions(8))


def system(embedder, method=None, generator=BatchDependentGenerator, **makers) -> SystemUnderTest:
    return SystemUnderTest(
        dataset(), WholeChunker(), embedder, method or Dense(), generator, reader, **makers
    )


def by_setting(rows) -> dict:
    return {(row.axis, row.setting): row for row in rows}


# --- oracles: rankings and measures by numpy alone


def ranked(passages: np.ndarray, questions: np.ndarray, k: int) -> list[list[int]]:
    scores = questions.astype(np.float64) @ passages.astype(np.float64).T
    return [np.argsort(-row, kind="stable")[:k].tolist() for row in scores]


def ndcg(ranking: list[int], number: int) -> float:
    """Question `number` with its document graded 2 and the next graded 1."""
    gains = {number: 2, number + 1: 1}
    found = sum(gains.get(document, 0) / math.log2(rank + 2) for rank, document in enumerate(ranking))
    return found / (2 + 1 / math.log2(3))


def texts() -> tuple[list[str], list[str]]:
    return [document.text for document in dataset().corpus], list(dataset().queries.values())


def bfloat16(vectors: np.ndarray) -> np.ndarray:
    """The upper half of a float32's bits, rounded to nearest, ties to even."""
    bits = vectors.astype(np.float32).view(np.uint32)
    upper = (bits + 0x7FFF + ((bits >> 16) & 1)) & 0xFFFF0000
    return upper.astype(np.uint32).view(np.float32)


def check_against(row, before: list[list[int]], after: list[list[int]]) -> None:
    """The row's counts are those of two lists of rankings."""
    pairs = list(enumerate(zip(before, after, strict=True)))
    assert row.changed == tuple(f"q{i}" for i, (old, new) in pairs if old != new)
    assert row.replaced == tuple(f"q{i}" for i, (old, new) in pairs if set(old) != set(new))
    moves = [ndcg(new, i) - ndcg(old, i) for i, (old, new) in pairs]
    [movement] = row.movements.values()
    assert movement.change == pytest.approx(np.mean(moves), abs=1e-6)
    assert movement.largest == pytest.approx(np.abs(moves).max(), abs=1e-6)
    assert movement.mean == pytest.approx(np.mean([ndcg(new, i) for i, new in enumerate(after)]), abs=1e-6)
