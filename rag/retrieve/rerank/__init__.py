"""Rerankers put retrieved passages into a better order. This is the protocol of a reranker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rag.retrieve.collection import Collection
from rag.types import Hit


@runtime_checkable
class Reranker(Protocol):
    """A frozen dataclass that puts retrieved passages into a better order.

    It has `depends_on`, a tuple of "embedder", "generator" or both, if its results depend on these models, beside the
    passages.
    """

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """Return the hits of each question with new scores, best first; some may be left out, none is added."""
        ...
