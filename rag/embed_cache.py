"""Vectors kept on disk by (embedder, text): nothing that was embedded once is embedded again.

    vectors/<embedder's version>/<batch>.npy      a row a text: its hash, its vector, the seconds it took
    vectors/<embedder's version>/<request>.todo   which of a request's texts were missing when it first came

A batch is written whole. What a request lacks is written down before its first batch is computed: after a kill the
same batches are formed again, so a resumed run gets the same vectors to the bit.

Letters: N texts, E embedding dim.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from rag.cache import atomic_file, cache_root, claimed, content_key, writing
from rag.closure import code_of
from rag.embed import Embedder, Progress
from rag.measure import Clock
from rag.memo import version_of

_BATCH = 256  # texts of a file: what a kill can lose


class CachedEmbedder:
    """An embedder whose vectors are kept; not for one that `fit` changes, whose vectors depend on the corpus too."""

    def __init__(self, embedder: Embedder, folder: Path | None = None):
        """`folder`: where vectors are kept, by default the cache's."""
        self.uncached = embedder
        version = content_key(version_of(embedder), code_of(type(self)))
        self._folder = (folder or cache_root() / "vectors") / version
        self._read: dict[bytes, np.void] = {}  # every text's row on disk, mapped into memory, by its hash
        self._files: set[Path] = set()  # that were read
        self.passages_s = 0.0  # that the passages' vectors took to compute, in this run or before
        self.passages = self.reused = 0  # given so far, and of them found on disk
        # What Embedder's protocol asks for, as the embedder has it.
        self.dim, self.fingerprint, self.spec = embedder.dim, embedder.fingerprint, embedder.spec
        self.relevant_from, self.token_spans = embedder.relevant_from, embedder.token_spans
        self.save = embedder.save

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        """The vectors of passages, in their order."""
        rows, new = self._kept("passage", texts, self.uncached.encode, progress)
        self.passages += len(rows)
        self.reused += len(rows) - new
        self.passages_s += sum(float(row["seconds"]) for row in rows.values())
        return self._stacked(rows, texts)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """The vectors of questions, in their order."""
        rows, _ = self._kept("question", texts, lambda texts, progress: self.uncached.encode_queries(texts))
        return self._stacked(rows, texts)

    def missing(self, texts: Sequence[str]) -> int:
        """How many different passages would have to be computed."""
        return len(_hashes("passage", texts).keys() - self._rows().keys())

    def fit(self, texts: Sequence[str]) -> "CachedEmbedder":
        return self

    def restore(self, folder: Path) -> "CachedEmbedder":
        return self

    def __getattr__(self, name: str) -> Any:
        """What a particular kind of embedder offers beyond the protocol."""
        return getattr(self.uncached, name)

    def _kept(
        self, kind: str, texts: Sequence[str], encode: Callable, progress: Progress = lambda done: None
    ) -> tuple[dict[str, np.void], int]:
        """Each different text's row, and how many of them had to be computed."""
        unique, rows = _hashes(kind, texts), self._rows()
        known = len(unique.keys() & rows.keys())
        if known < len(unique):
            with claimed(self._folder / "vectors"):
                self._compute(unique, encode, lambda done: progress(known + done))
            rows = self._rows()
        progress(len(texts))
        return {text: rows[key] for key, text in unique.items()}, len(unique) - known

    def _stacked(self, rows: dict[str, np.void], texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        vectors = np.empty((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = rows[text]["vector"]
        return vectors

    def _compute(self, unique: dict[bytes, str], encode: Callable, progress: Progress) -> None:
        """Write what is missing of `unique`, in the batches that were planned when this request first came."""
        keys, rows = list(unique), self._rows()
        plan = self._folder / f"{content_key(keys)}.todo"
        if not plan.exists():
            with writing(), atomic_file(plan, "w") as file:
                json.dump([i for i, key in enumerate(keys) if key not in rows], file)
        todo = json.loads(plan.read_text())
        for start in range(0, len(todo), _BATCH):
            batch = [keys[i] for i in todo[start : start + _BATCH]]
            if any(key not in rows for key in batch):
                self._write(batch, [unique[key] for key in batch], partial(encode, progress=progress))
        plan.unlink()

    def _write(self, keys: list[bytes], texts: list[str], encode: Callable) -> None:
        """Embed a planned batch whole; a vector that is there by now, and was used, stays the one that counts."""
        begin = Clock.now()
        made = np.empty(len(texts), self._row)
        made["vector"] = encode(texts)
        made["seconds"] = (Clock.now() - begin).working / len(texts)
        made["text"] = np.frombuffer(b"".join(keys), "V32")
        new = [key not in self._rows() for key in keys]
        with writing(), atomic_file(self._folder / f"{content_key(keys)}.npy") as file:
            np.save(file, made[new])

    @property
    def _row(self) -> np.dtype:
        return np.dtype([("text", "V32"), ("seconds", np.float32), ("vector", np.float32, (self.dim,))])

    def _rows(self) -> dict[bytes, np.void]:
        """All rows on disk; only files that are new since the last call are read."""
        for path in sorted(set(self._folder.glob("*.npy")) - self._files):
            batch = np.load(path, mmap_mode="r", allow_pickle=False)
            self._read |= zip((key.tobytes() for key in batch["text"]), batch, strict=True)
            self._files.add(path)
        return self._read


def cached(embedder: Embedder) -> Embedder:
    """The embedder with its vectors kept, unless `fit` changes it: then a vector depends on the corpus too."""
    return CachedEmbedder(embedder) if embedder.fit([]) is embedder else embedder


def _hashes(kind: str, texts: Sequence[str]) -> dict[bytes, str]:
    """Each different text by its hash, in the order of first appearance."""
    return {
        hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest(): text for text in texts
    }
