"""An index that another process replaces while this one has it open: it stays as it was when it was opened."""

import random
import subprocess
import sys

from rag import pipeline
from rag.embed import BagOfWords
from rag.index.store import Index
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Hybrid, Lexical, Search
from rag.types import Hit
from tests.crash.workloads import ANALYZER, CHUNKER, write_corpus

_REPLACE = """
import sys
from pathlib import Path
from rag import pipeline
from rag.embed import BagOfWords
from tests.crash.workloads import ANALYZER, CHUNKER
pipeline.ingest(Path(sys.argv[1]), Path(sys.argv[2]), CHUNKER, BagOfWords(), ANALYZER)
"""


_METHODS = (Dense(), Lexical(analyzer=ANALYZER), Hybrid(depth=8))


def test_an_open_index_answers_after_it_was_replaced(tmp_path):
    corpora = [write_corpus(tmp_path / str(seed), random.Random(seed), 4, 60) for seed in (1, 2)]
    path = tmp_path / "index"
    pipeline.ingest(corpora[0], path, CHUNKER, BagOfWords(), ANALYZER)
    wanted, before = _answers(Index.open(path)), Index.open(path)
    subprocess.run([sys.executable, "-c", _REPLACE, corpora[1], path], check=True)
    assert Index.open(path).generation == 2
    assert _answers(before) == wanted != _answers(Index.open(path))


def _answers(index: Index) -> list[list[Hit]]:
    """By each method, with the embedder restored and nothing asked before."""
    collection = Collection(index, index.restore(BagOfWords()))
    return [Search(collection, method)("ab cd ef") for method in _METHODS]
