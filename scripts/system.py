"""The settings of a whole system that answers questions, and its retrieval method."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from settings import Part, Shared, build, target_of

from rag.runtime.options import Count
from rag.runtime.stages import wrong_result

if TYPE_CHECKING:
    from rag.evaluate.datasets import Dataset


@dataclass(frozen=True, kw_only=True)
class SystemSettings(Shared):
    """The settings that scripts/eval.py, generate.py and sensitivity.py have in common."""

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


def build_method(config):
    """Build the retriever of the config, wrapped in its transform and its reranker where they are chosen."""
    from rag.retrieve.search import Reranked, Transformed

    method = build(config.retriever)
    if transform := config.get("transform"):
        method = Transformed(method, build(transform), build(config.fusion))
    if reranker := config.get("reranker"):
        method = Reranked(method, build(reranker), config.rerank_depth)
    return method


def check_dataset(dataset: Any, config) -> "Dataset":
    """Return what the function of a dataset's config returned. Raise UserError where it is no dataset."""
    from rag.evaluate.datasets import Dataset

    if not isinstance(dataset, Dataset):
        raise wrong_result(target_of(config), config._target_, dataset, "a Dataset")
    return dataset
