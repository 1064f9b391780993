"""Retrieval: questions in, ranked hits out. This is the protocol of a retriever."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from rag.retrieve.collection import Collection
from rag.types import Hit


@runtime_checkable
class Retriever(Protocol):
    """A frozen dataclass that finds passages for questions.

    It has `depends_on`, a tuple of "embedder", "generator" or both, if its results depend on these models, beside the
    passages. It may have `lowest`, the lowest score that it can give, for fusion.theoretical_min_max, and `inner(k)`,
    the methods and depths that it searches for the same questions, for the plan of an evaluation.
    """

    def search(self, collection: Collection, questions: Sequence[str], k: int) -> list[list[Hit]]:
        """Return at most k hits for each question, best first; the passage that was ingested first wins a tie."""
        ...
