"""Cache vectors on disk by embedder and text, so that no text is embedded twice.

    vectors/<embedder's version>/<batch>.npy      one row a text: its hash, its vector, the seconds that it took
    vectors/<embedder's version>/<request>.todo   the plan of a request: which of its texts were missing at first

A batch is one file, written as a whole. The plan is written before the first batch is computed: if the process is
killed, the next one forms the same batches from it, so that a resumed run gets the same vectors to the bit.

Letters: N texts, E embedding dim.
"""

import hashlib
import io
import os
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float32

from rag.embed import Embedder, Progress
from rag.embed.encode import encode_passages, encode_queries
from rag.runtime.cache import entries
from rag.runtime.cache.folder import cache_root, entry_lock, notice, write_errors
from rag.runtime.cache.keys import content_key
from rag.runtime.cache.memo import model_version
from rag.runtime.checksums import Damaged
from rag.runtime.code.import_closure import code_version
from rag.runtime.machine.clock import Clock
from rag.runtime.records import Record

_BATCH = 256  # texts in a file: a killed process loses at most so many


class _MissingTexts(Record):
    """The indices of the texts of a request that were missing when it was first made."""

    missing: list[int]


class CachedEmbedder:
    """An embedder that caches the vectors of another one on disk.

    It must not wrap an embedder that `fit` changes, whose vectors depend on the corpus too (see `cached`).

    Attributes:
        uncached: the wrapped embedder.
        passages: how many different passages were asked for so far.
        reused: how many of these were read from disk.
        passages_s: the seconds that computing the passages' vectors took, in this run or an earlier one.
    """

    def __init__(self, embedder: Embedder, folder: Path | None = None):
        """Wrap an embedder; `folder` is where vectors are cached, by default in the cache folder."""
        self.uncached = embedder
        version = content_key(model_version(embedder), code_version(type(self)))
        self._folder = (folder or cache_root() / "vectors") / version
        self._rows: dict[bytes, np.void] = {}  # the memory-mapped row of every text on disk, by its hash
        self._files: set[str] = set()  # names of the files that were read
        self.passages_s = 0.0
        self.passages = self.reused = 0
        self.dim, self.fingerprint, self.spec = embedder.dim, embedder.fingerprint, embedder.spec
        self.score_threshold, self.token_spans = embedder.score_threshold, embedder.token_spans
        self.save = embedder.save

    def encode(
        self, texts: Sequence[str], progress: Progress = lambda done: None
    ) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of passages, in their order."""
        rows, new = self._cached_rows("passage", texts, partial(encode_passages, self.uncached), progress)
        self.passages += len(rows)
        self.reused += len(rows) - new
        self.passages_s += sum(float(row["seconds"]) for row in rows.values())
        return self._vectors(rows, texts)

    def encode_queries(self, texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        """Return the vectors of questions, in their order."""
        rows, _ = self._cached_rows(
            "question", texts, lambda texts, progress: encode_queries(self.uncached, texts)
        )
        return self._vectors(rows, texts)

    def missing(self, texts: Sequence[str]) -> int:
        """Return how many different passages are not on disk."""
        return len(self._missing(_hashes("passage", texts)))

    def fit(self, texts: Sequence[str]) -> "CachedEmbedder":
        return self

    def restore(self, folder: Path) -> "CachedEmbedder":
        return self

    def __getattr__(self, name: str) -> Any:
        """Return an attribute of the wrapped embedder that is not in the protocol."""
        return getattr(self.uncached, name)

    def _cached_rows(
        self, kind: str, texts: Sequence[str], encode: Callable, progress: Progress = lambda done: None
    ) -> tuple[dict[str, np.void], int]:
        """Return the row of each different text, and how many of them had to be computed."""
        unique = _hashes(kind, texts)
        missing = len(self._missing(unique))
        if missing:
            with entry_lock(self._folder / "vectors"):
                self._compute(unique, encode, lambda done: progress(len(unique) - missing + done))
        progress(len(texts))
        return {text: self._rows[key] for key, text in unique.items()}, missing

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """Return the keys that have no row. New files in the folder are read only if there are such keys."""
        if missing := [key for key in keys if key not in self._rows]:
            self._read_new_files()
            missing = [key for key in missing if key not in self._rows]
        return missing

    def _vectors(self, rows: dict[str, np.void], texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        vectors = np.empty((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = rows[text]["vector"]
        return vectors

    def _compute(self, unique: dict[bytes, str], encode: Callable, progress: Progress) -> None:
        """Compute and write the missing rows, in the batches of the plan that the first such request wrote."""
        self._read_new_files(remove_damaged=True)
        keys = list(unique)
        path = self._folder / f"{content_key(keys)}.todo"
        if (plan := entries.get(path, partial(entries.read_record, schema=_MissingTexts))) is None:
            plan = _MissingTexts(missing=[i for i, key in enumerate(keys) if key not in self._rows])
            entries.write(path, plan.model_dump_json().encode())
        self._compute_missing([keys[i] for i in plan.missing], unique, encode, progress)
        lost = [key for key in keys if key not in self._rows]  # damaged or evicted since the plan
        self._compute_missing(lost, unique, encode, progress)
        with write_errors():
            path.unlink(missing_ok=True)

    def _compute_missing(
        self, keys: list[bytes], texts: dict[bytes, str], encode: Callable, progress: Progress
    ) -> None:
        """Embed and write these texts in batches; a batch of which every text has a row is left out."""
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            if any(key not in self._rows for key in batch):
                self._write(batch, [texts[key] for key in batch], partial(encode, progress=progress))

    def _write(self, keys: list[bytes], texts: list[str], encode: Callable) -> None:
        """Embed a planned batch as a whole; a row that exists by now is not replaced, because it may have been used."""
        begin = Clock.now()
        made = np.empty(len(texts), self._row)
        made["vector"] = encode(texts)
        made["seconds"] = (Clock.now() - begin).working / len(texts)
        made["text"] = np.frombuffer(b"".join(keys), "V32")
        new = [i for i, key in enumerate(keys) if key not in self._rows]
        content, path = io.BytesIO(), self._folder / f"{content_key([keys[i] for i in new])}.npy"
        np.save(content, made[new])
        entries.write(path, content.getvalue())
        self._read_file(path)

    @property
    def _row(self) -> np.dtype:
        """The dtype of a row."""
        return np.dtype([("text", "V32"), ("seconds", np.float32), ("vector", np.float32, (self.dim,))])

    def _read_new_files(self, *, remove_damaged: bool = False) -> None:
        """Read the rows of files that are new since the last call; damaged files are ignored, or removed."""
        try:
            names = {name for name in os.listdir(self._folder) if name.endswith(".npy")}
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in sorted(names - self._files):
            try:
                self._read_file(self._folder / name)
            except FileNotFoundError:  # it was evicted meanwhile
                continue
            except (Damaged, OSError) as damage:
                if remove_damaged:
                    notice(f"{damage}: its vectors are computed again.")
                    with write_errors():
                        (self._folder / name).unlink(missing_ok=True)

    def _read_file(self, path: Path) -> None:
        batch = entries.read_array(path)
        if batch.dtype != self._row or batch.ndim != 1:
            raise Damaged(f"{path} holds other vectors")
        self._rows |= zip((key.tobytes() for key in batch["text"]), batch, strict=True)
        self._files.add(path.name)


def cached(embedder: Embedder) -> Embedder:
    """Return an embedder that caches its vectors, or the embedder itself if `fit` changes it with the corpus."""
    return CachedEmbedder(embedder) if embedder.fit([]) is embedder else embedder


def _hashes(kind: str, texts: Sequence[str]) -> dict[bytes, str]:
    """Return the different texts by their hashes, in the order of their first appearance."""
    return {
        hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest(): text for text in texts
    }
