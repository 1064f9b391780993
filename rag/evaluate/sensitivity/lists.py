"""Numerical sensitivity of the top-k lists that a retrieval method finds."""

from collections.abc import Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

from rag.embed import Embedder
from rag.evaluate import retrieval
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.sensitivity.options import SensitivityOptions, SystemUnderTest, Variation
from rag.evaluate.sensitivity.reduced_precision import ReducedPrecisionEmbedder, reduce_precision
from rag.evaluate.sensitivity.report import ListChanges, MetricChange
from rag.index.memory import MemoryIndex
from rag.retrieve.collection import Collection
from rag.retrieve.dependencies import dependencies_of
from rag.types import Hit

Found = dict[str, list[Hit]]  # query id -> hits, best first


class ListSensitivity:
    """The lists of the reference, and how they change with each variation."""

    def __init__(self, system: SystemUnderTest, options: SensitivityOptions):
        self.system, self.dataset, self.options = system, system.dataset, options
        self.collection = self._collection(system.embedder)
        self.found = self._search(self.collection)
        self.values = self._values(self.found)

    def variations(self) -> tuple[list[Variation], list[str]]:
        """Return the variations, which compute what they find, and a sentence for each axis that is left out."""
        system, options = self.system, self.options
        variations: list[Variation] = []
        skipped: list[str] = []
        embeds = "embedder" in dependencies_of(system.method)
        if not embeds:
            skipped.append("tokens_per_batch and vector_dtypes are left out: the method uses no vectors.")
        elif system.embedder_of_batch is None:
            skipped.append("tokens_per_batch is left out: the embedder has no such setting.")
        else:
            for n in options.tokens_per_batch:
                again = partial(self._embed_again, partial(system.embedder_of_batch, n))
                variations.append(Variation("tokens_per_batch", str(n), again))
        for batch in options.search_batches:
            size = None if batch == "all" else batch
            again = partial(self._search, self.collection, size)
            variations.append(Variation("search_batches", str(batch), again))
        for dtype in options.vector_dtypes if embeds else ():
            variations.append(Variation("vector_dtypes", dtype, partial(self._round, dtype)))
        return variations, skipped

    def changes(self, variation: Variation) -> ListChanges:
        """Compute a variation and compare its lists with the reference."""
        found: Found = variation.compute()
        changed, replaced, farthest = [], [], 0.0
        for query in self.dataset.queries:
            old, new = (
                {hit.chunk.id: hit.score for hit in each[query][: self.options.k]}
                for each in (self.found, found)
            )
            if list(old) != list(new):
                changed.append(query)
            if old.keys() != new.keys():
                replaced.append(query)
            farthest = max([farthest, *(abs(new[name] - old[name]) for name in old.keys() & new.keys())])
        return ListChanges(
            axis=variation.axis,
            setting=variation.setting,
            lists=len(self.dataset.queries),
            changed=tuple(changed),
            replaced=tuple(replaced),
            score_difference=farthest,
            movements={self.options.measure: MetricChange.between(self.values, self._values(found))},
        )

    def _collection(self, embedder: Embedder) -> Collection:
        chunks = retrieval.chunk_all(self.dataset, self.system.chunker, embedder)
        return retrieval.build_collection(self.dataset, chunks or (), embedder, self.system.generator)

    def _search(self, collection: Collection, batch: int | None = None) -> Found:
        """Search for `batch` questions at a time; None: for all at once."""
        found: Found = {}
        for some in batches(self.dataset.queries, batch):
            part = replace(self.dataset, queries=some)
            found |= retrieval.search(collection, self.system.method, part, self.options.depth)
        return found

    def _embed_again(self, make: partial[Embedder]) -> Found:
        return self._search(self._collection(make()))

    def _round(self, dtype: str) -> Found:
        chunks = self.collection.chunks()
        vectors = reduce_precision(self.collection.vectors, dtype)
        index = MemoryIndex(self.dataset.corpus, chunks, lambda _: vectors)
        embedder = ReducedPrecisionEmbedder(self.collection.embedder, dtype)
        return self._search(
            Collection(index, embedder, self.system.generator, queries=self.collection.queries)
        )

    def _values(self, found: Found) -> list[float]:
        """Return the metric of each query, of the ranking of documents that an evaluation judges."""
        measure = self.options.measure
        ranking = retrieval.documents(found, self.dataset, self.options.depth)
        _, per_query = retrieval_metrics.evaluate(self.dataset.qrels, ranking, [measure])
        return [per_query[query][measure] for query in self.dataset.queries]


def batches(items: Mapping[str, Any], size: int | None) -> Iterator[dict[str, Any]]:
    """Yield the items in batches of `size`; None: all in one."""
    pairs = list(items.items())
    size = size or len(pairs)
    for start in range(0, len(pairs), size):
        yield dict(pairs[start : start + size])
