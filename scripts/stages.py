"""The settings of a system that answers questions, and its retrieval method with what is wrapped around it."""

from dataclasses import dataclass

from settings import Part, Shared, build

from rag.runtime.options import Count


@dataclass(frozen=True, kw_only=True)
class System(Shared):
    """A whole system, from a question to its answer."""

    rerank_depth: Count
    embedder: Part
    analyzer: Part
    fusion: Part
    vector_index: Part
    retriever: Part
    transform: Part | None = None
    reranker: Part | None = None
    context: Part
    prompt: Part
    generator: Part
    sampling: Part
    answer: Part


def method_of(config):
    """The retriever of the config, its transform and its reranker around it where they are chosen."""
    from rag.retrieve.search import Reranked, Transformed

    method = build(config.retriever)
    if transform := config.get("transform"):
        method = Transformed(method, build(transform), build(config.fusion))
    if reranker := config.get("reranker"):
        method = Reranked(method, build(reranker), config.rerank_depth)
    return method
