"""Results of stages kept on disk by what they mean, so that a sweep never computes the same thing twice.

A stage is a function of items: questions to hits, conversations to answers. Its results are kept in batches, each a
file that is written whole: a killed run loses one batch at most, and a second process waits for a batch that the
first is computing, then finds it done. The key of a batch is made of the stage's meaning (its settings, the
fingerprints of what it reads, its code) and of the items themselves; names, paths and thread counts are not in it.

Batches are cut by position, so that a resumed run computes exactly the batches that the killed one would have:
results that depend on their batch in the last bit of a float are the same bit again.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.runtime import cache
from rag.runtime.cache_key import content_key
from rag.runtime.clock import Clock
from rag.runtime.import_closure import code_version
from rag.runtime.records import Record


@dataclass(slots=True)
class Cost:
    """What a stage took: seconds as they were measured when each batch was computed, in this run or before."""

    seconds: float = 0.0  # without the stages inside it and without compiling
    compile_s: float = 0.0
    items: int = 0
    reused: int = 0  # of `items`: found on disk


class _Batch(Record):
    """What is kept of a batch."""

    seconds: float
    compile_s: float
    results: list[Any]


class Memo:
    """Batches of results below `folder`. With `dry` nothing is computed: what is missing is counted, and is None."""

    def __init__(self, folder: Path, *, dry: bool = False):
        self._folder, self._dry = folder, dry
        self.costs: dict[str, Cost] = {}
        self._inner: list[Clock] = []  # spent in other stages by each stage that is running, outermost first

    def map(
        self,
        stage: str,
        meaning: str,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        batch: int = 64,
    ) -> list[Any]:
        """compute(items), a batch at a time, each taken from disk if it is there.

        `meaning` identifies all that the results depend on beside the items and the code of `compute`; items and
        results are JSON-able.
        """
        begin, results, meaning = Clock.now(), [], content_key(meaning, code_version(compute))
        for start in range(0, len(items), batch):
            results += self._batch(stage, meaning, items[start : start + batch], compute)
        if self._inner:
            self._inner[-1] += Clock.now() - begin
        return results

    def _batch(self, stage: str, meaning: str, items: Sequence[Any], compute: Callable) -> list[Any]:
        folder = self._folder / stage / meaning
        path = folder / f"{content_key(list(items))}.json"
        cost = self.costs.setdefault(stage, Cost())
        cost.items += len(items)

        def make() -> None:
            cache.write(path, json.dumps(self._computed(items, compute), allow_nan=False).encode())
            cost.reused -= len(items)

        if not self._dry:
            kept = cache.get_or_make(path, make, _read, lock=folder / "batch")
        elif (kept := cache.get(path, _read)) is None:
            return [None] * len(items)
        cost.reused += len(items)
        cost.seconds += kept.seconds
        cost.compile_s += kept.compile_s
        return kept.results

    @contextmanager
    def apart(self) -> Iterator[None]:
        """Keep what happens in the block out of the time of the stage that is running, if one is."""
        begin = Clock.now()
        yield
        if self._inner:
            self._inner[-1] += Clock.now() - begin

    def _computed(self, items: Sequence[Any], compute: Callable) -> dict[str, Any]:
        begin = Clock.now()
        self._inner.append(Clock())
        try:
            results = list(compute(items))
        finally:
            inner = self._inner.pop()
        if len(results) != len(items):
            raise ValueError(f"a stage made {len(results)} results of {len(items)} items")
        own = Clock.now() - begin - inner
        return {"seconds": own.working, "compile_s": own.compiling, "results": results}


def _read(path: Path) -> _Batch:
    return cache.read_record(path, _Batch)


def model_version(model: Any) -> str:
    """A key of what a model makes of its input: its fingerprint, and its code (rag.runtime.import_closure.code_version)."""
    return content_key(model.fingerprint, code_version(model))
