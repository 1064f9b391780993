"""A dataset through the retrieval stages: what each query finds, as a run that metrics can judge."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from rag.embed import Embedder
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import DEFAULT_MEASURES
from rag.index.dense import DenseIndex
from rag.ingest.chunk import Chunker, chunks_of
from rag.types import UserError


@dataclass(frozen=True)
class Evaluation:
    """How deep to look, and what to measure. UserError for what cannot be."""

    depth: int = 100  # documents retrieved for each query
    measures: Sequence[str] = DEFAULT_MEASURES

    def __post_init__(self):
        if isinstance(self.measures, str):
            raise UserError(
                f"evaluation.measures={self.measures} is one name: write a list, [{self.measures}]"
            )
        object.__setattr__(self, "measures", tuple(self.measures))  # a YAML list must become hashable
        if self.depth < 1:
            raise UserError(f"evaluation.depth is {self.depth}; give 1 or more")


def retrieve(
    dataset: Dataset,
    chunker: Chunker,
    embedder: Embedder,
    depth: int = 100,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> dict[str, dict[str, float]]:
    """Query id -> document id -> score, the `depth` best documents of each query, exactly.

    A document scores as its best chunk (MaxP; Dai and Callan 2019). Where queries are documents of the corpus,
    none finds itself. Raises UserError when no document has text.
    """
    chunks = [c for document in dataset.corpus for c in chunks_of(document, chunker, embedder.token_spans)]
    if not chunks:
        raise UserError(f"no document of {dataset.name} has text; check the dataset's corpus")
    texts = [chunk.text for chunk in chunks]
    embedder = embedder.fit(texts)
    vectors = embedder.encode(texts, progress=lambda done: progress("embed", done, len(texts)))
    questions = embedder.encode_queries(list(dataset.queries.values()))
    owners = [chunk.document_id for chunk in chunks]
    own = list(dataset.queries) if dataset.drop_self_hits else [None] * len(questions)
    found = _search(DenseIndex(vectors), questions, owners, own, depth)
    return dict(zip(dataset.queries, found, strict=True))


def _search(
    index: DenseIndex, questions: np.ndarray, owners: Sequence[str], own: Sequence[str | None], depth: int
) -> list[dict[str, float]]:
    """Each question's documents; those whose chunks crowd out other documents are searched deeper again."""
    found: list[dict[str, float]] = [{} for _ in questions]
    short, k = list(range(len(questions))), depth + 1  # one more, for the question's own document
    while short:
        scores, ids = index.search(questions[short], k)
        for query, row, best in zip(short, ids, scores, strict=True):
            found[query] = _best_chunks(owners, row, best, own[query], depth)
        short = [query for query in short if len(found[query]) < depth and k < len(index)]
        k *= 4
    return found


def _best_chunks(
    owners: Sequence[str], ids: np.ndarray, scores: np.ndarray, own: str | None, depth: int
) -> dict[str, float]:
    """Document id -> its best chunk's score, of the first `depth` documents of a ranked list of chunks."""
    found: dict[str, float] = {}
    for chunk, score in zip(ids.tolist(), scores.tolist(), strict=True):
        if owners[chunk] != own:
            found.setdefault(owners[chunk], score)
        if len(found) == depth:
            break
    return found
