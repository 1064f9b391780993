"""Texts to vectors, end to end with tokenising: our encoder beside sentence-transformers, float32, all cores.

The texts are stretches of the sample documents, their lengths drawn from a log-normal distribution.
"""

import random
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rag.embed import BertEmbedder
from rag.measure import Row, Timing, alternate, cores, ratio
from rag.models import hub

Encode = Callable[[list[str]], np.ndarray]  # texts -> unit vectors, N x E

_PEER = "sentence-transformers"
_DOCUMENTS = Path(__file__).parents[2] / "data" / "sample" / "documents"


@dataclass(frozen=True)
class Embed:
    """bench=embed: texts and tokens per second, and how far the two libraries' vectors agree."""

    weights: str = hub.DEFAULT_EMBEDDER
    tokens_per_batch: int = 1024
    texts: int = 1000
    median_words: int = 70
    spread: float = 0.7  # standard deviation of the logarithm of the words
    batch_size: int = 32  # of sentence-transformers; its own default
    repeats: int = 3

    def run(self) -> list[Row]:
        embedder = BertEmbedder(self.weights, tokens_per_batch=self.tokens_per_batch)
        texts = mixed_texts(self.texts, self.median_words, self.spread)
        limit = embedder.spec["pooling"]["max_length"]
        tokens = sum(min(2 + len(embedder.token_spans(text)), limit) for text in texts)
        encoders: dict[str, Encode] = {"ours": embedder.encode}
        if peer := _sentence_transformers(str(hub.local_path(self.weights)), self.batch_size):
            encoders[_PEER] = peer
        vectors: dict[str, np.ndarray] = {}

        def call(name: str) -> Callable[[], None]:
            def encode() -> None:
                vectors[name] = encoders[name](texts)

            return encode

        timings = alternate({name: call(name) for name in encoders}, repeats=self.repeats)
        figures = {name: _figures(timing, len(texts), tokens) for name, timing in timings.items()}
        ours, ratios = figures.pop("ours"), {}
        if _PEER in figures:
            ours["min cosine"] = float(np.sum(vectors["ours"] * vectors[_PEER], axis=1).min())
            ratios[_PEER] = ratio(timings["ours"], timings[_PEER])
        return [Row(f"{len(texts)} texts, {tokens} tokens", ours, figures, ratios)]


def mixed_texts(count: int, median_words: int, spread: float) -> list[str]:
    """The same texts every time, from the sample documents."""
    words = " ".join(path.read_text(encoding="utf-8") for path in sorted(_DOCUMENTS.iterdir())).split()
    draw, texts = random.Random(0), []
    for _ in range(count):
        size = min(len(words) - 1, max(1, round(median_words * draw.lognormvariate(0, spread))))
        start = draw.randrange(len(words) - size)
        texts.append(" ".join(words[start : start + size]))
    return texts


def _figures(timing: Timing, texts: int, tokens: int) -> dict[str, float]:
    return {"texts/s": texts / timing.median, "tokens/s": tokens / timing.median}


def _sentence_transformers(folder: str, batch_size: int) -> Encode | None:
    try:
        import torch
        from sentence_transformers import SentenceTransformer
    except ImportError:
        print(f"{_PEER} is not installed: its column is left out (make bench-setup)", file=sys.stderr)
        return None
    torch.set_num_threads(cores())
    model = SentenceTransformer(folder, device="cpu")
    options = {"batch_size": batch_size, "normalize_embeddings": True, "show_progress_bar": False}
    return lambda texts: model.encode(texts, **options)
