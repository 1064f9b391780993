"""Query decomposition: search for the simpler questions that a question consists of."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.parse import lines
from rag.runtime.options import Count


@dataclass(frozen=True, kw_only=True)
class Decompose(Instruction):
    """Write up to `max_parts` simpler questions that make up the question. Raises UserError for max_parts below 1."""

    max_parts: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Return each question, and its parts in the model's order."""
        return self.expand_with(
            collection, questions, lines, most=self.max_parts, include_original=self.include_original
        )
