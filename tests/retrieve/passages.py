"""Passages, questions and hits for the tests of rerankers."""

from rag.retrieve.collection import Collection
from rag.types import Hit

TEXTS = ["a seal eats fish", "fish", "krill drift in swarms " * 12, "a gull nests on a cliff", "", "the seal"]
QUESTIONS = ["what does a seal eat", "gulls", "q" * 200]


def hits_of(collection: Collection, rows) -> list[Hit]:
    """Return these rows as hits, with falling scores."""
    return collection.hits(rows, [1 / (1 + rank) for rank in range(len(rows))])


def all_hits(collection: Collection) -> list[list[Hit]]:
    """Return every passage as a hit of every question."""
    return [hits_of(collection, range(len(TEXTS))) for _ in QUESTIONS]


def scores_of(results) -> list[dict[str, float]]:
    """Return the score of each passage, by its text, for each question."""
    return [{hit.chunk.text: hit.score for hit in found} for found in results]
