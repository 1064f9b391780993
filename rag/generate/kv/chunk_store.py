"""The files of precomputed chunk KV caches.

    chunk_kv/<key>.npy   [L, 2, K, T, D] float16: keys, values; or int8 with a float32 scale for each vector

The key is made of the model and its code, the ids of the prefix and those of the passage. Files appear whole or not
at all; one that has changed since is computed again.

Letters: L layers, K kv heads, T tokens of a passage, D head dim.
"""

import io
from functools import partial
from pathlib import Path
from typing import Literal

import numpy as np
from jaxtyping import Float16, Shaped

from rag.generate.kv.prompt_parts import Ids
from rag.runtime.cache import entries
from rag.runtime.cache.keys import content_key
from rag.runtime.checksums import Damaged

KVDtype = Literal["float16", "int8"]


class ChunkKVStore:
    """Stores the KV caches of passages for one model, a file each."""

    def __init__(self, folder: Path, model: str, shape: tuple[int, int, int], dtype: KVDtype):
        """Use the files of one model.

        Args:
            folder: of the files.
            model: the cache key of the model and its code.
            shape: layers, kv heads, head dim.
            dtype: of the files.
        """
        self.folder, self._model, self._shape, self._dtype = folder, model, shape, dtype

    @property
    def dtype(self) -> np.dtype:
        """Return the dtype of a file's items: a number, or a vector of int8 with its scale."""
        if self._dtype == "float16":
            return np.dtype(np.float16)
        return np.dtype([("scale", np.float32), ("values", np.int8, (self._shape[2],))])

    @property
    def token_bytes(self) -> int:
        """Return the bytes of a token in a file."""
        layers, heads, dim = self._shape
        return layers * 2 * heads * self.dtype.itemsize * (dim if self._dtype == "float16" else 1)

    def path(self, prefix: Ids, passage: Ids) -> Path:
        """Return the file of a passage that is prefilled after this prefix."""
        return self.folder / f"{content_key(self._model, self._dtype, prefix, passage)}.npy"

    def load(self, prefix: Ids, passage: Ids) -> Shaped[np.ndarray, "L 2 K T *D"] | None:
        """Return a passage's keys and values, memory-mapped; None without a file and, with a notice, if damaged."""
        return entries.get(self.path(prefix, passage), partial(self._opened, tokens=len(passage)))

    def _opened(self, path: Path, tokens: int) -> Shaped[np.ndarray, "L 2 K T *D"]:
        found = entries.read_array(path)
        layers, heads, dim = self._shape
        vector = (dim,) if self._dtype == "float16" else ()
        if found.dtype != self.dtype or found.shape != (layers, 2, heads, tokens, *vector):
            raise Damaged(f"{path} is no passage of this model")
        return found

    def save(self, prefix: Ids, passage: Ids, kv: Float16[np.ndarray, "L 2 K T D"]) -> None:
        """Write a passage's keys and values. Raises UserError when they cannot be written."""
        content = io.BytesIO()
        np.save(content, np.ascontiguousarray(kv) if self._dtype == "float16" else self._quantized(kv))
        entries.write(self.path(prefix, passage), content.getvalue())

    def _quantized(self, kv: Float16[np.ndarray, "L 2 K T D"]) -> Shaped[np.ndarray, "L 2 K T"]:
        vectors = kv.astype(np.float32)
        quantized = np.empty(kv.shape[:-1], self.dtype)
        quantized["scale"] = np.maximum(np.abs(vectors).max(axis=-1), 1e-12) / 127
        quantized["values"] = np.rint(vectors / quantized["scale"][..., None])
        return quantized
