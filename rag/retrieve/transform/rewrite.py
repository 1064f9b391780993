"""Query rewriting: one better phrasing of the question."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.written import _expanded, lines


@dataclass(frozen=True, kw_only=True)
class Rewrite(Instruction):
    """The question as a better query (Ma et al. 2023, "Query Rewriting for Retrieval-Augmented LLMs")."""

    include_original: bool = False  # the question is searched too, and stands first

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """The query that the model wrote for each question."""
        return _expanded(self, collection, questions, lines, self.include_original, most=1)
