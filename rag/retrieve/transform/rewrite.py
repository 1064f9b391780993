"""Query rewriting: search for one better phrasing of the question."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.parse import lines


@dataclass(frozen=True, kw_only=True)
class Rewrite(Instruction):
    """Write the question as a better query (Ma et al. 2023, "Query Rewriting for Retrieval-Augmented LLMs")."""

    include_original: bool = False  # the question is searched too, and comes first

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Return the query that the model wrote for each question."""
        return self.expand_with(collection, questions, lines, most=1, include_original=self.include_original)
