"""What an evaluation cost, beside what it measured: seconds by stage, latency of a question, bytes.

A stage's seconds are those that were measured when its results were computed, in this run or an earlier one whose
results were found; making programs is counted apart. How long one question takes is measured anew, without any
kept result: a few questions, one at a time, after one that is not counted.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rag.embed.vector_cache import CachedEmbedder
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.runtime.clock import Clock
from rag.runtime.machine import environment, peak_memory_bytes
from rag.runtime.memo import Memo

_ENOUGH_S = 10.0  # of timed questions: a method with a language model in it is timed on fewer
_LEAST = 3  # questions, however long they take
_K = 10  # hits asked for


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from a question to its ten best passages, one question at a time, nothing kept."""

    p50: float
    p95: float
    queries: int
    compile_s: float
    index_bytes: int  # of the vectors and postings that the method searched
    build_s: float  # making them ready, where nothing that was embedded is embedded again


def measure_latency(method: Retriever, collection: Collection, questions: Sequence[str]) -> Latency:
    """Time a method on some of the questions."""
    bare, begin = collection.fresh(), Clock.now()
    method.search(bare, questions[:1], _K)
    compiling = (Clock.now() - begin).compiling
    seconds: list[float] = []
    for question in questions:
        begin = Clock.now()
        method.search(bare, [question], _K)
        taken = Clock.now() - begin
        seconds.append(taken.working)
        compiling += taken.compiling
        if len(seconds) >= _LEAST and sum(seconds) > _ENOUGH_S:
            break
    p50, p95 = np.percentile(seconds, [50, 95])
    return Latency(float(p50), float(p95), len(seconds), compiling, bare.nbytes, bare.build_s)


def costs(memo: Memo, collection: Collection, latency: Latency, tokens: int) -> dict[str, Any]:
    """The costs of one evaluation, JSON-able; `tokens` of prompts and answers were read and written for it."""
    costs, build = memo.costs, latency.build_s
    if isinstance(collection.embedder, CachedEmbedder):
        build += collection.embedder.passages_s
    else:  # the vectors were made by whichever of the two needed them first
        build = max(build, collection.build_s)
    build += costs["chunk"].seconds if "chunk" in costs else 0.0
    answering_s = costs["answer"].seconds if "answer" in costs else 0.0
    return {
        "stages": {
            stage: {"seconds": cost.seconds, "items": cost.items, "reused": cost.reused}
            for stage, cost in costs.items()
        },
        "index_build_s": build,
        "index_bytes": latency.index_bytes,
        "passages": len(collection.index),
        "passages_per_s": len(collection.index) / build if build else None,
        "tokens_per_s": tokens / answering_s if answering_s else None,
        "query_p50_s": latency.p50,
        "query_p95_s": latency.p95,
        "query_n": latency.queries,
        "compile_s": sum(cost.compile_s for cost in costs.values()) + latency.compile_s,
        "peak_memory_bytes": peak_memory_bytes(),  # of this job, where the system can tell
        "environment": environment(),
    }
