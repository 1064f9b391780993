"""The index on disk: what goes in comes out, and a killed writer harms nothing."""

import contextlib
import mmap
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest

from rag.index import store, writer
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.weighting import BM25Weights
from rag.types import UserError
from tests.tiny_collections import (
    MANIFEST,
    StubEmbedder,
    checked_index,
    holds,
    make_chunks,
    make_documents,
    write_index,
    write_index_with_postings,
)


class Failing(StubEmbedder):
    def save(self, folder: Path) -> None:
        raise OSError("disk full")


@pytest.fixture(autouse=True)
def _no_slow_record(monkeypatch):
    """The environment record asks git and the processor; one of its own is enough for these tests."""
    monkeypatch.setattr(writer, "environment", lambda: {"commit": "0" * 40})


def test_round_trip(tmp_path):
    documents, chunks, vectors = write_index(tmp_path / "new" / "index")
    index = checked_index(tmp_path / "new" / "index")
    assert len(index) == len(chunks)
    assert index.manifest.documents == 3
    assert index.chunks([5, 0, 5, len(chunks) - 1]) == [chunks[5], chunks[0], chunks[5], chunks[-1]]
    assert index.chunks(np.arange(len(chunks))) == chunks
    for document in documents:
        assert index.document_text(document.id) == document.text
    assert index.vectors.dtype == np.float32
    np.testing.assert_array_equal(index.vectors, vectors)
    manifest = index.manifest
    assert (manifest.embedder.fingerprint, manifest.embedder.spec) == ("abc", {"kind": "stub", "dim": 8})
    assert manifest.settings == {"chunker": "fixed"}
    assert (manifest.documents, manifest.chunks, manifest.dim) == (3, len(chunks), 8)
    assert manifest.environment["commit"] == "0" * 40


def test_vectors_are_mapped_and_not_writable(tmp_path):
    write_index(tmp_path / "index")
    vectors = store.Index.open(tmp_path / "index").vectors
    assert isinstance(vectors.base, mmap.mmap)
    assert not vectors.flags.writeable


def test_more_rows_than_a_record_batch(tmp_path, monkeypatch):
    monkeypatch.setattr(writer, "_BATCH_ROWS", 4)
    _, chunks, _ = write_index(tmp_path / "index", count=11)
    index = store.Index.open(tmp_path / "index")
    assert index.chunks(range(len(chunks))) == chunks


def test_nothing_in_it(tmp_path):
    writer.write_index(tmp_path / "index", [], [], np.zeros((0, 8), np.float32), StubEmbedder())
    index = checked_index(tmp_path / "index")
    assert (len(index), index.manifest.documents, index.vectors.shape) == (0, 0, (0, 8))


def test_unknown_rows_and_documents(tmp_path):
    write_index(tmp_path / "index")
    index = store.Index.open(tmp_path / "index")
    with pytest.raises(IndexError):
        index.chunks([len(index)])
    with pytest.raises(IndexError):
        index.chunks([-1])
    with pytest.raises(KeyError):
        index.document_text("nowhere.md")


def test_what_the_embedder_learned_is_stored(tmp_path):
    write_index(tmp_path, embedder=StubEmbedder(("hello", "world")))
    index = checked_index(tmp_path)
    assert index.restore(StubEmbedder()).words == ("hello", "world")
    next(tmp_path.rglob("words.txt")).unlink()
    with pytest.raises(UserError, match=r"words.txt is missing"):
        store.Index.open(tmp_path)


def test_another_embedder_is_refused(tmp_path, monkeypatch):
    write_index(tmp_path)
    other = StubEmbedder(fingerprint="abd")
    with pytest.raises(UserError, match="built by another embedder, stub with other files or settings than"):
        store.Index.open(tmp_path).restore(other)
    monkeypatch.setattr(StubEmbedder, "spec", {"kind": "another"})
    with pytest.raises(UserError, match="built by another embedder, stub: choose that one"):
        store.Index.open(tmp_path).restore(other)


def test_replacing_leaves_open_indexes_alone(tmp_path):
    path = tmp_path / "index"
    _, chunks, vectors = write_index(path, "a", embedder=StubEmbedder(("hello", "world")))
    before = store.Index.open(path)
    write_index(path, "bb")
    assert holds(path, "bb")
    assert store.Index.open(path).manifest.generation == 2
    assert before.chunks(range(len(before))) == chunks
    np.testing.assert_array_equal(before.vectors, vectors)
    assert before.restore(StubEmbedder()).words == ("hello", "world")
    before.close()
    write_index(path, "a")
    assert len(list(path.glob("segment-*"))) == 1


def test_postings_are_stored_and_mapped(tmp_path):
    chunks = write_index_with_postings(tmp_path)
    lexical = checked_index(tmp_path).lexical
    assert lexical.analyzer == Analyzer(stop_words=["of"])
    [(scores, rows)] = lexical.search(["document"], 100, BM25Weights())
    holding = [row for row, chunk in enumerate(chunks) if "document" in chunk.text.split()]
    assert sorted(rows.tolist()) == holding
    assert (scores > 0).all()
    assert isinstance(lexical.postings.rows.base, np.memmap)
    write_index(tmp_path)
    assert checked_index(tmp_path).lexical is None


def test_postings_of_an_index_that_was_replaced(tmp_path):
    chunks = write_index_with_postings(tmp_path)
    before = store.Index.open(tmp_path)
    write_index_with_postings(tmp_path, "bb")
    assert len(before.lexical) == len(chunks)


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
    """Until the manifest is replaced the old index is valid, then the new one; the next write succeeds."""
    outcomes = []
    for at in range(1, 100):
        path = tmp_path / str(at)
        if existing:
            write_index(path, "a")
        with pytest.MonkeyPatch.context() as patch:
            reaper = Reaper(patch, at)
            with contextlib.suppress(Killed):
                write_index_with_postings(path, "bb")
        if reaper.calls < at:
            break
        if not existing and not (path / MANIFEST).exists():
            outcomes.append("none")
        else:
            outcomes.append("new" if holds(path, "bb") else "old")
            assert outcomes[-1] == "new" or (existing and holds(path, "a"))
        write_index(path, "ccc")
        assert holds(path, "ccc")
        left = {entry.name.split("-")[0] for entry in path.iterdir()}
        assert left == {"manifest.json", "manifest.json.lock", "segment"}
        assert len(list(path.iterdir())) == 3
    first = "old" if existing else "none"
    assert outcomes == [first] * outcomes.count(first) + ["new"] * outcomes.count("new")
    assert outcomes.count(first) >= 8
    assert outcomes.count("new") >= 1


def test_an_exception_while_writing_changes_nothing(tmp_path):
    path = tmp_path / "index"
    write_index(path, "a")
    with pytest.raises(
        UserError, match=r"Cannot write the index at .*disk full.*what was there is as it was"
    ):
        write_index(path, "bb", embedder=Failing())
    assert holds(path, "a")
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
                write_index(path, tag)
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
    assert holds(path, "a") or holds(path, "bb")
    assert store.Index.open(path).manifest.generation == 6


def test_opening_while_it_is_replaced(tmp_path, monkeypatch):
    path = tmp_path / "index"
    write_index(path, "a")
    lock = store._shared_lock

    def replaced_meanwhile(folder):
        monkeypatch.setattr(store, "_shared_lock", lock)
        write_index(path, "bb")
        return lock(folder)

    monkeypatch.setattr(store, "_shared_lock", replaced_meanwhile)
    index = store.Index.open(path)
    assert index.manifest.generation == 2
    assert index.chunks([0]) == make_chunks(make_documents("bb"))[:1]


def test_opening_while_it_is_removed_and_written_again(tmp_path, monkeypatch):
    """Its generation is 1 again."""
    path = tmp_path / "index"
    write_index(path, "a")
    lock = store._shared_lock

    def replaced_meanwhile(folder):
        monkeypatch.setattr(store, "_shared_lock", lock)
        shutil.rmtree(path)
        write_index(path, "bb")
        return lock(folder)

    monkeypatch.setattr(store, "_shared_lock", replaced_meanwhile)
    assert store.Index.open(path).chunks([0]) == make_chunks(make_documents("bb"))[:1]
