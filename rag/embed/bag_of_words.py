"""Bag-of-words vectors: normalised word counts."""

import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Float32, Float64, Int

from rag.embed import Progress
from rag.runtime import cache_key
from rag.runtime.options import checked
from rag.types import UserError

BAG_OF_WORDS_VERSION = 1

Bytes = Annotated[int, Ge(1), Le(2**50)]
_VOCABULARY = "vocabulary.json"


class BagOfWords:
    """The cosine of word counts: lower-cased, split at each space, counted, divided by the counts' norm.

    Two spaces in a row enclose an empty word, which counts as any other; punctuation stays with its word. The
    vocabulary is the corpus's, learned by `fit` and kept with the index. A question's words that the corpus
    lacks have no dimension, but they do lengthen its norm, so every score is the cosine of all the counts; a
    question of such words alone is the zero vector and scores 0.
    """

    @checked
    def __init__(
        self,
        max_bytes: Bytes = 1 << 30,
        score_threshold: float | None = None,
        vocabulary: Sequence[str] = (),
    ):
        """`max_bytes`: the largest matrix of passages by words, float32, that `fit` lets an index have."""
        self._max_bytes = max_bytes
        self.score_threshold = score_threshold
        self._place = {word: i for i, word in enumerate(vocabulary)}
        self.dim = len(self._place)
        self.spec = {"kind": "bag_of_words", "dim": self.dim}
        self.fingerprint = cache_key.content_key(
            "bag_of_words", BAG_OF_WORDS_VERSION
        )  # the vocabulary is the index's

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        if not self._place:
            raise RuntimeError("a bag of words has no dimensions before fit() or restore()")
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = self.vector(text)
        progress(len(texts))
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        return self.encode(texts)

    def vector(self, text: str) -> Float64[np.ndarray, "E"]:
        """One text's vector, not yet rounded to float32."""
        counts = Counter(words(text))
        norm = math.sqrt(sum(count**2 for count in counts.values()))
        vector = np.zeros(self.dim)
        for word, count in counts.items():
            if word in self._place:
                vector[self._place[word]] = count / norm
        return vector

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """The stretches between spaces; empty words have no span."""
        return np.array([found.span() for found in re.finditer("[^ ]+", text)], np.int64).reshape(-1, 2)

    def fit(self, texts: Sequence[str]) -> "BagOfWords":
        """With the vocabulary of these texts; UserError when their matrix would exceed `max_bytes`."""
        vocabulary = sorted({word for text in texts for word in words(text)})
        size = 4 * len(texts) * len(vocabulary)
        if size > self._max_bytes:
            raise UserError(
                f"{len(texts)} passages of {len(vocabulary)} different words make a bag_of_words matrix of "
                f"{size:,} bytes, more than embedder.max_bytes={self._max_bytes:,}: take embedder=minilm"
            )
        return BagOfWords(self._max_bytes, self.score_threshold, vocabulary)

    def save(self, folder: Path) -> None:
        (folder / _VOCABULARY).write_text(json.dumps(list(self._place), ensure_ascii=False), encoding="utf-8")

    def restore(self, folder: Path) -> "BagOfWords":
        """With the vocabulary that `save` wrote there. UserError when there is none."""
        path = folder / _VOCABULARY
        try:
            vocabulary = json.loads(path.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the index's words in {path} ({error}); ingest the corpus again"
            ) from error
        return BagOfWords(self._max_bytes, self.score_threshold, vocabulary)


def words(text: str) -> list[str]:
    """The words that are counted, empty ones included."""
    return text.lower().split(" ")
