"""From a configuration to a retrieval method: the retriever, with what is wrapped around it."""

from launch import build

from rag.types import UserError


def method_of(config):
    """The retriever of the config, its transform and its reranker around it where they are chosen."""
    from rag.retrieve.search import Reranked, Transformed

    method = build(config.retriever)
    if transform := config.get("transform"):
        method = Transformed(method, build(transform), build(config.fusion))
    if reranker := config.get("reranker"):
        if type(config.rerank_depth) is not int:
            raise UserError(f"rerank_depth={config.rerank_depth} will not do: it must be int.")
        method = Reranked(method, build(reranker), config.rerank_depth)
    return method
