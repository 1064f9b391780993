"""Vectors rounded to a dtype of fewer bits, and an embedder that returns such vectors.

N texts, E embedding dim
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from rag.embed import Embedder, Progress
from rag.runtime.cache.keys import content_key


def reduce_precision(vectors: Float32[np.ndarray, "N E"], dtype: str) -> Float32[np.ndarray, "N E"]:
    """Return the vectors in float32, rounded to `dtype`."""
    return np.asarray(vectors).astype(jnp.dtype(dtype)).astype(np.float32)


class ReducedPrecisionEmbedder:
    """An embedder with the vectors of another one, rounded to a dtype; float32 changes nothing."""

    def __init__(self, embedder: Embedder, dtype: str):
        self._exact, self._dtype = embedder, dtype
        # The protocol's other members are those of the inner embedder.
        self.dim, self.spec, self.score_threshold = embedder.dim, embedder.spec, embedder.score_threshold
        self.token_spans, self.save = embedder.token_spans, embedder.save
        self.fingerprint = content_key("rounded", embedder.fingerprint, dtype)

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of passages, in their order."""
        return reduce_precision(self._exact.encode(texts, progress), self._dtype)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of questions, in their order."""
        return reduce_precision(self._exact.encode_queries(texts), self._dtype)

    def fit(self, texts: Sequence[str]) -> "ReducedPrecisionEmbedder":
        """Return the inner embedder fitted to a corpus, with rounded vectors."""
        return ReducedPrecisionEmbedder(self._exact.fit(texts), self._dtype)

    def restore(self, folder: Path) -> "ReducedPrecisionEmbedder":
        """Return the inner embedder as stored with an index, with rounded vectors."""
        return ReducedPrecisionEmbedder(self._exact.restore(folder), self._dtype)

    def __getattr__(self, name: str) -> Any:
        """Return a member of the inner embedder that is not in the protocol, such as vectors of tokens: not rounded."""
        return getattr(self._exact, name)
