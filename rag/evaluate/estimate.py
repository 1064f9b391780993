"""Count what a search would compute, without computing it, on a collection whose memo is dry."""

from collections.abc import Sequence

from rag.embed.vector_cache import CachedEmbedder
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_expand, cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Reranked, Transformed
from rag.runtime.cache.memo import Cost


def estimate_search(collection: Collection, method: Retriever, questions: Sequence[str], k: int) -> None:
    """Count a method's search, and where not all of it is cached, the searches and stages inside it.

    Args:
        collection: Its memo is dry, and gets the counts as costs.
        method: The retrieval method.
        questions: The questions.
        k: Hits for each.
    """
    assert collection.memo is not None
    costs = collection.memo.costs
    before = _missing(costs)
    cached_search(collection, method, questions, k)
    if _missing(costs) == before:
        return
    for inner, depth in getattr(method, "inner", lambda k: [])(k):
        estimate_search(collection, inner, questions, depth)
    if isinstance(method, Reranked):
        stage = costs.setdefault(f"rerank {type(method.reranker).__name__}", Cost())
        stage.items += len(questions)
    if isinstance(method, Transformed):
        written = [text for texts in cached_expand(collection, method.transform, questions) for text in texts]
        if written:
            estimate_search(collection, method.retriever, written, max(k, method.depth))


def estimate_embedding(collection: Collection, texts: Sequence[str]) -> None:
    """Count the texts to embed, and those of them whose vectors are cached."""
    if collection.memo and isinstance(collection.embedder, CachedEmbedder):
        unique = list(dict.fromkeys(texts))
        missing = collection.embedder.missing(unique)
        collection.memo.costs["embed"] = Cost(items=len(unique), reused=len(unique) - missing)


def _missing(costs: dict[str, Cost]) -> int:
    return sum(cost.items - cost.reused for cost in costs.values())
