"""Query transforms: other texts to search for in place of a question. The protocol of a transform."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol, runtime_checkable

if TYPE_CHECKING:
    from rag.retrieve.collection import Collection


@runtime_checkable
class Transform(Protocol):
    """A frozen dataclass that writes other texts to search for in place of a question."""

    @property
    def uses(self) -> tuple[str, ...]: ...

    def expand(self, collection: "Collection", questions: Sequence[str]) -> list[list[str]]:
        """One text or more for each question, the most important first."""
        ...
