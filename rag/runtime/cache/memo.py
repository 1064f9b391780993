"""Cache the results of stages on disk, so that a sweep never computes the same result twice.

A stage is a function of items, for example from questions to hits, or from conversations to answers. Its results are
cached in batches. Each batch is one file, written as a whole: a killed run loses at most one batch, and a second
process that needs a batch which the first is computing waits and then reads it. The cache key of a batch contains the
stage's settings, the fingerprints of its inputs, its code, and the items themselves, but no names, paths or numbers of
threads.

Batches are cut by position, so that a resumed run computes exactly the batches that the killed run would have
computed: results whose last bit depends on their batch are the same to the bit.
"""

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.runtime.cache import entries
from rag.runtime.cache.keys import content_key
from rag.runtime.code.import_closure import code_version
from rag.runtime.machine.clock import Clock
from rag.runtime.records import Record


@dataclass(slots=True)
class Cost:
    """What a stage cost: seconds as measured when each batch was computed, in this run or an earlier one."""

    seconds: float = 0.0  # without the stages that it calls and without compiling
    compile_s: float = 0.0
    items: int = 0
    reused: int = 0  # of `items`: those read from disk


class _CachedBatch(Record):
    """The file of a batch."""

    seconds: float
    compile_s: float
    results: list[Any]


class Memo:
    """A cache of the results of stages.

    Attributes:
        costs: the cost of each stage, by its name.
    """

    def __init__(self, folder: Path, *, dry: bool = False):
        """Use the batches in `folder`. With `dry` nothing is computed: missing results are counted, and are None."""
        self._folder, self._dry = folder, dry
        self.costs: dict[str, Cost] = {}
        self._inner: list[Clock] = []  # of each running stage, outermost first: time in stages that it called

    def map(
        self,
        stage: str,
        key: str,
        items: Sequence[Any],
        compute: Callable[[Sequence[Any]], Sequence[Any]],
        batch: int = 64,
    ) -> list[Any]:
        """Return `compute(items)`, computed batch by batch; batches that are on disk are read instead.

        Args:
            stage: the name of the stage, under which its cost is recorded.
            key: identifies everything that the results depend on beside the items and the code of `compute`.
            items: the inputs, of types that JSON has.
            compute: returns one result for each item, of types that JSON has.
            batch: how many items a batch has.
        """
        begin = Clock.now()
        results: list[Any] = []
        key = content_key(key, code_version(compute))
        for start in range(0, len(items), batch):
            results += self._batch(stage, key, items[start : start + batch], compute)
        if self._inner:
            self._inner[-1] += Clock.now() - begin
        return results

    def _batch(self, stage: str, key: str, items: Sequence[Any], compute: Callable) -> list[Any]:
        folder = self._folder / stage / key
        path = folder / f"{content_key(list(items))}.json"
        cost = self.costs.setdefault(stage, Cost())
        cost.items += len(items)

        def make() -> None:
            entries.write(path, json.dumps(self._computed(items, compute), allow_nan=False).encode())
            cost.reused -= len(items)

        if not self._dry:
            cached = entries.get_or_make(path, make, _read, lock=folder / "batch")
        elif (found := entries.get(path, _read)) is not None:
            cached = found
        else:
            return [None] * len(items)
        cost.reused += len(items)
        cost.seconds += cached.seconds
        cost.compile_s += cached.compile_s
        return cached.results

    @contextmanager
    def uncounted(self) -> Iterator[None]:
        """Do not count the time of the block as time of the running stage, if there is one."""
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


def _read(path: Path) -> _CachedBatch:
    return entries.read_record(path, _CachedBatch)


def model_version(model: Any) -> str:
    """Return a cache key of what a model computes: of its fingerprint and its code (rag.runtime.code)."""
    return content_key(model.fingerprint, code_version(model))
