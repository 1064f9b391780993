"""What a search would compute, counted without computing it, on a collection whose memo is dry."""

from collections.abc import Sequence

from rag.retrieve import Retriever
from rag.retrieve.collection import Collection
from rag.retrieve.search import Reranked, Transformed
from rag.runtime.memo import Cost


def estimate_search(collection: Collection, method: Retriever, questions: Sequence[str], k: int) -> None:
    """Count a method's search, and where it is not all kept, the searches and stages that it is made of."""
    costs = collection.memo.costs
    before = _missing(costs)
    collection.search(method, questions, k)
    if _missing(costs) == before:
        return
    for inner, depth in getattr(method, "inner", lambda k: [])(k):
        estimate_search(collection, inner, questions, depth)
    if isinstance(method, Reranked):
        stage = costs.setdefault(f"rerank {type(method.reranker).__name__}", Cost())
        stage.items += len(questions)
    if isinstance(method, Transformed):
        written = [text for texts in collection.expand(method.transform, questions) for text in texts]
        if written:
            estimate_search(collection, method.retriever, written, max(k, method.depth))


def _missing(costs: dict[str, Cost]) -> int:
    return sum(cost.items - cost.reused for cost in costs.values())
