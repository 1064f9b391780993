"""Multi-query: several phrasings of a question, each searched, their results fused."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.written import _expanded, lines
from rag.runtime.options import Count


@dataclass(frozen=True, kw_only=True)
class MultiQuery(Instruction):
    """Up to `count` other ways to ask the question, written as one list. Raises UserError for a count below 1."""

    count: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Each question, and the other ways to ask it that the model wrote, in its order."""
        return _expanded(self, collection, questions, lines, self.include_original, most=self.count)
