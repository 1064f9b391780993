"""The costs of an evaluation: seconds of each stage, latency of a question, bytes of the index.

A stage's seconds are those that were measured when its results were computed, in this run or in an earlier one whose
results were cached; compiling is counted separately. The latency of a question is measured in each run without any
cached result: a few questions, one at a time, after a warm-up that is not counted.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rag.embed.vector_cache import CachedEmbedder
from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.runtime.cache.memo import Memo
from rag.runtime.machine.clock import Clock
from rag.runtime.machine.hardware import environment, peak_memory_bytes

_ENOUGH_S = 10.0  # seconds of timed questions: a method with a language model in it is timed on fewer
_LEAST = 3  # questions, however long they take
_K = 10  # hits of a search


@dataclass(frozen=True, slots=True)
class Latency:
    """Seconds from a question to its ten best passages, one question at a time, without cached results."""

    p50: float
    p95: float
    queries: int
    compile_s: float
    index_bytes: int  # of the vectors and postings that the method searches
    build_s: float  # seconds to build them from vectors that are there


def draw_probes(questions: Sequence[str], count: int) -> list[str]:
    """Return the questions to time: always the same `count` of them, in random order, or all if there are fewer."""
    return random.Random(0).sample(questions, min(count, len(questions)))


def measure_latency(method: Retriever, collection: Collection, questions: Sequence[str]) -> Latency:
    """Time a method on some of the questions, after a warm-up with the first."""
    fresh, begin = collection.fresh(), Clock.now()
    method.search(fresh, questions[:1], _K)
    compiling = (Clock.now() - begin).compiling
    seconds: list[float] = []
    for question in questions:
        begin = Clock.now()
        method.search(fresh, [question], _K)
        taken = Clock.now() - begin
        seconds.append(taken.working)
        compiling += taken.compiling
        if len(seconds) >= _LEAST and sum(seconds) > _ENOUGH_S:
            break
    p50, p95 = np.percentile(seconds, [50, 95])
    return Latency(float(p50), float(p95), len(seconds), compiling, fresh.nbytes, fresh.build_s)


def costs(memo: Memo, collection: Collection, latency: Latency, tokens: int) -> dict[str, Any]:
    """Return the contents of costs.json but for the generator.

    Args:
        memo: The costs of the stages.
        collection: What was searched.
        latency: Of the method.
        tokens: Of all prompts and answers.
    """
    costs, build = memo.costs, latency.build_s
    if isinstance(collection.embedder, CachedEmbedder):
        build += collection.embedder.passages_s
    else:  # the vectors were computed for whichever of the two needed them first
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
        "peak_memory_bytes": peak_memory_bytes(),  # of this evaluation, where the system can tell
        "environment": environment(),
    }
