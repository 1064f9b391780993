"""Multi-query: search for several phrasings of a question, and fuse the results."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.parse import lines
from rag.runtime.options import Count


@dataclass(frozen=True, kw_only=True)
class MultiQuery(Instruction):
    """Write up to `count` other phrasings of the question, as one list. Raises UserError for a count below 1."""

    count: Count = 3
    include_original: bool = True

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Return each question, and its other phrasings in the model's order."""
        return self.expand_with(
            collection, questions, lines, most=self.count, include_original=self.include_original
        )
