"""Embed texts with any embedder, and check that it returned vectors: the door through which vectors enter.

Letters: N texts, E embedding dim.
"""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jaxtyping import Float32

from rag.embed import Embedder, Progress
from rag.runtime.stages import wrong_result


def encode_passages(
    embedder: Embedder, texts: Sequence[str], progress: Progress = lambda done: None
) -> Float32[np.ndarray, "N E"]:
    """Return the vectors of passages. Raises UserError where the embedder returns something else."""
    return _checked(embedder, "encode", embedder.encode(texts, progress=progress), len(texts))


def encode_queries(embedder: Embedder, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
    """Return the vectors of questions. Raises UserError where the embedder returns something else."""
    return _checked(embedder, "encode_queries", embedder.encode_queries(texts), len(texts))


def _checked(embedder: Embedder, method: str, vectors: Any, count: int) -> Float32[np.ndarray, "N E"]:
    if (
        not isinstance(vectors, np.ndarray | jax.Array)
        or vectors.shape != (count, embedder.dim)
        or vectors.dtype.kind != "f"
    ):
        found = f", not {vectors.dtype} of shape {vectors.shape}" if hasattr(vectors, "dtype") else ""
        wanted = f"a numpy array of floats of shape {(count, embedder.dim)}, one row a text{found}"
        raise wrong_result(embedder, method, vectors, wanted)
    return np.asarray(vectors, np.float32)
