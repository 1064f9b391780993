"""Files to an index: what is read, embedded and kept, and folders that are added to an index later."""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from rag import pipeline
from rag.embed.bag_of_words import BagOfWords
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.store import Index
from rag.ingest.chunk.semantic import SemanticChunker
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.load.folder import LoadOptions
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense, Lexical
from rag.types import UserError
from tests.tiny_collections import FILES, checked_index, write_files


class Letters:
    """An embedder that learns nothing, so that its vectors can be kept: how often a text has each letter."""

    dim, score_threshold, spec = 26, None, {"kind": "letters"}

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
    return write_files(tmp_path / "corpus")


def texts_of(index):
    opened = Index.open(index)
    return [chunk.text for chunk in opened.chunks(range(len(opened)))]


def test_links_and_large_files_are_read_as_asked(corpus, tmp_path):
    (tmp_path / "outside.txt").write_text("An auk dives.")
    (corpus / "link.txt").symlink_to(tmp_path / "outside.txt")
    (corpus / "large.txt").write_text("A large text. " * 100_000)
    stages = corpus, tmp_path / "index", SentenceChunker(8), BagOfWords()
    report = pipeline.ingest(*stages, load=LoadOptions(max_file_mb=1))
    assert [skipped.path for skipped in report.skipped] == ["image.png", "large.txt", "link.txt"]
    report = pipeline.ingest(*stages, load=LoadOptions(follow_links=True, max_file_mb=1))
    assert [skipped.path for skipped in report.skipped] == ["image.png", "large.txt"]
    assert Index.open(tmp_path / "index").document_text("link.txt") == "An auk dives."


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
            cached_search(Collection(index, BagOfWords()), Lexical(analyzer=a), ["a whale eats", "ice"], 3)
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
    assert report.documents == Index.open(tmp_path / "index").manifest.documents == 2


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


# --- adding to an index


@pytest.fixture
def more(tmp_path):
    """A folder with a new file that comes first by name, one that comes last, one as it was, and one rewritten."""
    folder = tmp_path / "more"
    folder.mkdir()
    for name, text in (("auk.txt", "An auk dives."), ("zebra.txt", "A zebra eats grass. It runs.")):
        (folder / name).write_text(text)
    (folder / "krill.md").write_text(FILES["krill.md"])
    (folder / "seal.txt").write_text("A seal eats squid. It dives.")
    return folder


def found(index, embedder, method, question):
    """Chunk id and score of all hits, by id: the order of equal scores is that of ingestion."""
    opened = checked_index(index)
    hits = cached_search(Collection(opened, opened.restore(embedder)), method, [question], 100)[0]
    return sorted((hit.chunk.id, hit.chunk.text, pytest.approx(hit.score, abs=1e-6)) for hit in hits)


def merged(corpus, more, tmp_path):
    """A folder of what both hold, the later text of each."""
    both = tmp_path / "both"
    shutil.copytree(corpus, both)
    shutil.copytree(more, both, dirs_exist_ok=True)
    return both


@pytest.mark.parametrize("embedder", [Letters, BagOfWords])
def test_adding_is_as_ingesting_all_at_once(corpus, more, tmp_path, embedder):
    stages = (SentenceChunker(8), embedder(), Analyzer())
    pipeline.ingest(corpus, tmp_path / "index", *stages)
    report = pipeline.ingest(more, tmp_path / "index", *stages, add=True)
    assert (report.documents, report.added, report.replaced, report.postings) == (5, 2, 1, "built")
    whole = pipeline.ingest(merged(corpus, more, tmp_path), tmp_path / "whole", *stages)
    assert (report.documents, report.chunks) == (whole.documents, whole.chunks)
    for question in ("What does a seal eat", "a whale eats krill.", "zebra grass squid"):
        for method in (Dense(), Lexical(analyzer=Analyzer())):
            hits = found(tmp_path / "index", embedder(), method, question)
            assert hits == found(tmp_path / "whole", embedder(), method, question)
            assert hits or isinstance(method, Lexical)
    index = Index.open(tmp_path / "index")
    names = [document.id for document in index.all_documents()]
    assert names == ["krill.md", "page.html", "auk.txt", "seal.txt", "zebra.txt"]  # old ones first
    assert index.document_text("seal.txt") == "A seal eats squid. It dives."


def test_what_only_follows_makes_the_same_index(corpus, more, tmp_path, monkeypatch):
    """To the byte: documents, chunks, vectors, postings. Nothing old is embedded, even without a cache."""
    for name in ("auk.txt", "seal.txt", "krill.md"):
        (more / name).unlink()
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), Letters(), Analyzer())
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "another"))
    embedder = Letters()
    report = pipeline.ingest(more, tmp_path / "index", SentenceChunker(8), embedder, Analyzer(), add=True)
    assert (report.added, report.replaced, report.postings, report.embedded) == (1, 0, "extended", 1)
    assert embedder.encoded == ["A zebra eats grass. It runs."]
    assert report.tokens == 6
    pipeline.ingest(
        merged(corpus, more, tmp_path), tmp_path / "whole", SentenceChunker(8), Letters(), Analyzer()
    )
    one, other = (Index.open(tmp_path / name).manifest.files for name in ("index", "whole"))
    assert {name.split("/")[0] for name in one} >= {
        "documents.arrow",
        "chunks.arrow",
        "vectors.npy",
        "lexical",
    }
    assert one == other


def test_adding_what_is_there_writes_nothing(corpus, tmp_path):
    stages = (SentenceChunker(8), Letters())
    pipeline.ingest(corpus, tmp_path / "index", *stages, Analyzer())
    report = pipeline.ingest(corpus, tmp_path / "index", *stages, Analyzer(), add=True)
    assert (report.documents, report.added, report.replaced, report.embedded) == (3, 0, 0, 0)
    assert (Index.open(tmp_path / "index").manifest.generation, report.postings) == (1, "unchanged")
    plain = Analyzer(stop_words=None)
    assert pipeline.ingest(corpus, tmp_path / "index", *stages, plain, add=True).postings == "built"
    assert Index.open(tmp_path / "index").lexical.analyzer == plain


def test_adding_without_an_index_makes_one(corpus, tmp_path):
    report = pipeline.ingest(corpus, tmp_path / "new", SentenceChunker(8), Letters(), add=True)
    assert (report.documents, report.added, report.postings) == (3, 3, "none")
    assert len(checked_index(tmp_path / "new")) == 4


@pytest.mark.parametrize(
    ("chunker", "embedder", "message"),
    [
        (SentenceChunker(8), Letters("others"), "built by another embedder, letters"),
        (SentenceChunker(8), BagOfWords(), "built by another embedder, letters"),
        (SentenceChunker(9), Letters(), r"cut by SentenceChunker\(size=8.* not by SentenceChunker\(size=9"),
    ],
)
def test_what_does_not_fit_the_index_is_not_added(corpus, more, tmp_path, chunker, embedder, message):
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), Letters())
    with pytest.raises(UserError, match=message):
        pipeline.ingest(more, tmp_path / "index", chunker, embedder, add=True)
    assert checked_index(tmp_path / "index").manifest.generation == 1


def test_adding_nothing_readable_is_reported(corpus, tmp_path):
    pipeline.ingest(corpus, tmp_path / "index", SentenceChunker(8), Letters())
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="the folder is empty"):
        pipeline.ingest(tmp_path / "empty", tmp_path / "index", SentenceChunker(8), Letters(), add=True)
    assert checked_index(tmp_path / "index").manifest.documents == 3


class Killed(BaseException):
    """The process dies here."""


def test_killed_while_adding(corpus, more, tmp_path, monkeypatch):
    """Before the manifest is replaced the index is as it was, and what was to be added can be added again."""
    stages = (SentenceChunker(8), Letters(), Analyzer())
    pipeline.ingest(corpus, tmp_path / "index", *stages)
    before, replace = texts_of(tmp_path / "index"), os.replace

    def dies(source, target):
        if Path(target).name == "manifest.json":
            raise Killed
        replace(source, target)

    with monkeypatch.context() as patch, pytest.raises(Killed):
        patch.setattr(os, "replace", dies)
        pipeline.ingest(more, tmp_path / "index", *stages, add=True)
    assert texts_of(tmp_path / "index") == before
    assert pipeline.ingest(more, tmp_path / "index", *stages, add=True).documents == 5
    assert checked_index(tmp_path / "index").manifest.generation == 2


@pytest.mark.parametrize("existing", [True, False])
def test_what_another_adds_meanwhile_is_not_lost(corpus, more, tmp_path, existing):
    stages = (SentenceChunker(8), Letters(), None)
    if existing:
        pipeline.ingest(corpus, tmp_path / "index", *stages)
    (corpus / "late.txt").write_text("The last one.")

    def another(stage, done, total):
        if (stage, done) == ("load", 1):
            pipeline.ingest(more, tmp_path / "index", *stages, add=True)

    with pytest.raises(UserError, match=r"changed the index at .* meanwhile: run this again"):
        pipeline.ingest(corpus, tmp_path / "index", *stages[:2], Analyzer(), another, add=True)
    assert "auk.txt" in [document.id for document in Index.open(tmp_path / "index").all_documents()]
