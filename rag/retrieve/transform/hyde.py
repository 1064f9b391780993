"""HyDE (Gao et al. 2022, arXiv:2212.10496): search for hypothetical answers."""

from collections.abc import Sequence
from dataclasses import dataclass

from rag.retrieve.collection import Collection
from rag.retrieve.transform.instruction import Instruction
from rag.retrieve.transform.parse import passage
from rag.runtime.options import Count
from rag.types import UserError


@dataclass(frozen=True, kw_only=True)
class HyDE(Instruction):
    """Write `count` hypothetical passages that might answer the question, to find real ones like them.

    The paper averages the vectors of the passages and of the question and searches once. Here each text is searched,
    and the rankings are fused, so that it also works with lexical search. Raises UserError for a count below 1, and for
    several passages at temperature 0, which would all be the same.
    """

    count: Count = 1
    include_original: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count > 1 and not self.temperature:
            raise UserError(
                f"{self.count} passages at temperature 0 are the same: give transform.temperature, such as 0.7."
            )

    def expand(self, collection: Collection, questions: Sequence[str]) -> list[list[str]]:
        """Return the hypothetical passages of each question."""
        return self.expand_with(
            collection,
            questions,
            passage,
            most=self.count,
            include_original=self.include_original,
            copies=self.count,
        )
