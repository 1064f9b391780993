"""What an index refuses: damaged files, folders of something else, input that cannot be stored."""

import json
from dataclasses import replace

import numpy as np
import pytest

from rag.index import store
from rag.index.analyzer import Analyzer
from rag.index.lexical import LexicalIndex
from rag.types import Document, UserError
from tests.tiny_store import (
    MANIFEST,
    Stub,
    holds,
    make_chunks,
    make_documents,
    make_vectors,
    segment_of,
    write_index,
    write_with_words,
)


@pytest.fixture(autouse=True)
def _no_slow_record(monkeypatch):
    """The environment record asks git and the processor; one of its own is enough for these tests."""
    monkeypatch.setattr(store, "environment", lambda: {"commit": "0" * 40})


def test_postings_of_other_passages(tmp_path):
    documents = make_documents()
    chunks = make_chunks(documents)
    lexical = LexicalIndex.build(["one"], Analyzer())
    with pytest.raises(ValueError, match="postings of as many, not 1"):
        store.write(tmp_path / "index", documents, chunks, make_vectors(len(chunks)), Stub(), {}, lexical)
    assert not (tmp_path / "index").exists()
    write_with_words(tmp_path)
    lexical.save(segment_of(tmp_path) / "lexical")
    manifest = json.loads((tmp_path / MANIFEST).read_text())
    for name, record in manifest["segments"][0]["files"].items():
        record["bytes"] = (segment_of(tmp_path) / name).stat().st_size
    (tmp_path / MANIFEST).write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"postings are of 1 chunks"):
        _ = store.Index.open(tmp_path).lexical


@pytest.mark.parametrize("name", ["documents.arrow", "chunks.arrow", "vectors.npy"])
def test_damaged_files_are_named(tmp_path, name):
    path = tmp_path / "index"
    write_index(path)
    file = segment_of(path) / name
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
    write_with_words(tmp_path)
    file = segment_of(tmp_path) / "lexical" / "rows.npy"
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
    write_index(path)
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
        write_index(path)
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
        write_index(tmp_path)
    assert [entry.name for entry in tmp_path.iterdir()] == ["photos"]
    (tmp_path / "photos" / "file").write_text("precious")
    with pytest.raises(UserError, match="is not a folder"):
        write_index(tmp_path / "photos" / "file")
    with pytest.raises(UserError, match="Cannot make the index folder"):
        write_index(tmp_path / "photos" / "file" / "index")
    assert (tmp_path / "photos" / "file").read_text() == "precious"


def test_what_others_put_into_an_index_stays(tmp_path):
    path = tmp_path / "index"
    write_index(path, "a")
    (path / "notes.txt").write_text("mine")
    (path / "segment-of-mine").mkdir()
    write_index(path, "bb")
    assert (path / "notes.txt").read_text() == "mine"
    assert (path / "segment-of-mine").is_dir()
    assert holds(path, "bb")


@pytest.mark.parametrize("wrong", ["id", "text", "path", "document_id"])
def test_chunks_that_contradict_their_document(tmp_path, wrong):
    documents = make_documents()
    chunks = make_chunks(documents)
    chunks[2] = replace(chunks[2], **{wrong: "something else"})
    with pytest.raises(ValueError, match="chunk '"):
        store.write(tmp_path / "index", documents, chunks, make_vectors(len(chunks)), Stub())
    assert not (tmp_path / "index").exists()


def test_bad_input_is_told_before_anything_is_written(tmp_path):
    def write(documents, vectors):
        chunks = make_chunks(documents)
        store.write(tmp_path / "index", documents, chunks, vectors, Stub())

    documents = make_documents()
    vectors = make_vectors(len(make_chunks(documents)))
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
            make_chunks(documents, 20),
            make_vectors(1),
            Stub(),
        )
    assert not (tmp_path / "index" / MANIFEST).exists()
