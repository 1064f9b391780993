"""Bag-of-words vectors: word counts divided by their norm.

Letters: N texts, E embedding dim (the words of the vocabulary), n words of a text.
"""

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
from pydantic import TypeAdapter

from rag.embed import Progress
from rag.runtime.cache.keys import content_key
from rag.runtime.options import checked
from rag.runtime.records import reason
from rag.types import UserError

BAG_OF_WORDS_VERSION = 1

Bytes = Annotated[int, Ge(1), Le(2**50)]
_VOCABULARY = "vocabulary.json"


class BagOfWords:
    """Embed texts by their word counts: lower-case the text, split it at each space, count, divide by the norm.

    Between two spaces in a row there is an empty word, which counts like any other; punctuation stays with its word.
    The vocabulary is that of the corpus; `fit` learns it, and the index stores it. Words of a question that the corpus
    does not have are no dimension, but they count in its norm, so every score is the cosine of all counts. A question
    with no word of the corpus has the zero vector and scores 0.
    """

    @checked
    def __init__(
        self,
        max_bytes: Bytes = 1 << 30,
        score_threshold: float | None = None,
        vocabulary: Sequence[str] = (),
    ):
        """Make an embedder with a known vocabulary; without one it must be fitted.

        Args:
            max_bytes: the largest matrix (passages by words, float32) that `fit` accepts.
            score_threshold: see rag.embed.Embedder.
            vocabulary: the words, one for each dimension.
        """
        self._max_bytes = max_bytes
        self.score_threshold = score_threshold
        self._column = {word: i for i, word in enumerate(vocabulary)}
        self.dim = len(self._column)
        self.spec = {"kind": "bag_of_words", "dim": self.dim}
        # Without the vocabulary, which is that of an index.
        self.fingerprint = content_key("bag_of_words", BAG_OF_WORDS_VERSION)

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        if not self._column:
            raise RuntimeError("a bag of words has no dimensions before fit() or restore()")
        vectors = np.zeros((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = self.vector(text)
        progress(len(texts))
        return vectors

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        return self.encode(texts)

    def vector(self, text: str) -> Float64[np.ndarray, "E"]:
        """Return the vector of one text in float64."""
        counts = Counter(words(text))
        norm = math.sqrt(sum(count**2 for count in counts.values()))
        vector = np.zeros(self.dim)
        for word, count in counts.items():
            if word in self._column:
                vector[self._column[word]] = count / norm
        return vector

    def token_spans(self, text: str) -> Int[np.ndarray, "n 2"]:
        """Return the spans of the words; empty words have no span."""
        return np.array([found.span() for found in re.finditer("[^ ]+", text)], np.int64).reshape(-1, 2)

    def fit(self, texts: Sequence[str]) -> "BagOfWords":
        """Return an embedder with the vocabulary of these texts.

        Raises UserError when their matrix would exceed `max_bytes`.
        """
        vocabulary = sorted({word for text in texts for word in words(text)})
        size = 4 * len(texts) * len(vocabulary)
        if size > self._max_bytes:
            raise UserError(
                f"{len(texts)} passages of {len(vocabulary)} different words make a bag_of_words matrix of "
                f"{size:,} bytes, more than embedder.max_bytes={self._max_bytes:,}: take embedder=minilm"
            )
        return BagOfWords(self._max_bytes, self.score_threshold, vocabulary)

    def save(self, folder: Path) -> None:
        (folder / _VOCABULARY).write_text(
            json.dumps(list(self._column), ensure_ascii=False), encoding="utf-8"
        )

    def restore(self, folder: Path) -> "BagOfWords":
        """Return an embedder with the vocabulary that `save` wrote. Raises UserError when it cannot be read."""
        path = folder / _VOCABULARY
        try:
            vocabulary = TypeAdapter(list[str]).validate_json(path.read_bytes(), strict=True)
        except (OSError, ValueError) as error:
            raise UserError(
                f"cannot read the index's words in {path} ({reason(error)}); ingest the corpus again"
            ) from error
        return BagOfWords(self._max_bytes, self.score_threshold, vocabulary)


def words(text: str) -> list[str]:
    """Return the words of a text, empty ones included."""
    return text.lower().split(" ")
