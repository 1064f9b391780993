"""Query decomposition: the simpler questions that a question is made of."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.written import _expanded, lines
from rag.runtime.options import Count


@dataclass(frozen=True, kw_only=True)
class Decompose(Instruction):
    """Up to `max_parts` simpler questions that make up the question. Raises UserError for max_parts below 1."""

    max_parts: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Each question, and its parts in the model's order."""
        return _expanded(self, collection, questions, lines, self.include_original, most=self.max_parts)
