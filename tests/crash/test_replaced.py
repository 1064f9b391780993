"""An open index does not change when another writer replaces it."""

import random

from rag import pipeline
from rag.embed.bag_of_words import BagOfWords
from rag.index.store import Index
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Hybrid, Lexical, Search
from rag.types import Hit
from tests.crash.workloads import ANALYZER, CHUNKER, write_corpus

_METHODS = (Dense(), Lexical(analyzer=ANALYZER), Hybrid(depth=8))


def test_an_open_index_answers_after_it_was_replaced(tmp_path):
    corpora = [write_corpus(tmp_path / str(seed), random.Random(seed), 4, 60) for seed in (1, 2)]
    path = tmp_path / "index"
    pipeline.ingest(corpora[0], path, CHUNKER, BagOfWords(), ANALYZER)
    wanted, before = _answers(Index.open(path)), Index.open(path)
    pipeline.ingest(corpora[1], path, CHUNKER, BagOfWords(), ANALYZER)  # as another process would
    assert Index.open(path).manifest.generation == 2
    assert _answers(before) == wanted != _answers(Index.open(path))


def _answers(index: Index) -> list[list[Hit]]:
    """Return the answers of each method, with a restored embedder and no earlier search."""
    collection = Collection(index, index.restore(BagOfWords()))
    return [Search(collection, method)("ab cd ef") for method in _METHODS]
