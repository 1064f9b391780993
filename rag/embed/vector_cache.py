"""Vectors kept on disk by (embedder, text): nothing that was embedded once is embedded again.

    vectors/<embedder's version>/<batch>.npy      a row a text: its hash, its vector, the seconds it took
    vectors/<embedder's version>/<request>.todo   which of a request's texts were missing when it first came

A batch is written whole. What a request lacks is written down before its first batch is computed: after a kill the
same batches are formed again, so a resumed run gets the same vectors to the bit.

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
from rag.runtime import cache as entries
from rag.runtime.cache_key import content_key
from rag.runtime.checksums import Damaged
from rag.runtime.clock import Clock
from rag.runtime.files import cache_root, entry_lock, notice, write_errors
from rag.runtime.import_closure import code_version
from rag.runtime.memo import model_version
from rag.runtime.records import Record

_BATCH = 256  # texts of a file: what a kill can lose


class _Plan(Record):
    """Which of a request's texts were missing, by their place."""

    missing: list[int]


class CachedEmbedder:
    """An embedder whose vectors are kept; not for one that `fit` changes, whose vectors depend on the corpus too."""

    def __init__(self, embedder: Embedder, folder: Path | None = None):
        """`folder`: where vectors are kept, by default the cache's."""
        self.uncached = embedder
        version = content_key(model_version(embedder), code_version(type(self)))
        self._folder = (folder or cache_root() / "vectors") / version
        self._rows: dict[bytes, np.void] = {}  # every text's row on disk, mapped into memory, by its hash
        self._files: set[str] = set()  # that were read, by name
        self.passages_s = 0.0  # that the passages' vectors took to compute, in this run or before
        self.passages = self.reused = 0  # given so far, and of them found on disk
        # What Embedder's protocol asks for, as the embedder has it.
        self.dim, self.fingerprint, self.spec = embedder.dim, embedder.fingerprint, embedder.spec
        self.score_threshold, self.token_spans = embedder.score_threshold, embedder.token_spans
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
        return len(self._missing(_hashes("passage", texts)))

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
        unique = _hashes(kind, texts)
        missing = len(self._missing(unique))
        if missing:
            with entry_lock(self._folder / "vectors"):
                self._compute(unique, encode, lambda done: progress(len(unique) - missing + done))
        progress(len(texts))
        return {text: self._rows[key] for key, text in unique.items()}, missing

    def _missing(self, keys: Iterable[bytes]) -> list[bytes]:
        """The texts that have no row. The folder is looked at where there are such, and not for what is known."""
        if missing := [key for key in keys if key not in self._rows]:
            self._read_new_files()
            missing = [key for key in missing if key not in self._rows]
        return missing

    def _stacked(self, rows: dict[str, np.void], texts: Sequence[str]) -> Float32[np.ndarray, "N E"]:
        vectors = np.empty((len(texts), self.dim), np.float32)
        for i, text in enumerate(texts):
            vectors[i] = rows[text]["vector"]
        return vectors

    def _compute(self, unique: dict[bytes, str], encode: Callable, progress: Progress) -> None:
        """Write what is missing of `unique`, in the batches that were planned when this request first came."""
        self._read_new_files(remove_damaged=True)
        keys = list(unique)
        path = self._folder / f"{content_key(keys)}.todo"
        if (plan := entries.get(path, partial(entries.read_record, schema=_Plan))) is None:
            plan = _Plan(missing=[i for i, key in enumerate(keys) if key not in self._rows])
            entries.write(path, plan.model_dump_json().encode())
        self._compute_missing([keys[i] for i in plan.missing], unique, encode, progress)
        others = [key for key in keys if key not in self._rows]  # whose files were damaged or evicted since
        self._compute_missing(others, unique, encode, progress)
        with write_errors():
            path.unlink(missing_ok=True)

    def _compute_missing(
        self, keys: list[bytes], texts: dict[bytes, str], encode: Callable, progress: Progress
    ) -> None:
        """Embed and write these texts in batches, but for batches of which nothing is missing."""
        for start in range(0, len(keys), _BATCH):
            batch = keys[start : start + _BATCH]
            if any(key not in self._rows for key in batch):
                self._write(batch, [texts[key] for key in batch], partial(encode, progress=progress))

    def _write(self, keys: list[bytes], texts: list[str], encode: Callable) -> None:
        """Embed a planned batch whole; a vector that is there by now, and was used, stays the one that counts."""
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
        return np.dtype([("text", "V32"), ("seconds", np.float32), ("vector", np.float32, (self.dim,))])

    def _read_new_files(self, *, remove_damaged: bool = False) -> None:
        """Take in the rows of files that were not there at the last call. A damaged one counts as not there."""
        try:
            names = {name for name in os.listdir(self._folder) if name.endswith(".npy")}
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in sorted(names - self._files):
            try:
                self._read_file(self._folder / name)
            except FileNotFoundError:  # evicted meanwhile
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
    """The embedder with its vectors kept, unless `fit` changes it: then a vector depends on the corpus too."""
    return CachedEmbedder(embedder) if embedder.fit([]) is embedder else embedder


def _hashes(kind: str, texts: Sequence[str]) -> dict[bytes, str]:
    """Each different text by its hash, in the order of first appearance."""
    return {
        hashlib.sha256(f"{kind}\0{text}".encode("utf-8", "surrogatepass")).digest(): text for text in texts
    }
