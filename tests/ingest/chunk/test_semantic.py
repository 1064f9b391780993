"""Chunks end where an embedder sees the subject change."""

import re
from itertools import pairwise

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.ingest.chunk.semantic import SemanticChunker, neighbour_distances
from rag.ingest.chunk.split import chunks_of
from rag.types import Document, UserError

SUBJECTS = ["tide", "ice", "wind"]
TEXT = "A tide rises. The tide falls. Tide again. Ice is cold. More ice. Ice floats. Wind blows. A wind."


def words(text):
    return np.array([match.span() for match in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)


def encode(texts):
    """Return unit vectors of which of three subjects each text has."""
    counts = np.array([[text.lower().count(subject) for subject in SUBJECTS] for text in texts], np.float32)
    return counts / np.maximum(np.linalg.norm(counts, axis=1, keepdims=True), 1e-9).astype(np.float32)


def split(chunker, text=TEXT, encode=encode):
    return [text[start:end] for start, end in chunker.split(text, words, encode)]


def test_a_chunk_ends_where_the_subject_changes():
    assert split(SemanticChunker(100, percentile=50.0, window=0)) == [
        "A tide rises. The tide falls. Tide again.",
        "Ice is cold. More ice. Ice floats.",
        "Wind blows. A wind.",
    ]


def test_what_is_longer_than_the_size_is_divided_at_sentences():
    assert split(SemanticChunker(6, percentile=50.0, window=0)) == [
        "A tide rises. The tide falls.",
        "Tide again.",
        "Ice is cold. More ice.",
        "Ice floats.",
        "Wind blows. A wind.",
    ]


def test_sentences_are_embedded_with_their_neighbours():
    seen = []

    def watch(texts):
        seen.extend(texts)
        return encode(texts)

    split(SemanticChunker(100, window=1), "One.  Two. Three.\nFour.", watch)
    assert seen == ["One.  Two.", "One.  Two. Three.", "Two. Three.\nFour.", "Three.\nFour."]


def test_the_percentile_decides_how_many_changes_are_ends():
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(40, 8)).astype(np.float32)
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    text = " ".join(f"Sentence {i}." for i in range(40))
    for percentile in (0, 50.0, 90, 100):
        chunks = split(SemanticChunker(1000, percentile, 0), text, lambda texts: vectors)
        distances = [1 - float(np.dot(a.astype(float), b)) for a, b in pairwise(vectors)]
        ends = sum(distance > np.percentile(distances, percentile) for distance in distances)
        assert len(chunks) == ends + 1


def test_a_text_that_never_changes_has_no_ends():
    assert split(
        SemanticChunker(100, percentile=0), "One. Two. Three.", lambda t: np.ones((len(t), 1), np.float32)
    ) == ["One. Two. Three."]
    assert split(SemanticChunker(100), "Only one sentence") == ["Only one sentence"]


def test_distances():
    vectors = np.array([[1, 0], [1, 0], [0, 1], [0, -1], [0, 0]], np.float32)
    np.testing.assert_array_equal(neighbour_distances(vectors), [0.0, 1.0, 2.0, 1.0])


def test_the_embedder_of_the_index_is_the_one_that_decides():
    document = Document("d", "d", "Red red red. Red red. Blue blue. Blue.")
    chunks = chunks_of(document, SemanticChunker(100, percentile=60.0, window=0), BagOfWords())
    assert [chunk.text for chunk in chunks] == ["Red red red. Red red.", "Blue blue. Blue."]
    with pytest.raises(ValueError, match="give chunks_of the embedder"):
        chunks_of(document, SemanticChunker(100), BagOfWords().token_spans)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 0}, "size=0 .* a whole number"),
        ({"size": 9, "percentile": 101.0}, r"percentile=101\.0 .* from 0 to 100"),
        ({"size": 9, "percentile": -1}, "percentile=-1 .* from 0 to 100"),
        ({"size": 9, "window": -1}, "window=-1 .* a whole number from 0"),
    ],
)
def test_impossible_options_are_errors(options, message):
    with pytest.raises(UserError, match=message):
        SemanticChunker(**options)
