"""Retrieval: a question in, ranked hits out. The protocol of a retriever."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from rag.types import Hit

if TYPE_CHECKING:
    from rag.retrieve.collection import Collection


@runtime_checkable
class Retriever(Protocol):
    """A frozen dataclass that finds passages for questions."""

    @property
    def uses(self) -> tuple[str, ...]:
        """Which of "embedder" and "generator" the results depend on, beside the passages."""
        ...

    def search(self, collection: "Collection", questions: Sequence[str], k: int) -> list[list[Hit]]:
        """At most k hits for each question, best first, ties to the passage that was ingested first."""
        ...
