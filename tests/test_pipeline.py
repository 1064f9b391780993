"""Files to answer through every stage, with counted words as the embedder and a generator that shows its prompt."""

from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest

from rag import pipeline
from rag.context import ContextOptions
from rag.embed import BagOfWords
from rag.index.analyzer import Analyzer
from rag.index.lexical import LexicalIndex
from rag.index.store import Index
from rag.ingest.chunk import SentenceChunker
from rag.ingest.semantic import SemanticChunker
from rag.pipeline import AnswerOptions, Reader
from rag.prompt import PromptTemplate
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Lexical, Search
from rag.types import Answer, Message, Usage, UserError

FILES = {
    "seal.txt": "A seal eats fish. It sleeps on ice.",
    "krill.md": "# Krill\n\nKrill drift in swarms. A whale eats krill.",
    "page.html": "<html><head><title>Gulls</title></head><body><p>A gull nests on a cliff.</p></body></html>",
    "image.png": "\x89PNG",
}
TEMPLATE = PromptTemplate(user="{context}\n\nQ: {question}", passage="[{n}] {text}", separator="\n")


@dataclass
class Echo:
    """A generator that answers with its number of messages, and keeps them. A token is a word."""

    context_length: int = 1000
    asked: list = field(default_factory=list)

    def count(self, text: str) -> int:
        return len(text.split())

    fingerprint = "echo"

    def prompt_tokens(self, messages) -> int:
        return sum(self.count(message.content) for message in messages)

    def stream(self, messages, sampling, max_new_tokens, seed, stop):
        self.asked.append(messages)
        yield "see "
        yield "[1]"
        yield Usage(self.prompt_tokens(messages), 2, 0.5, 0.25)

    def generate(self, conversations, sampling, max_new_tokens, seeds, stop):
        raise NotImplementedError

    def log_likelihood(self, pairs):
        raise NotImplementedError

    def text_log_likelihood(self, pairs):
        raise NotImplementedError


class Letters:
    """An embedder that learns nothing, so that its vectors can be kept: how often a text has each letter."""

    dim, relevant_from, spec = 26, None, {"kind": "letters"}

    def __init__(self, fingerprint="letters"):
        self.fingerprint, self.encoded = fingerprint, []

    def encode(self, texts, progress=lambda done: None):
        self.encoded += texts
        counts = np.array([[text.lower().count(chr(97 + i)) for i in range(26)] for text in texts])
        vectors = counts.reshape(-1, 26) / np.linalg.norm(counts.reshape(-1, 26), axis=1, keepdims=True)
        return vectors.astype(np.float32)

    def encode_queries(self, texts):
        return self.encode(texts)

    def token_spans(self, text):
        return BagOfWords().token_spans(text)

    def fit(self, texts):
        return self

    def save(self, folder):
        pass

    def restore(self, folder):
        return self


@pytest.fixture(autouse=True)
def _cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def corpus(tmp_path):
    folder = tmp_path / "corpus"
    folder.mkdir()
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="latin-1")
    return folder


@pytest.fixture
def search(corpus, tmp_path):
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords())
    index = Index.open(tmp_path / "index")
    return Search(Collection(index, index.restore(BagOfWords())), Dense(), k=3)


def reader(generator, **context):
    return Reader(generator, TEMPLATE, ContextOptions(**context), options=AnswerOptions(max_new_tokens=10))


def asked(question, search, reader, history=()):
    *pieces, answer = pipeline.answer(question, search, reader, history)
    assert isinstance(answer, Answer)
    return "".join(pieces), answer


def texts_of(index):
    opened = Index.open(index)
    return [chunk.text for chunk in opened.chunks(range(len(opened)))]


def test_ingest_reports_what_it_read_and_what_it_skipped(corpus, tmp_path):
    seen = []
    report = pipeline.ingest(
        corpus, tmp_path / "index", SentenceChunker(8), BagOfWords(), None, lambda *step: seen.append(step)
    )
    assert (report.documents, report.chunks) == (3, 4)  # the last two sentences of krill.md are nine words
    assert [skipped.path for skipped in report.skipped] == ["image.png"]
    index = Index.open(tmp_path / "index")
    texts = [chunk.text for chunk in index.chunks(range(len(index)))]
    assert "A whale eats krill." in texts
    assert report.tokens == sum(len(text.split(" ")) for text in texts)
    assert {stage for stage, _, _ in seen} == {"load", "chunk", "embed"}
    assert seen[-1] == ("embed", 4, 4)


def test_nothing_is_embedded_twice(corpus, tmp_path):
    """Not even into another index by another object; a text that is cut otherwise is another one."""
    chunker, first, second = SentenceChunker(8), Letters(), Letters()
    report = pipeline.ingest(corpus, tmp_path / "index", chunker, first)
    assert (report.embedded, sorted(first.encoded)) == (4, sorted(texts_of(tmp_path / "index")))
    (corpus / "new.txt").write_text("An albatross glides.")
    report = pipeline.ingest(corpus, tmp_path / "other", chunker, second)
    assert (report.embedded, second.encoded) == (1, ["An albatross glides."])
    np.testing.assert_array_equal(
        Index.open(tmp_path / "other").vectors, Letters().encode(texts_of(tmp_path / "other"))
    )
    assert pipeline.ingest(corpus, tmp_path / "other", SentenceChunker(30), second).embedded == 1


def test_vectors_that_depend_on_the_corpus_are_not_kept(corpus, tmp_path):
    for _ in range(2):
        assert pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords()).embedded == 4
    assert not (tmp_path / "cache").exists()


def test_a_chunker_may_compare_meanings(corpus, tmp_path):
    pipeline.ingest(corpus, tmp_path / "index", SemanticChunker(size=8), Letters())
    assert "".join("".join(texts_of(tmp_path / "index")).split()) == "".join(
        "".join(
            Index.open(tmp_path / "index").document_text(n) for n in sorted(FILES) if n != "image.png"
        ).split()
    )


def test_words_are_searched_in_postings_that_the_index_keeps(corpus, tmp_path, monkeypatch):
    """With the analyzer of the ingest nothing is built anew; with another one the hits are the same as ever."""
    plain = Analyzer(stop_words=None)
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords(), Analyzer())
    pipeline.ingest(corpus, tmp_path / "without", SentenceChunker(8), BagOfWords())
    kept, without = Index.open(tmp_path / "index"), Index.open(tmp_path / "without")
    assert without.lexical is None
    built = []
    build = LexicalIndex.build

    def watched(texts, analyzer):
        built.append(analyzer)
        return build(texts, analyzer)

    monkeypatch.setattr(LexicalIndex, "build", watched)
    found = [
        [
            Collection(index, BagOfWords()).search(Lexical(analyzer=a), ["a whale eats", "ice"], 3)
            for a in (Analyzer(), plain)
        ]
        for index in (kept, without)
    ]
    assert built == [plain, Analyzer(), plain]
    assert found[0] == found[1]
    assert [hit.chunk.path for hit in found[0][0][0]] == ["krill.md", "seal.txt"]


def test_ingesting_again_replaces_the_index(corpus, tmp_path):
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords())
    (corpus / "seal.txt").unlink()
    report = pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), BagOfWords())
    assert report.documents == Index.open(tmp_path / "index").documents == 2


def test_a_folder_with_nothing_to_read_leaves_no_index(tmp_path):
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "a.bin").write_bytes(b"\0")
    with pytest.raises(UserError, match=r"no document in .*a\.bin"):
        pipeline.ingest(tmp_path / "corpus", tmp_path / "index", SentenceChunker(8), BagOfWords())
    assert not (tmp_path / "index").exists()


def test_a_folder_of_something_else_is_not_written_into(corpus, tmp_path):
    home = tmp_path / "home"
    home.mkdir()
    (home / "letter.txt").write_text("dear")
    with pytest.raises(UserError, match=r"letter\.txt"):
        pipeline.ingest(corpus, home, SentenceChunker(8), BagOfWords())
    assert [path.name for path in home.iterdir()] == ["letter.txt"]


def test_the_answer_streams_and_its_sources_are_spans_of_the_documents(search):
    generator = Echo()
    text, answer = asked("what eats krill.", search, reader(generator))
    assert text == answer.answer == "see [1]"
    assert not answer.abstained
    best = answer.sources[0]
    assert best.path == "krill.md"
    assert "A whale eats krill." in best.text
    for source in answer.sources:
        assert search.collection.index.document_text(source.path)[source.start : source.end] == source.text
        assert f"[{source.n}] {source.text}" in generator.asked[0][-1].content
    assert (answer.timings.prefill_s, answer.timings.new_tokens) == (0.5, 2)
    assert answer.cited == (1,)


def test_without_a_relevant_hit_no_model_is_asked(search):
    generator = Echo()
    text, answer = asked("quantum chromodynamics", search, reader(generator, min_score=0.2))
    assert answer.abstained
    assert text == answer.answer == TEMPLATE.abstain_answer
    assert (answer.sources, generator.asked) == ((), [])


def test_a_long_prompt_loses_passages_and_says_so(search):
    _, whole = asked("a whale eats krill", search, reader(Echo()))
    generator = Echo(context_length=whole.timings.prompt_tokens - 2 + 10)
    _, answer = asked("a whale eats krill", search, reader(generator))
    assert 0 < len(answer.sources) <= len(whole.sources)
    assert answer.timings.prompt_tokens <= generator.context_length - 10
    assert any("longer than the model's context" in notice for notice in answer.notices)
    assert whole.notices == ()


def test_old_turns_go_before_the_last_passage(search):
    history = [
        Message("user", "old " * 30),
        Message("assistant", "older " * 30),
        Message("user", "new"),
        Message("assistant", "yes"),
    ]
    generator = Echo(context_length=50)
    _, answer = asked("a whale eats krill", search, reader(generator), history)
    assert answer.sources
    assert [message.content for message in generator.asked[0][:-1]] == ["new", "yes"]
    assert any("oldest 2 messages" in notice for notice in answer.notices)


def test_a_question_that_cannot_fit_is_told(search):
    with pytest.raises(UserError, match="leaves no room for a passage"):
        asked("krill " * 100, search, reader(Echo(context_length=50)))


def test_another_embedder_than_the_index_was_made_with_is_told(search):
    class Other(BagOfWords):
        def __init__(self):
            super().__init__()
            self.fingerprint = "another"

    with pytest.raises(UserError, match="built by another embedder"):
        Index.open(Path(search.collection.index.path)).restore(Other())


def test_k_below_one_is_told(search):
    with pytest.raises(UserError, match="k is 0"):
        Search(search.collection, Dense(), k=0)


def test_any_method_can_feed_the_reader(search):
    _, answer = asked("krill whale", replace(search, method=Lexical()), reader(Echo(), min_score="auto"))
    assert [source.path for source in answer.sources] == ["krill.md"]  # no other shares a word


@pytest.mark.parametrize("options", [{"stop": "END"}, {"seed": -1}, {"seed": 1 << 32}, {"max_new_tokens": 0}])
def test_answer_options_that_cannot_be_are_told(options):
    with pytest.raises(UserError, match=f"answer.{next(iter(options))}"):
        AnswerOptions(**options)
