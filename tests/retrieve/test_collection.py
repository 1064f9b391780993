"""What a collection knows of its chunks without making all of them: rows, rows of documents, and passages drawn."""

import random
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate.ablation import ContextAblation, passages
from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.questions import Evidence
from rag.index import store
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.memory import MemoryIndex
from rag.index.writer import write_index
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Hybrid, Lexical
from rag.types import Chunk, Document, Hit, UserError, chunk_at
from tests.tiny_collections import StubEmbedder, make_chunks, make_documents, make_vectors


def dataset(corpus, qrels, evidence=None) -> Dataset:
    return Dataset(
        name="d", corpus=tuple(corpus), queries={"q": "?"}, qrels={"q": qrels}, answers={}, unjudged={},
        unanswerable=frozenset(), drop_self_hits=False, problems=(), evidence=evidence or {},
    )  # fmt: skip


def collection(documents: list[Document], chunks: list[Chunk]) -> Collection:
    return Collection(
        MemoryIndex(documents, chunks, lambda texts: np.zeros((len(texts), 1), np.float32)), BagOfWords()
    )


@pytest.fixture(params=["memory", "disk"])
def both(request, tmp_path):
    """A collection of either kind, with its chunks in an order that is not that of the documents."""
    documents = make_documents(count=7)
    chunks = random.Random(0).sample(make_chunks(documents), len(make_chunks(documents)))
    if request.param == "memory":
        return collection(documents, chunks), chunks
    path = tmp_path / "index"
    write_index(path, documents, chunks, make_vectors(len(chunks)), StubEmbedder())
    return Collection(store.Index.open(path), StubEmbedder()), chunks


def test_rows_and_spans(both):
    made, chunks = both
    assert made.hits([2, 0], [0.5, 0.25]) == [Hit(chunks[2], 0.5, 2), Hit(chunks[0], 0.25, 0)]
    names = made.index.document_ids()
    spans = made.index.spans
    assert spans.dtype == np.int64
    assert [(names[document], start, end) for document, start, end in spans.tolist()] == [
        (chunk.document_id, chunk.start, chunk.end) for chunk in chunks
    ]
    for wanted in ([], ["nowhere"], names[:1], [*names[2:4], "nowhere", names[2]], names):
        expected = [row for row, chunk in enumerate(chunks) if chunk.document_id in wanted]
        assert made.rows_of(wanted).tolist() == expected


class Counting(store.Index):
    """An index that counts the chunks it makes."""

    made = 0

    def chunks(self, rows):
        self.made += len(rows)
        return super().chunks(rows)


@pytest.mark.parametrize("count", [200, 1000])
def test_questions_make_no_more_chunks_in_a_larger_index(tmp_path, count):
    texts = [f"seal number {i} eats fish {i % 7}" for i in range(count)]
    documents = [Document(f"d{i}", f"d{i}", text) for i, text in enumerate(texts)]
    chunks = [chunk_at(document, 0, len(document.text)) for document in documents]
    embedder = BagOfWords().fit(texts)
    lexical = LexicalIndex.build(texts, Analyzer())
    write_index(tmp_path, documents, chunks, embedder.encode(texts), embedder, {}, lexical)
    index = Counting.open(tmp_path)
    searched = Collection(index, embedder)
    hybrid = Hybrid({"dense": Dense(), "lexical": Lexical(analyzer=Analyzer())}, depth=10)
    [hits] = cached_search(searched, hybrid, ["seal number 3"], 5)
    assert hits[0].chunk.document_id == "d3"
    given_out = dataset(documents, {"d3": 1, "d9": 2})
    for condition in ("oracle", "random"):
        assert passages(condition, searched, given_out, "q", (), ContextAblation(k=3))
    assert index.made <= 60  # whatever the index holds


GRADES = st.dictionaries(st.sampled_from([f"a/{i}.md" for i in range(7)] + ["gone"]), st.integers(-1, 2))


@given(GRADES, st.lists(st.tuples(st.integers(0, 7), st.integers(0, 300), st.integers(1, 90)), max_size=4),
       st.integers(1, 200), st.integers(0, 3))  # fmt: skip
def test_passages_are_those_of_a_look_at_every_chunk(grades, spans, k, seed):
    documents = make_documents(count=7)
    chunks = random.Random(1).sample(make_chunks(documents), len(make_chunks(documents)))
    evidence = {"q": tuple(Evidence(f"a/{d}.md", start, start + size) for d, start, size in spans)}
    data, reading = dataset(documents, grades, evidence if spans else {}), ContextAblation(k=k, seed=seed)

    def weight(chunk: Chunk) -> int:
        if not spans:
            return max(0, grades.get(chunk.document_id, 0))
        inside = [e for e in evidence["q"] if e.document == chunk.document_id]
        return max([0, *(min(e.end, chunk.end) - max(e.start, chunk.start) for e in inside)])

    made = collection(documents, chunks)
    useful = [(row, chunk) for row, chunk in enumerate(chunks) if weight(chunk)]
    useful = sorted(useful, key=lambda pair: -weight(pair[1]))[:k]
    oracle = passages("oracle", made, data, "q", (), reading)
    assert oracle == [Hit(chunk, 1.0 - i / len(useful), row) for i, (row, chunk) in enumerate(useful)]
    foreign = [chunk for chunk in chunks if grades.get(chunk.document_id, 0) <= 0]
    drawn = random.Random(f"{seed} q").sample(foreign, min(k, len(foreign)))
    assert [hit.chunk for hit in passages("random", made, data, "q", (), reading)] == drawn


def test_a_stage_that_names_its_models_in_the_old_way_is_refused():
    """Without its models in the cache key its results would be found again under another model."""

    @dataclass(frozen=True)
    class Old:
        uses: ClassVar[tuple[str, ...]] = ("embedder",)

    with pytest.raises(UserError, match="`depends_on` now: rename it"):
        collection([], []).cache_key(Old())


@pytest.mark.parametrize("row", [-1, 2])
def test_a_row_that_the_index_does_not_have_is_refused(row):
    documents = [Document("a", "a", "one"), Document("b", "b", "two")]
    made = collection(documents, [chunk_at(document, 0, 3) for document in documents])
    assert [hit.chunk.text for hit in made.hits(np.array([1, 0]), [2.0, 1.0])] == ["two", "one"]
    with pytest.raises(UserError, match="rows 0 to 1, and a stage asked for"):
        made.hits([0, row], [2.0, 1.0])
