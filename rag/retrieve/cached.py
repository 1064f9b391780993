"""Retrieval methods with their results in the cache: search, rerank and expand.

A method runs the methods inside it through these functions, so that an arm of a hybrid and the same arm
alone share cached batches of results where they are asked the same questions. A collection without a memo computes
everything. A method whose `depends_on` does not name what the one inside it depends on is refused, whatever is cached.
"""

import math
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker
from rag.retrieve.transform import Transform
from rag.runtime.stages import wrong_result
from rag.types import Hit

StoredHits = Sequence[Sequence[int | float]]  # the row and the score of each hit, as JSON holds them


def cached_search(
    collection: Collection, method: Retriever, questions: Sequence[str], k: int
) -> list[list[Hit]]:
    """Return `method.search`: at most k hits for each question, best first.

    Args:
        collection: what is searched; its memo caches the results.
        method: the retriever.
        questions: any number of them.
        k: the most hits of a question.
    """
    collection.check_stage(method)
    if collection.memo is None:
        return _run(collection, method, "search", questions, k)

    def compute(questions: Sequence[str]) -> list[StoredHits]:
        return [_pack(hits) for hits in _run(collection, method, "search", questions, k)]

    found = collection.cached_map(f"search {type(method).__name__}", (method, k), questions, compute)
    return [_unpack(collection, packed) for packed in found]


def cached_rerank(
    collection: Collection, method: Reranker, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
) -> list[list[Hit]]:
    """Return `method.rerank`: each question's hits with new scores, best first; a reranker may leave some out.

    Args:
        collection: where the hits were found; its memo caches the results.
        method: the reranker.
        questions: any number of them.
        hits: those of each question.
    """
    collection.check_stage(method)
    if collection.memo is None:
        return _run(collection, method, "rerank", questions, hits)

    def compute(items: Sequence[tuple[str, StoredHits]]) -> list[StoredHits]:
        questions, packed = zip(*items, strict=True)
        candidates = [_unpack(collection, one) for one in packed]
        return [_pack(ranked) for ranked in _run(collection, method, "rerank", questions, candidates)]

    items = [(question, _pack(found)) for question, found in zip(questions, hits, strict=True)]
    ranked = collection.cached_map(f"rerank {type(method).__name__}", method, items, compute, batch=16)
    return [_unpack(collection, packed) for packed in ranked]


def cached_expand(collection: Collection, method: Transform, questions: Sequence[str]) -> list[list[str]]:
    """Return `method.expand`: the texts to search for in place of each question.

    They do not depend on the passages, so collections of other corpora share them.
    """
    collection.check_stage(method)

    def compute(questions: Sequence[str]) -> list[list[str]]:
        with collection.running(method):
            texts = method.expand(collection, questions)
        if not _is_list_of(list | tuple, texts, len(questions)) or not all(map(_are_texts, texts)):
            raise wrong_result(method, "expand", texts, f"{len(questions)} lists of texts, one a question")
        return texts

    name = f"transform {type(method).__name__}"
    texts = collection.cached_map(name, method, questions, compute, batch=16, passages=False)
    return [some or [] for some in texts]  # None where a dry memo, which only counts, computes nothing


def _run(
    collection: Collection, stage: Any, method: str, questions: Sequence[str], argument: Any
) -> list[list[Hit]]:
    """Run "search" or "rerank" of a stage. Raises UserError where it does not return a ranking for each question."""
    with collection.running(stage):
        found = getattr(stage, method)(collection, questions, argument)
    if not _is_list_of(list | tuple, found, len(questions)) or not all(map(_is_ranking, found)):
        wanted = f"{len(questions)} lists of hits, one a question, with finite scores that never rise"
        raise wrong_result(stage, method, found, wanted)
    return [[_plain(hit) for hit in hits] for hits in found]


def _is_ranking(hits: Sequence[Any]) -> bool:
    if not _is_list_of(Hit, hits) or not all(_is_finite(hit.score) for hit in hits):
        return False
    return all(one.score >= next.score for one, next in pairwise(hits))


def _is_finite(score: Any) -> bool:
    """Return whether a score is a finite number; one of numpy or JAX is a number too."""
    try:
        return math.isfinite(score)
    except (TypeError, OverflowError):  # no number, or a whole number beyond float
        return False


def _plain(hit: Hit) -> Hit:
    """Return a hit with a score and a row that JSON can hold."""
    if type(hit.score) is float and type(hit.row) is int:
        return hit
    return replace(hit, score=float(hit.score), row=int(hit.row))


def _are_texts(texts: Sequence[Any]) -> bool:
    return _is_list_of(str, texts)


def _is_list_of(kind: Any, value: Any, length: int | None = None) -> bool:
    """Return whether a value is a list or tuple of objects of a class, so many where `length` says."""
    right = isinstance(value, list | tuple) and length in (None, len(value))
    return right and all(isinstance(item, kind) for item in value)


def _pack(hits: Sequence[Hit]) -> StoredHits:
    return [(hit.row, hit.score) for hit in hits]


def _unpack(collection: Collection, packed: StoredHits | None) -> list[Hit]:
    """Return the hits that were packed; none where a dry memo computed nothing."""
    return collection.hits(*zip(*packed, strict=True)) if packed else []
