"""The index on disk: what goes in comes out, a killed writer harms nothing, and damage is named."""

import contextlib
import json
import os
import shutil
import threading
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from rag.index import store
from rag.index.analyzer import Analyzer
from rag.index.lexical import BM25Weights, LexicalIndex
from rag.types import Chunk, Document, UserError


@dataclass(frozen=True)
class Stub:
    """An embedder as far as a store can tell: one that learned some words."""

    words: tuple[str, ...] = ()
    fingerprint: str = "abc"
    relevant_from: float | None = None
    dim: int = 8

    @property
    def spec(self) -> dict:
        return {"kind": "stub", "dim": self.dim}

    def encode(self, texts, progress=None):
        raise NotImplementedError

    def encode_queries(self, texts):
        raise NotImplementedError

    def token_spans(self, text):
        raise NotImplementedError

    def fit(self, texts):
        return self

    def save(self, folder: Path) -> None:
        if self.words:
            (folder / "learned").mkdir()
            (folder / "learned" / "words.txt").write_text("\n".join(self.words))

    def restore(self, folder: Path) -> "Stub":
        return replace(self, words=tuple((folder / "learned" / "words.txt").read_text().split()))


class Failing(Stub):
    def save(self, folder: Path) -> None:
        raise OSError("disk full")


MANIFEST = "manifest.json"


@pytest.fixture(autouse=True)
def _no_slow_record(monkeypatch):
    """The environment record asks git and the processor; one of its own is enough for these tests."""
    monkeypatch.setattr(store, "environment", lambda: {"commit": "0" * 40})


def _documents(tag: str = "a", count: int = 3) -> list[Document]:
    texts = ["Grüße, 世界! 🤖 e\u0301\u200d\r\n\tend", "", "plain text of a document " * 20]
    return [Document(f"{tag}/{i}.md", f"/c/{tag}/{i}.md", texts[i % 3], f"Titel {i} ✓") for i in range(count)]


def _chunks(documents: list[Document], size: int = 7) -> list[Chunk]:
    return [
        Chunk(f"{d.id}:{s}-{s + size}", d.id, d.path, s, s + size, d.text[s : s + size])
        for d in documents
        for s in range(0, len(d.text), size)
    ]


def _vectors(count: int, dim: int = 8, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng(seed).standard_normal((count, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _write(
    path: Path, tag: str = "a", count: int = 3, embedder: Stub = Stub()
) -> tuple[list[Document], list[Chunk], np.ndarray]:
    documents = _documents(tag, count)
    chunks = _chunks(documents)
    vectors = _vectors(len(chunks), seed=len(tag))
    store.write(path, documents, chunks, vectors, embedder, {"chunker": "fixed"})
    return documents, chunks, vectors


def _write_words(path: Path, tag: str = "a") -> list[Chunk]:
    """As _write, with postings."""
    documents = _documents(tag)
    chunks = _chunks(documents)
    lexical = LexicalIndex.build([chunk.text for chunk in chunks], Analyzer(stop_words=["of"]))
    store.write(path, documents, chunks, _vectors(len(chunks), seed=len(tag)), Stub(), {}, lexical)
    return chunks


def _holds(path: Path, tag: str) -> bool:
    """Whether the index at `path`, checksums verified, is exactly what _write(path, tag) wrote."""
    chunks = _chunks(_documents(tag))
    index = store.Index.open(path, verify=True)
    return index.chunks(range(len(index))) == chunks and np.array_equal(
        index.vectors, _vectors(len(chunks), seed=len(tag))
    )


def test_round_trip(tmp_path):
    documents, chunks, vectors = _write(tmp_path / "new" / "index")
    index = store.Index.open(tmp_path / "new" / "index", verify=True)
    assert len(index) == len(chunks)
    assert index.documents == 3
    assert index.chunks([5, 0, 5, len(chunks) - 1]) == [chunks[5], chunks[0], chunks[5], chunks[-1]]
    assert index.chunks(np.arange(len(chunks))) == chunks
    for document in documents:
        assert index.document_text(document.id) == document.text
    assert index.vectors.dtype == np.float32
    np.testing.assert_array_equal(index.vectors, vectors)
    manifest = index.manifest
    assert manifest["embedder"] == {"fingerprint": "abc", "spec": {"kind": "stub", "dim": 8}}
    assert manifest["settings"] == {"chunker": "fixed"}
    assert (manifest["documents"], manifest["chunks"], manifest["dim"]) == (3, len(chunks), 8)
    assert manifest["environment"]["commit"] == "0" * 40


def test_vectors_are_mapped_and_not_writable(tmp_path):
    _write(tmp_path / "index")
    vectors = store.Index.open(tmp_path / "index").vectors
    assert isinstance(vectors, np.memmap)
    assert not vectors.flags.writeable


def test_more_rows_than_a_record_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "_BATCH_ROWS", 4)
    _, chunks, _ = _write(tmp_path / "index", count=11)
    index = store.Index.open(tmp_path / "index")
    assert index.chunks(range(len(chunks))) == chunks


def test_nothing_in_it(tmp_path):
    store.write(tmp_path / "index", [], [], np.zeros((0, 8), np.float32), Stub())
    index = store.Index.open(tmp_path / "index", verify=True)
    assert (len(index), index.documents, index.vectors.shape) == (0, 0, (0, 8))


def test_unknown_rows_and_documents(tmp_path):
    _write(tmp_path / "index")
    index = store.Index.open(tmp_path / "index")
    with pytest.raises(IndexError):
        index.chunks([len(index)])
    with pytest.raises(IndexError):
        index.chunks([-1])
    with pytest.raises(KeyError):
        index.document_text("nowhere.md")


def test_what_the_embedder_learned_is_kept(tmp_path):
    _write(tmp_path, embedder=Stub(("hello", "world")))
    index = store.Index.open(tmp_path, verify=True)
    assert index.restore(Stub()).words == ("hello", "world")
    next(tmp_path.rglob("words.txt")).unlink()
    with pytest.raises(UserError, match=r"words.txt is missing"):
        store.Index.open(tmp_path)


def test_another_embedder_is_refused(tmp_path):
    _write(tmp_path)
    with pytest.raises(UserError, match="built by another embedder, stub"):
        store.Index.open(tmp_path).restore(Stub(fingerprint="abd"))


def test_replacing_leaves_one_segment_and_open_indexes_alone(tmp_path):
    path = tmp_path / "index"
    _, chunks, vectors = _write(path, "a")
    before = store.Index.open(path)
    _write(path, "bb")
    assert _holds(path, "bb")
    assert store.Index.open(path).manifest["generation"] == 2
    assert len(list(path.glob("segment-*"))) == 1
    assert before.chunks(range(len(before))) == chunks
    np.testing.assert_array_equal(before.vectors, vectors)


def test_postings_are_kept_and_mapped(tmp_path):
    chunks = _write_words(tmp_path)
    kept = store.Index.open(tmp_path, verify=True).lexical
    assert kept.analyzer == Analyzer(stop_words=["of"])
    [(scores, rows)] = kept.search(["document"], 100, BM25Weights())
    holding = [row for row, chunk in enumerate(chunks) if "document" in chunk.text.split()]
    assert sorted(rows.tolist()) == holding
    assert (scores > 0).all()
    assert isinstance(kept.postings.rows.base, np.memmap)
    _write(tmp_path)
    assert store.Index.open(tmp_path, verify=True).lexical is None


def test_an_index_that_is_replaced_still_answers_without_its_postings(tmp_path):
    chunks = _write_words(tmp_path)
    before = store.Index.open(tmp_path)
    opened = before.lexical
    _write_words(tmp_path, "bb")
    assert before.lexical is None
    assert len(opened) == len(chunks)
    assert before.chunks(range(len(before))) == chunks


def test_postings_of_other_passages(tmp_path):
    documents = _documents()
    chunks = _chunks(documents)
    lexical = LexicalIndex.build(["one"], Analyzer())
    with pytest.raises(ValueError, match="postings of as many, not 1"):
        store.write(tmp_path / "index", documents, chunks, _vectors(len(chunks)), Stub(), {}, lexical)
    assert not (tmp_path / "index").exists()
    _write_words(tmp_path)
    lexical.save(_segment(tmp_path) / "lexical")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for name, record in manifest["segments"][0]["files"].items():
        record["bytes"] = (_segment(tmp_path) / name).stat().st_size
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"postings are of 1 chunks"):
        _ = store.Index.open(tmp_path).lexical


# --- a writer killed ----------------------------------------------------------------------------------------


class Killed(BaseException):
    """The process dies here: nothing catches this, and what follows it does not run."""


class Reaper:
    """Raises Killed at the nth of the calls that make something last, and at every later one."""

    def __init__(self, monkeypatch, at: int):
        self.at, self.calls = at, 0
        for module, name in (
            (os, "fsync"), (os, "replace"), (os, "rename"), (os, "mkdir"), (os, "unlink"), (shutil, "rmtree"),
            (np, "save"),
        ):  # fmt: skip
            monkeypatch.setattr(module, name, self._mortal(getattr(module, name)))

    def _mortal(self, call):
        def mortal(*args, **kwargs):
            self.calls += 1
            if self.at <= self.calls:
                raise Killed
            return call(*args, **kwargs)

        return mortal


@pytest.mark.parametrize("existing", [False, True])
def test_killed_at_any_step(tmp_path, existing):
    """Until the manifest is replaced the old index stands, then the new one; the next write succeeds."""
    outcomes = []
    for at in range(1, 100):
        path = tmp_path / str(at)
        if existing:
            _write(path, "a")
        with pytest.MonkeyPatch.context() as patch:
            reaper = Reaper(patch, at)
            with contextlib.suppress(Killed):
                _write_words(path, "bb")
        if reaper.calls < at:
            break
        if not existing and not (path / MANIFEST).exists():
            outcomes.append("none")
        else:
            outcomes.append("new" if _holds(path, "bb") else "old")
            assert outcomes[-1] == "new" or (existing and _holds(path, "a"))
        _write(path, "ccc")
        assert _holds(path, "ccc")
        left = {entry.name.split("-")[0] for entry in path.iterdir()}
        assert left == {"manifest.json", "manifest.json.lock", "segment"}
        assert len(list(path.iterdir())) == 3
    first = "old" if existing else "none"
    assert outcomes == [first] * outcomes.count(first) + ["new"] * outcomes.count("new")
    assert outcomes.count(first) >= 8
    assert outcomes.count("new") >= 1


def test_an_exception_while_writing_changes_nothing(tmp_path):
    path = tmp_path / "index"
    _write(path, "a")
    with pytest.raises(OSError, match="disk full"):
        _write(path, "bb", embedder=Failing())
    assert _holds(path, "a")
    assert len(list(path.iterdir())) == 3


def test_two_writers_take_turns(tmp_path, monkeypatch):
    path = tmp_path / "index"
    inside, most = [], []
    save = np.save

    def watched(*args, **kwargs):
        inside.append(1)
        most.append(len(inside))
        threading.Event().wait(0.02)
        save(*args, **kwargs)
        inside.pop()

    monkeypatch.setattr(np, "save", watched)
    failures = []

    def work(tag):
        try:
            for _ in range(3):
                _write(path, tag)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work, args=(tag,)) for tag in ("a", "bb")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    assert len(most) == 6
    assert max(most) == 1
    assert _holds(path, "a") or _holds(path, "bb")
    assert store.Index.open(path).manifest["generation"] == 6


def test_opening_while_it_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "index"
    _write(path, "a")
    check = store._check_files

    def replaced_meanwhile(*args, **kwargs):
        monkeypatch.setattr(store, "_check_files", check)
        _write(path, "bb")
        return check(*args, **kwargs)

    monkeypatch.setattr(store, "_check_files", replaced_meanwhile)
    index = store.Index.open(path)
    assert index.manifest["generation"] == 2
    assert index.chunks([0]) == _chunks(_documents("bb"))[:1]


# --- damage and refusals ------------------------------------------------------------------------------------


def _segment(path: Path) -> Path:
    (segment,) = path.glob("segment-*")
    return segment


@pytest.mark.parametrize("name", ["documents.arrow", "chunks.arrow", "vectors.npy"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / "index"
    _write(path)
    file = _segment(path) / name
    whole = file.read_bytes()
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=f"{name} has"):
        store.Index.open(path)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    file.write_bytes(flipped)
    with pytest.raises(UserError, match=f"{name} has"):
        store.Index.open(path, verify=True)
    file.write_bytes(bytes(len(whole)))  # its size is right, its head is gone
    with pytest.raises(UserError, match="is damaged"):
        store.Index.open(path)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        store.Index.open(path)


def test_damaged_postings_are_named(tmp_path):
    _write_words(tmp_path)
    file = _segment(tmp_path) / "lexical" / "rows.npy"
    whole = file.read_bytes()
    file.write_bytes(bytes(len(whole)))
    with pytest.raises(UserError, match=r"rows\.npy has changed"):
        store.Index.open(tmp_path, verify=True)
    with pytest.raises(UserError, match="no whole lexical index"):
        _ = store.Index.open(tmp_path).lexical
    file.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=r"rows\.npy has \d+ bytes instead"):
        store.Index.open(tmp_path)


def test_files_that_disagree(tmp_path):
    path = tmp_path / "index"
    _write(path)
    manifest = json.loads((path / MANIFEST).read_text())
    (path / MANIFEST).write_text(json.dumps({**manifest, "dim": 9}))
    with pytest.raises(UserError, match="files differ in size"):
        store.Index.open(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "Cannot read"),
        ("\xff", "Cannot read"),
        ("[]", "not the manifest of an index"),
        ('{"name": "my web app"}', "not the manifest of an index"),
        ('{"format": "x"}', "not the manifest of an index"),
        ('{"format": 2}', "is of format 2, and this version reads 1"),
        ('{"format": 1}', "it has no 'chunks'"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, text, message):
    """Neither opened nor overwritten."""
    path = tmp_path / "index"
    path.mkdir()
    (path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        store.Index.open(path)
    with pytest.raises(UserError, match=message):
        _write(path)
    assert (path / MANIFEST).read_text(encoding="latin-1") == text


def test_no_index_there(tmp_path):
    with pytest.raises(UserError, match="nowhere does not exist"):
        store.Index.open(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no index"):
        store.Index.open(tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="file is a file"):
        store.Index.open(tmp_path / "file")


def test_folders_that_are_no_index_are_left_alone(tmp_path):
    (tmp_path / "photos").mkdir()
    with pytest.raises(UserError, match="holds 'photos' and no index"):
        _write(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "photos" / "file").write_text("precious")
    with pytest.raises(UserError, match="is not a folder"):
        _write(tmp_path / "photos" / "file")
    with pytest.raises(UserError, match="Cannot make the index folder"):
        _write(tmp_path / "photos" / "file" / "index")
    assert (tmp_path / "photos" / "file").read_text() == "precious"


def test_what_others_put_into_an_index_stays(tmp_path):
    path = tmp_path / "index"
    _write(path, "a")
    (path / "notes.txt").write_text("mine")
    (path / "segment-of-mine").mkdir()
    _write(path, "bb")
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "segment-of-mine").is_dir()
    assert _holds(path, "bb")


@pytest.mark.parametrize("wrong", ["id", "text", "path", "document_id"])
def test_chunks_that_contradict_their_document(tmp_path, wrong):
    documents = _documents()
    chunks = _chunks(documents)
    chunks[2] = replace(chunks[2], **{wrong: "something else"})
    with pytest.raises(ValueError, match="chunk '"):
        store.write(tmp_path / "index", documents, chunks, _vectors(len(chunks)), Stub())
    assert not (tmp_path / "index").exists()


def test_bad_input_is_told_before_anything_is_written(tmp_path):
    def write(documents, vectors):
        chunks = _chunks(documents)
        store.write(tmp_path / "index", documents, chunks, vectors, Stub())

    documents = _documents()
    vectors = _vectors(len(_chunks(documents)))
    with pytest.raises(ValueError, match="chunks need as many vectors"):
        write(documents, vectors[1:])
    with pytest.raises(UserError, match="Vector 3 of"):
        write(documents, np.where(np.arange(len(vectors))[:, None] == 3, np.nan, vectors).astype(np.float32))
    with pytest.raises(UserError, match=r"Two documents have the id 'a/0\.md'"):
        write([*documents, documents[0]], vectors)
    assert not (tmp_path / "index").exists()


def test_half_a_character_is_told(tmp_path):
    documents = [Document("a", "a", "before \ud83e after")]
    with pytest.raises(UserError, match="half of a character"):
        store.write(
            tmp_path / "index",
            documents,
            _chunks(documents, 20),
            _vectors(1),
            Stub(),
        )
    assert not (tmp_path / "index" / MANIFEST).exists()
