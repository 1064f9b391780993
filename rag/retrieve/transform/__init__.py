"""Query transforms write other texts to search for in place of a question. This is the protocol of a transform."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rag.retrieve.collection import Collection


@runtime_checkable
class Transform(Protocol):
    """A frozen dataclass that writes other texts to search for in place of a question.

    It has `depends_on`, a tuple of "embedder", "generator" or both, if the texts depend on these models.
    """

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Return one text or more for each question, the most important first."""
        ...
