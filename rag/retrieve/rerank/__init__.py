"""Rerankers put retrieved passages into a better order. This is the protocol of a reranker."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rag.retrieve.collection import Collection
from rag.types import Hit


@runtime_checkable
class Reranker(Protocol):
    """A frozen dataclass that puts retrieved passages into a better order."""

    @property
    def depends_on(self) -> tuple[str, ...]:
        """Return which of "embedder" and "generator" the results depend on, beside the passages."""
        ...

    def rerank(
        self, collection: Collection, questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """Return the hits of each question with new scores, best first; some may be left out, none is added."""
        ...
