"""The options of a measurement of numerical sensitivity, and the system that is measured."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from rag.embed import Embedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.generate import Generator
from rag.generate.local import WeightsDtype
from rag.ingest.chunk import Chunker
from rag.pipeline import Reader
from rag.retrieve import Retriever
from rag.runtime.options import Count, Filled, Whole, check_fields

VectorDtype = Literal["float32", "bfloat16", "float16"]


@dataclass(frozen=True)
class SensitivityOptions:
    """The settings that are varied and what is compared; an empty list leaves its axis out.

    conf/sensitivity.yaml has the defaults. Raises UserError for values that are not allowed.
    """

    k: Count  # passages of a list
    questions: Count | None  # drawn by the dataset's seed; None: all
    measure: Filled
    tokens_per_batch: Sequence[Count]
    search_batches: Sequence[Count | Literal["all"]]
    vector_dtypes: Sequence[VectorDtype]
    answers: Whole  # questions that are answered; 0: none
    passages: Count  # in a prompt
    answer_batches: Sequence[Count]
    answer_budgets: Whole  # how many lengths are tried; 0: none
    answer_dtypes: Sequence[WeightsDtype]

    def __post_init__(self) -> None:
        check_fields(self)
        retrieval_metrics.check([self.measure])

    @property
    def depth(self) -> int:
        """The documents to search for: as many as the list, the prompt and the metric need."""
        return max(self.k, self.passages, int(self.measure.partition("@")[2] or 0))


@dataclass(frozen=True)
class SystemUnderTest:
    """The system that is measured, and functions that build its parts with one setting changed.

    Such a function is None where the part does not have the setting. Then the axis of an embedder's batches or of a
    generator's dtypes is left out; a generator without tokens_per_batch divides its batches as it likes.
    """

    dataset: Dataset
    chunker: Chunker
    embedder: Embedder
    method: Retriever
    generator: Callable[[], Generator]
    reader: Callable[[Generator], Reader]
    embedder_of_batch: Callable[[int], Embedder] | None = None  # of tokens_per_batch
    generator_of_batch: Callable[[int], Generator] | None = None  # of tokens_per_batch
    generator_of_dtype: Callable[[str], Generator] | None = None


class Variation(NamedTuple):
    """One setting that is tried."""

    axis: str
    setting: str
    compute: Callable[[], Any]  # what it changes: the lists, or a pair of answers before and after
