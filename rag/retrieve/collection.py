"""The collection that retrieval methods search: chunks with their vectors, postings and models.

A method is a frozen dataclass of options, so that it can be compared, made into a cache key and written in YAML. All
that is large is here, made when it is first needed and shared by the methods that use it. N is the number of chunks.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import fields, is_dataclass
from functools import cached_property
from types import MappingProxyType
from typing import Any

import numpy as np
from jaxtyping import Float32, Int

from rag.embed import Embedder
from rag.embed.vector_cache import CachedEmbedder
from rag.generate import Generator
from rag.index.dense import VectorIndex, VectorSearch
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.memory import MemoryIndex
from rag.index.store import Index
from rag.retrieve.dependencies import check_declared, dependencies_of
from rag.runtime.cache.keys import content_key
from rag.runtime.cache.memo import Memo, model_version
from rag.runtime.code.import_closure import code_version
from rag.runtime.machine.clock import Clock
from rag.runtime.stages import check_frozen
from rag.types import Chunk, Hit, UserError


class Collection:
    """An index and the models that methods may use; with a memo the methods' results are cached on disk.

    The class is long because it holds all that methods share: vectors, postings, models, documents, the cache.

    Args:
        index: the chunks and their vectors.
        embedder: the one that made the vectors of the index.
        generator: returns the language model; called when a method first needs it.
        memo: where results are cached; None computes everything.
        queries: id -> text of a dataset's queries, for methods that know them by their ids.
    """

    def __init__(
        self,
        index: "Index | MemoryIndex | _IndexForStages",
        embedder: Embedder,
        generator: Callable[[], Generator] | None = None,
        memo: Memo | None = None,
        queries: Mapping[str, str] = MappingProxyType({}),
    ):
        self._index, self._embedder, self._generator, self.memo = index, embedder, generator, memo
        self.queries = queries
        self._running: list[Any] = []  # the stages that run now, the outermost first
        self._dense: dict[VectorSearch, VectorIndex] = {}
        self._lexical: dict[Analyzer, LexicalIndex] = {}
        self.build_s = 0.0  # seconds spent on building vector indexes and postings

    def fresh(self) -> "Collection":
        """Return a collection of the same index and models with nothing cached or built, to measure a search."""
        embedder = self._embedder.uncached if isinstance(self._embedder, CachedEmbedder) else self._embedder
        fresh = Collection(self._index, embedder, self._generator, queries=self.queries)
        fresh._running = self._running  # a stage may not use more of it
        return fresh

    @property
    def nbytes(self) -> int:
        """Return the bytes of the vector indexes and postings in use."""
        dense = sum(index.nbytes for index in self._dense.values())
        return dense + sum(index.nbytes for index in self._lexical.values())

    @property
    def index(self) -> "Index | MemoryIndex | _IndexForStages":
        """Return the index, which refuses its vectors while a stage runs that does not depend on the embedder."""
        return _IndexForStages(self._index, self._running) if self._running else self._index

    @property
    def vectors(self) -> Float32[np.ndarray, "N E"]:
        """Return the chunks' vectors. Raises UserError while a stage runs that does not depend on the embedder."""
        check_declared("embedder", self._running)
        return self._index.vectors

    @property
    def embedder(self) -> Embedder:
        """Return the embedder. Raises UserError while a stage runs that does not depend on it."""
        check_declared("embedder", self._running)
        return self._embedder

    @property
    def query_ids(self) -> Mapping[str, Sequence[str]]:
        """Return text -> ids of a dataset's queries. Raises UserError while a stage runs that depends on none."""
        check_declared("queries", self._running)
        ids: dict[str, list[str]] = {}
        for query, text in self.queries.items():
            ids.setdefault(text, []).append(query)
        return ids

    @property
    def generator(self) -> Generator:
        """Return the language model. Raises UserError while a stage runs that does not depend on it."""
        check_declared("generator", self._running)
        return self._loaded_generator

    @cached_property
    def _loaded_generator(self) -> Generator:
        if self._generator is None:
            raise RuntimeError("this collection has no generator, and a method asks for one")
        return self._generator()

    @contextmanager
    def running(self, stage: Any) -> Iterator[None]:
        """Let a stage run in the block: it may use no model that its `depends_on` does not name."""
        self._running.append(stage)
        try:
            yield
        finally:
            self._running.pop()

    def check_stage(self, stage: Any) -> None:
        """Raise UserError while another stage runs that does not depend on all that this one depends on."""
        for name in dependencies_of(stage):
            check_declared(name, self._running)

    def dense(self, options: VectorSearch) -> VectorIndex:
        """Return the vector index that these options build of the chunks' vectors.

        Raises UserError while a stage runs that does not depend on the embedder.
        """
        check_declared("embedder", self._running)
        self._index.recheck()
        if options not in self._dense:
            with self._building():
                self._dense[options] = options.build(self._index.vectors)
        return self._dense[options]

    def lexical(self, analyzer: Analyzer) -> LexicalIndex:
        """Return the chunks' postings under an analyzer: those stored with the index, or built from the texts."""
        self._index.recheck()
        if analyzer not in self._lexical:
            with self._building():
                stored = self._index.lexical
                if stored is None or stored.analyzer != analyzer:
                    stored = LexicalIndex.build([chunk.text for chunk in self.chunks()], analyzer)
                self._lexical[analyzer] = stored
        return self._lexical[analyzer]

    @contextmanager
    def _building(self) -> Iterator[None]:
        """Count the block as building an index, not as part of the search that first needs it."""
        begin = Clock.now()
        with self.memo.uncounted() if self.memo else nullcontext():
            yield
        self.build_s += (Clock.now() - begin).working

    def chunks(self) -> list[Chunk]:
        """Return all chunks of the index, in the order of their rows."""
        return self._index.chunks(range(len(self._index)))

    def has_document(self, document_id: str) -> bool:
        """Return whether the index has a document of this id."""
        return document_id in self._document_numbers

    def rows_of(self, document_ids: Iterable[str]) -> Int[np.ndarray, "n"]:
        """Return the rows of these documents' chunks, ascending; none for an id that the index does not have."""
        numbers = [
            self._document_numbers[name] for name in set(document_ids) if name in self._document_numbers
        ]
        order, documents = self._by_document
        begins, ends = (np.searchsorted(documents, numbers, side) for side in ("left", "right"))
        runs = [order[begin:end] for begin, end in zip(begins, ends, strict=True)]
        return np.sort(np.concatenate([*runs, np.empty(0, np.int64)]))

    @cached_property
    def _document_numbers(self) -> dict[str, int]:
        return {name: number for number, name in enumerate(self._index.document_ids())}

    @cached_property
    def _by_document(self) -> tuple[Int[np.ndarray, "N"], Int[np.ndarray, "N"]]:
        """Return the rows of the chunks, sorted by the number of their document, and these numbers."""
        documents = self._index.spans[:, 0]
        order = np.argsort(documents, kind="stable")
        return order, documents[order]

    def hits(self, rows: Sequence[int] | np.ndarray, scores: Sequence[float] | np.ndarray) -> list[Hit]:
        """Return the chunks of these rows as hits. Raises UserError for a row that the index does not have."""
        wrong = [
            row for row in rows if not isinstance(row, int | np.integer) or not 0 <= row < len(self._index)
        ]
        if wrong:
            raise UserError(
                f"The index has rows 0 to {len(self._index) - 1}, and a stage asked for {wrong[0]!r}."
            )
        found = zip(self._index.chunks(rows), scores, rows, strict=True)
        return [Hit(chunk, float(score), int(row)) for chunk, score, row in found]

    def cached_map(
        self,
        stage: str,
        method: Any,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], list[Any]],
        *,
        batch: int = 64,
        passages: bool = True,
    ) -> list[Any]:
        """Return `compute(items)`, each batch from the cache where it is there.

        Args:
            stage: the name under which the cost is counted.
            method: a frozen dataclass, or a tuple with some: the options that the results depend on.
            items: JSON-able, and so are the results.
            compute: maps a batch of items to their results.
            batch: items that are computed and cached together.
            passages: whether the results depend on the passages of the index.

        Returns:
            A result for each item; None for those that are not cached where the memo is dry.
        """
        if self.memo is None:
            return compute(items)
        return self.memo.map(stage, self.cache_key(method, passages), items, compute, batch)

    def cache_key(self, method: Any, passages: bool = True) -> str:
        """Return a key of all that a method's results depend on: its options, models and code, and the passages."""
        check_frozen(method)
        models = sorted({name for part in dataclasses_in(method) for name in dependencies_of(part)})
        versions = {name: self._version(name) for name in models}
        corpus = self._index.fingerprint if passages else None
        return content_key(method, versions, corpus, code_version(method, type(self)))

    def _version(self, name: str) -> str:
        """Return a cache key of the embedder, without the cache around it, the generator, or the queries."""
        if name == "queries":
            return content_key(dict(self.queries))
        model = self._embedder if name == "embedder" else self._loaded_generator
        return model_version(model.uncached if isinstance(model, CachedEmbedder) else model)


class _IndexForStages:
    """The index as the running stages may use it."""

    def __init__(self, index: "Index | MemoryIndex | _IndexForStages", running: Sequence[Any]):
        self._index, self._running = index, running

    def __len__(self) -> int:
        return len(self._index)

    def __getattr__(self, name: str) -> Any:
        if name == "vectors":
            check_declared("embedder", self._running)
        return getattr(self._index, name)


def dataclasses_in(value: Any) -> Iterator[Any]:
    """Yield every dataclass in a value of dataclasses, tuples and dicts, itself included."""
    if is_dataclass(value):
        yield value
        for field in fields(value):
            yield from dataclasses_in(getattr(value, field.name))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from dataclasses_in(item)
    elif isinstance(value, dict):
        for item in value.values():
            yield from dataclasses_in(item)
