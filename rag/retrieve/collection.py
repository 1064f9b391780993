"""What retrieval methods search: passages with their vectors, postings and models, each made when first needed.

A method is a frozen dataclass of options, so that its fields are its meaning: it can be compared, hashed into a key
and written in YAML. All that is large or loaded lives here instead, and is shared by the methods that use it.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Int

from rag.embed import Embedder
from rag.embed.vector_cache import CachedEmbedder
from rag.generate import Generator
from rag.index.dense import VectorIndex, VectorSearch
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.memory import MemoryIndex
from rag.index.store import Index
from rag.retrieve import Retriever
from rag.retrieve.rerank import Reranker
from rag.retrieve.transform import Transform
from rag.runtime.cache_key import content_key
from rag.runtime.clock import Clock
from rag.runtime.import_closure import code_version
from rag.runtime.memo import Memo, model_version
from rag.types import Chunk, Hit


class Collection:
    """Passages and the models that methods may use; results are kept on disk where there is a memo."""

    def __init__(
        self,
        index: Index | MemoryIndex,
        embedder: Embedder,
        generator: Callable[[], Generator] | None = None,
        memo: Memo | None = None,
    ):
        """`embedder` is the one that made the index's vectors; `generator` is called when a method first needs one."""
        self.index, self.embedder, self._generator, self.memo = index, embedder, generator, memo
        self._dense: dict[VectorSearch, VectorIndex] = {}
        self._lexical: dict[Analyzer, LexicalIndex] = {}
        self._row_of: dict[str, int] = {}  # of the chunks that were handed out
        self.build_s = 0.0  # seconds spent on making vectors and postings ready to be searched

    def fresh(self) -> "Collection":
        """The same passages and models with nothing kept and no index built: for measuring what a search costs."""
        embedder = self.embedder.uncached if isinstance(self.embedder, CachedEmbedder) else self.embedder
        return Collection(self.index, embedder, self._generator)

    @property
    def nbytes(self) -> int:
        """Of the vectors and postings in use."""
        return sum(index.nbytes for index in (*self._dense.values(), *self._lexical.values()))

    @cached_property
    def generator(self) -> Generator:
        """The language model. Raises RuntimeError when the collection was made without one."""
        if self._generator is None:
            raise RuntimeError("this collection has no generator, and a method asks for one")
        return self._generator()

    def dense(self, options: VectorSearch) -> VectorIndex:
        """The passages' vectors, ready to be searched in the way of these options."""
        self.index.recheck()
        if options not in self._dense:
            with self._building():
                self._dense[options] = options.build(self.index.vectors)
        return self._dense[options]

    def lexical(self, analyzer: Analyzer) -> LexicalIndex:
        """The passages' postings under an analyzer: those kept with the index, or built from the texts."""
        self.index.recheck()
        if analyzer not in self._lexical:
            with self._building():
                kept = self.index.lexical
                if kept is None or kept.analyzer != analyzer:
                    kept = LexicalIndex.build([chunk.text for chunk in self.chunks()], analyzer)
                self._lexical[analyzer] = kept
        return self._lexical[analyzer]

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Count the block as making an index, not as part of the search that first needs it."""
        begin = Clock.now()
        with self.memo.apart() if self.memo else nullcontext():
            yield
        self.build_s += (Clock.now() - begin).working

    def chunks(self) -> list[Chunk]:
        """All of the index's chunks, in the order of their numbers."""
        return self.index.chunks(range(len(self.index)))

    def row(self, chunk: Chunk) -> int:
        """The number of one of the index's chunks. Raises KeyError for another chunk."""
        row = self._row_of.get(chunk.id)
        if row is not None:
            return row
        rows = self.rows_of([chunk.document_id])
        same = (self._spans[rows, 1:] == (chunk.start, chunk.end)).all(axis=1)
        if not same.any():
            raise KeyError(chunk.id)
        return int(rows[same.argmax()])

    def rows_of(self, document_ids: Iterable[str]) -> Int[np.ndarray, "n"]:
        """The numbers of these documents' chunks, ascending; none for an id that the index does not have."""
        places = [self._places[name] for name in set(document_ids) if name in self._places]
        order, documents = self._by_document
        begins, ends = (np.searchsorted(documents, places, side) for side in ("left", "right"))
        runs = [order[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return np.sort(np.concatenate([*runs, np.empty(0, np.int64)]))

    @cached_property
    def _spans(self) -> Int[np.ndarray, "N 3"]:
        return self.index.spans()

    @cached_property
    def _places(self) -> dict[str, int]:
        return {name: place for place, name in enumerate(self.index.document_ids())}

    @cached_property
    def _by_document(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """The chunks' numbers in the order of their documents' numbers, and these."""
        order = np.argsort(self._spans[:, 0], kind="stable")
        return order, self._spans[order, 0]

    def hits(self, rows: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> list[Hit]:
        """Rows and their scores as hits."""
        chunks = self.index.chunks(rows)
        for row, chunk in zip(rows, chunks, strict=True):
            self._row_of.setdefault(chunk.id, int(row))
        return [Hit(chunk, float(score)) for chunk, score in zip(chunks, scores, strict=True)]

    def search(self, method: Retriever, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """method.search, kept: at most k hits for each question, best first."""

        def compute(questions: Sequence[str]) -> list[list[tuple[int, float]]]:
            return [self._packed(hits) for hits in method.search(self, questions, k)]

        found = self.keep(f"search {type(method).__name__}", (method, k), questions, compute)
        return [self._unpacked(rows) for rows in found]

    def rerank(
        self, method: Reranker, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """method.rerank, kept."""

        def compute(items: Sequence) -> list[list[tuple[int, float]]]:
            questions, packed = zip(*items, strict=True)
            return [
                self._packed(best)
                for best in method.rerank(self, questions, [self._unpacked(rows) for rows in packed])
            ]

        items = [[question, self._packed(found)] for question, found in zip(questions, hits, strict=True)]
        found = self.keep(f"rerank {type(method).__name__}", method, items, compute, batch=16)
        return [self._unpacked(rows) for rows in found]

    def expand(self, method: Transform, questions: Sequence[str]) -> list[list[str]]:
        """method.expand, kept."""
        name = f"transform {type(method).__name__}"
        # What a transform writes does not depend on the passages, so other corpora share it.
        texts = self.keep(name, method, questions, lambda q: method.expand(self, q), batch=16, passages=False)
        return [written or [] for written in texts]

    def keep(
        self,
        stage: str,
        method: Any,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], list[Any]],
        *,
        batch: int = 64,
        passages: bool = True,
    ) -> list[Any]:
        """compute(items), kept under what `method`, a frozen dataclass or a tuple with some, means here.

        Items and results are JSON-able. `passages`: whether the results depend on the passages.
        """
        if self.memo is None:
            return compute(items)
        return self.memo.map(stage, self.meaning(method, passages), items, compute, batch)

    def meaning(self, method: Any, passages: bool = True) -> str:
        """A key of all that a method's results depend on: options, models, passages, code."""
        models = sorted({name for part in _dataclasses(method) for name in getattr(part, "uses", ())})
        versions = {name: model_version(self._model(name)) for name in models}
        passages_are = self.index.fingerprint if passages else None
        return content_key(method, versions, passages_are, code_version(method, type(self)))

    def _model(self, name: str) -> Any:
        """The embedder or the generator itself, whatever keeps its results."""
        model = getattr(self, name)
        return model.uncached if isinstance(model, CachedEmbedder) else model

    def _packed(self, hits: Sequence[Hit]) -> list[tuple[int, float]]:
        return [(self.row(hit.chunk), hit.score) for hit in hits]

    def _unpacked(self, rows: Sequence[Sequence] | None) -> list[Hit]:
        """Hits of what _packed made; none of what a dry memo did not compute."""
        return self.hits(*zip(*rows, strict=True)) if rows else []


def _dataclasses(value: Any) -> Iterator[Any]:
    """Every dataclass in a value of dataclasses, tuples and dicts, itself included."""
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from _dataclasses(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _dataclasses(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from _dataclasses(item)
