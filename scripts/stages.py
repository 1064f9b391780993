"""From a configuration to a retrieval method: the retriever, with what is wrapped around it."""

from settings import build


def method_of(config):
    """The retriever of the config, its transform and its reranker around it where they are chosen."""
    from rag.retrieve.search import Reranked, Transformed

    method = build(config.retriever)
    if transform := config.get("transform"):
        method = Transformed(method, build(transform), build(config.fusion))
    if reranker := config.get("reranker"):
        method = Reranked(method, build(reranker), config.rerank_depth)
    return method
