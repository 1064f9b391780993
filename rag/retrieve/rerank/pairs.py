"""Make (question, passage) pairs from hits, and sort hits by new scores."""

from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np

from rag.types import Hit


def question_passage_pairs(questions: Sequence[str], hits: Sequence[Sequence[Hit]]) -> list[tuple[str, str]]:
    """Return (question, passage) of every hit, question by question."""
    return [
        (question, hit.chunk.text) for question, found in zip(questions, hits, strict=True) for hit in found
    ]


def ranked(hits: Sequence[Sequence[Hit]], scores: Sequence[float] | np.ndarray) -> list[list[Hit]]:
    """Return the hits of each question by new scores, best first; hits of equal score keep their order.

    `scores` has the score of every hit, question by question.
    """
    each: Iterator[float] = iter(scores)
    scored = [[replace(hit, score=float(next(each))) for hit in found] for found in hits]
    return [sorted(found, key=lambda hit: -hit.score) for found in scored]
