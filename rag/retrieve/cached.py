"""Retrieval methods with their results in the cache: search, rerank and expand.

A method runs the methods inside it through these functions, so that an arm of a hybrid and the same arm
alone share cached batches of results where they are asked the same questions. A collection without a memo computes
everything.
"""

from collections.abc import Sequence

from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker
from rag.retrieve.transform import Transform
from rag.types import Hit

StoredHits = Sequence[Sequence[int | float]]  # the row and the score of each hit, as JSON holds them


def cached_search(
    collection: Collection, method: Retriever, questions: Sequence[str], k: int
) -> list[list[Hit]]:
    """Return `method.search`: at most k hits for each question, best first."""
    if collection.memo is None:
        return method.search(collection, questions, k)

    def compute(questions: Sequence[str]) -> list[StoredHits]:
        return [_pack(hits) for hits in method.search(collection, questions, k)]

    found = collection.cached_map(f"search {type(method).__name__}", (method, k), questions, compute)
    return [_unpack(collection, packed) for packed in found]


def cached_rerank(
    collection: Collection, method: Reranker, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
) -> list[list[Hit]]:
    """Return `method.rerank`: each question's hits with new scores, best first; a reranker may leave some out."""
    if collection.memo is None:
        return method.rerank(collection, questions, hits)

    def compute(items: Sequence[tuple[str, StoredHits]]) -> list[StoredHits]:
        questions, packed = zip(*items, strict=True)
        candidates = [_unpack(collection, one) for one in packed]
        return [_pack(ranked) for ranked in method.rerank(collection, questions, candidates)]

    items = [(question, _pack(found)) for question, found in zip(questions, hits, strict=True)]
    ranked = collection.cached_map(f"rerank {type(method).__name__}", method, items, compute, batch=16)
    return [_unpack(collection, packed) for packed in ranked]


def cached_expand(collection: Collection, method: Transform, questions: Sequence[str]) -> list[list[str]]:
    """Return `method.expand`: the texts to search for in place of each question.

    They do not depend on the passages, so collections of other corpora share them.
    """

    def compute(questions: Sequence[str]) -> list[list[str]]:
        return method.expand(collection, questions)

    name = f"transform {type(method).__name__}"
    texts = collection.cached_map(name, method, questions, compute, batch=16, passages=False)
    return [some or [] for some in texts]  # None where a dry memo, which only counts, computes nothing


def _pack(hits: Sequence[Hit]) -> StoredHits:
    return [(hit.row, hit.score) for hit in hits]


def _unpack(collection: Collection, packed: StoredHits | None) -> list[Hit]:
    """Return the hits that were packed; none where a dry memo computed nothing."""
    return collection.hits(*zip(*packed, strict=True)) if packed else []
