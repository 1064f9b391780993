"""Rerankers: a better order of retrieved passages. The protocol of a reranker."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rag.types import Hit

if TYPE_CHECKING:
    from rag.retrieve.collection import Collection


@runtime_checkable
class Reranker(Protocol):
    """A frozen dataclass that puts found passages into a better order."""

    @property
    def uses(self) -> tuple[str, ...]: ...

    def rerank(
        self, collection: "Collection", questions: Sequence[str], hits: Sequence[Sequence[Hit]]
    ) -> list[list[Hit]]:
        """The same passages with new scores, best first; passages may be left out, none is added."""
        ...
