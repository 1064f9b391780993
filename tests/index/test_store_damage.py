"""What an index refuses: damaged files, folders of something else, input that cannot be stored."""

import json
import os
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag import pipeline
from rag.index import manifest as manifests
from rag.index import store, writer
from rag.index.dense.exact import Exact
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights
from rag.ingest.chunk.fixed import FixedChunker
from rag.retrieve.collection import Collection
from rag.runtime.checksums import PIECE
from rag.types import Document, UserError, chunk_at
from tests.tiny_collections import (
    MANIFEST,
    StubEmbedder,
    holds,
    make_chunks,
    make_documents,
    make_vectors,
    segment_of,
    write_index,
    write_index_with_postings,
)
from tests.trials import tries


@pytest.fixture(autouse=True)
def _no_slow_record(monkeypatch):
    """The environment record asks git and the processor; one of its own is enough for these tests."""
    monkeypatch.setattr(writer, "environment", lambda: {"commit": "0" * 40})


def test_postings_of_other_passages(tmp_path):
    documents = make_documents()
    chunks = make_chunks(documents)
    lexical = LexicalIndex.build(["one"], Analyzer())
    with pytest.raises(ValueError, match="postings of as many, not 1"):
        writer.write_index(
            tmp_path / "index", documents, chunks, make_vectors(len(chunks)), StubEmbedder(), {}, lexical
        )
    assert not (tmp_path / "index").exists()


@pytest.mark.parametrize(
    "name", ["documents.arrow", "chunks.arrow", "vectors.npy", "lexical/rows.npy", "checksums"]
)
def test_missing_and_shortened_files_are_named_at_once(tmp_path, name):
    write_index_with_postings(tmp_path)
    file = segment_of(tmp_path) / name
    whole = file.read_bytes()
    for content in (whole[:-1], whole + b"x", b""):
        file.write_bytes(content)
        with pytest.raises(UserError, match=f"damaged, .*{name} "):
            store.Index.open(tmp_path)
    file.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        store.Index.open(tmp_path)


def everything_used(path: Path) -> tuple:
    """What can be had of an index; every byte of its files goes into it."""
    index = store.Index.open(path)
    [(scores, rows)] = index.lexical.search(["document"], 100, BM25Weights())
    chunks = index.chunks(range(len(index)))
    texts = [index.document_text(document.id) for document in index.all_documents()]
    words = index.restore(StubEmbedder()).words
    return chunks, texts, index.vectors.tobytes(), scores.tobytes(), rows.tobytes(), words, len(index.lexical)


@tries(suite=150, long=5000)
@given(data=st.data())
def test_a_changed_byte_is_never_answered_from(undamaged, data):
    """Whatever is flipped in whatever file: the answer of before, or a sentence that names the file."""
    path, expected = undamaged
    files = sorted(file for file in path.rglob("*") if file.is_file() and file.stat().st_size)
    file = data.draw(st.sampled_from(files))
    whole = file.read_bytes()
    start = data.draw(st.integers(0, len(whole) - 1))
    stop = data.draw(st.one_of(st.just(start + 1), st.integers(start + 1, len(whole))))
    change = data.draw(st.integers(1, 255))
    file.write_bytes(whole[:start] + bytes(b ^ change for b in whole[start:stop]) + whole[stop:])
    try:
        found = answer_or_error(path)
    finally:
        file.write_bytes(whole)
    assert found == expected or (isinstance(found, str) and file.name in found)


def answer_or_error(path: Path) -> tuple | str:
    try:
        return everything_used(path)
    except UserError as error:
        return str(error)


@pytest.fixture(scope="module")
def undamaged(tmp_path_factory) -> tuple[Path, tuple]:
    path = tmp_path_factory.mktemp("index") / "index"
    documents = make_documents(count=40)
    chunks = make_chunks(documents)
    lexical = LexicalIndex.build([chunk.text for chunk in chunks], Analyzer())
    vectors = make_vectors(len(chunks), dim=64)
    writer.write_index(path, documents, chunks, vectors, StubEmbedder(("a", "b"), dim=64), {}, lexical)
    return path, everything_used(path)


def test_only_what_is_used_is_compared(tmp_path):
    """One damaged text: the others can still be loaded, and a check of everything finds it."""
    path = tmp_path / "index"
    documents = [Document(f"{i}", f"{i}", f"{i} " * (PIECE // 2), "") for i in range(4)]
    chunks = [chunk_at(document, 0, 2) for document in documents]
    writer.write_index(path, documents, chunks, make_vectors(4), StubEmbedder())
    file = segment_of(path) / "documents.arrow"
    content = bytearray(file.read_bytes())
    content[content.index(b"2 2 2 2 ") + 3 * PIECE // 4] ^= 1
    file.write_bytes(content)
    index = store.Index.open(path)
    assert index.chunks([0, 3]) == [chunks[0], chunks[3]]
    with pytest.raises(UserError, match=r"documents\.arrow has changed since it was written \(after byte"):
        index.chunks([2])
    with pytest.raises(UserError, match=r"documents\.arrow has changed"):
        index.check()
    assert index.chunks([0]) == [chunks[0]]


def test_the_files_of_another_index_are_not_taken_for_its_own(tmp_path):
    """Of the same sizes and names: only their checksums tell."""
    for name, tag in (("one", "a"), ("other", "b")):
        write_index(tmp_path / name, tag)
    for file in segment_of(tmp_path / "other").iterdir():
        if file.is_file():
            shutil.copy(file, segment_of(tmp_path / "one") / file.name)
    with pytest.raises(UserError, match="checksums has changed"):
        store.Index.open(tmp_path / "one")


@pytest.mark.parametrize("change", ["zeros", "shorter"])
def test_a_file_that_is_changed_while_the_index_is_open(tmp_path, change):
    """In place, as rsync --inplace does: the map shows what is on the disk."""
    chunks = write_index_with_postings(tmp_path)
    searched = Collection(store.Index.open(tmp_path), StubEmbedder())
    searched.dense(Exact())
    searched.index.chunks([0])
    file = segment_of(tmp_path) / "vectors.npy"
    with file.open("r+b") as opened:
        opened.seek(200)
        opened.write(bytes(8))
        if change == "shorter":
            opened.truncate(150)
    with pytest.raises(UserError, match=r"vectors\.npy has (changed|150 bytes)"):
        searched.dense(Exact())
    os.utime(segment_of(tmp_path) / "documents.arrow")  # touched, and the same
    searched.index._segment["documents.arrow"].recheck()
    assert searched.index.chunks([0]) == chunks[:1]


def test_an_index_that_was_made_again_is_another_one(tmp_path):
    """Its generation is 1 again; its segment has another name."""
    path = tmp_path / "index"
    write_index(path)
    base = store.Index.open(path).manifest.segment
    shutil.rmtree(path)
    write_index(path, "bb")
    documents = make_documents("ccc")
    chunks = make_chunks(documents)
    with pytest.raises(UserError, match="Another program changed the index"):
        writer.write_index(path, documents, chunks, make_vectors(len(chunks)), StubEmbedder(), base=base)
    assert holds(path, "bb")


def test_any_byte_outside_of_the_texts_may_be_damaged(tmp_path):
    """The bytes that say where the texts are must be parsed before they can be compared."""
    write_index(tmp_path)
    file = segment_of(tmp_path) / "documents.arrow"
    whole = file.read_bytes()
    for byte in range(0, len(whole), 3):
        for change in (0x80, 0x02):
            file.write_bytes(whole[:byte] + bytes([whole[byte] ^ change]) + whole[byte + 1 :])
            with pytest.raises(UserError, match=r"documents\.arrow"):
                store.Index.open(tmp_path).all_documents()


def test_a_damaged_index_is_not_added_to(tmp_path):
    write_index(tmp_path / "index")
    file = segment_of(tmp_path / "index") / "vectors.npy"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"vectors\.npy has changed"):
        pipeline._opened(tmp_path / "index", FixedChunker(7, 0), StubEmbedder())
    write_index(tmp_path / "index", "bb")  # it can be replaced
    assert holds(tmp_path / "index", "bb")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is not JSON"),
        ("\xff", "is not JSON"),
        ("[" * 200_000, "is not JSON .*nested too deep"),
        ('{"format": 2, "format": 2}', "'format' occurs twice"),
        ('{"format": 2, "generation": NaN}', "NaN is no number"),
        ("[]", "holds no JSON object"),
        ('{"name": "my web app"}', "not the manifest of an index"),
        ('{"format": "x"}', "not the manifest of an index"),
        ('{"format": 1, "analyzer": {}}', "not the manifest of an index"),
        ('{"format": 3, "generation": 1}', "is of format 3, and this version reads 2"),
        ('{"format": 2, "generation": 1}', "it has no checksum"),
    ],
)
def test_manifests_that_cannot_be_read(tmp_path, text, message):
    """Neither opened nor overwritten: nothing beside it says that it is ours."""
    path = tmp_path / "index"
    path.mkdir()
    (path / MANIFEST).write_text(text, encoding="latin-1")
    with pytest.raises(UserError, match=message):
        store.Index.open(path)
    with pytest.raises(UserError, match=message):
        write_index(path)
    assert (path / MANIFEST).read_text(encoding="latin-1") == text


def with_fields(path: Path, **fields) -> None:
    """Change fields of the manifest at `path`, and its checksum with them; None removes a field."""
    manifest = json.loads((path / MANIFEST).read_text()) | fields
    manifest = {name: value for name, value in manifest.items() if value is not None and name != "checksum"}
    (path / MANIFEST).write_text(json.dumps({**manifest, "checksum": manifests._checksum(manifest)}))


RECORD = {"bytes": 1, "sha256": "0" * 64}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"segment": "../segment-000001-00000000"}, "segment: string should match pattern"),
        ({"segment": None}, "it has no 'segment'"),
        ({"chunks": "3"}, "chunks: input should be a valid integer"),
        ({"chunks": -1}, "chunks: input should be greater than or equal to 0"),
        ({"generation": 0}, "generation: input should be greater"),
        ({"files": {"../../etc/passwd": RECORD}}, "files.../../etc/passwd"),
        ({"files": {"/etc/passwd": RECORD}}, "files./etc/passwd"),
        ({"files": {"a": {"bytes": 1}}}, "it has no 'files.a.sha256'"),
        ({"more": 1}, "it has 'more', which is unknown"),
        ({"dim": 9}, "does not hold 29 vectors of 9 numbers"),
        ({"documents": 4}, "does not hold 4 documents"),
        ({"files": {}}, "holds 3 checksums instead of 0"),
    ],
)
def test_manifests_that_do_not_fit(tmp_path, fields, message):
    write_index(tmp_path)
    if "dim" in fields:
        message = message.replace("29", str(len(store.Index.open(tmp_path))))
    with_fields(tmp_path, **fields)
    with pytest.raises(UserError, match=re.escape(message)):
        store.Index.open(tmp_path)
    write_index(tmp_path, "bb")  # it can be replaced
    assert holds(tmp_path, "bb")


def test_an_index_of_the_first_format_is_refused_with_what_makes_it_again(tmp_path):
    """As commit eb9b4ff wrote it, the last one of that format."""
    path = tmp_path / "index"
    shutil.copytree(Path(__file__).parents[1] / "goldens" / "index_format_1", path)
    with pytest.raises(
        UserError, match=r"of format 1, an older one than 2: make it again with scripts/ingest\.py"
    ):
        store.Index.open(path)
    write_index(path)
    assert holds(path, "a")
    assert len(list(path.glob("segment-*"))) == 1


def test_an_index_of_a_later_format_is_not_replaced(tmp_path):
    write_index(tmp_path)
    with_fields(tmp_path, format=3)
    with pytest.raises(UserError, match="update this program"):
        write_index(tmp_path)


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
    with pytest.raises(UserError, match="Cannot write the index at"):
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
        writer.write_index(tmp_path / "index", documents, chunks, make_vectors(len(chunks)), StubEmbedder())
    assert not (tmp_path / "index").exists()


def test_bad_input_is_refused_before_anything_is_written(tmp_path):
    def write(documents, vectors):
        chunks = make_chunks(documents)
        writer.write_index(tmp_path / "index", documents, chunks, vectors, StubEmbedder())

    documents = make_documents()
    vectors = make_vectors(len(make_chunks(documents)))
    with pytest.raises(ValueError, match="chunks need as many vectors"):
        write(documents, vectors[1:])
    with pytest.raises(UserError, match="Vector 3 of"):
        write(documents, np.where(np.arange(len(vectors))[:, None] == 3, np.nan, vectors).astype(np.float32))
    with pytest.raises(UserError, match=r"Two documents have the id 'a/0\.md'"):
        write([*documents, documents[0]], vectors)
    assert not (tmp_path / "index").exists()


def test_half_a_character_is_refused(tmp_path):
    documents = [Document("a", "a", "before \ud83e after")]
    with pytest.raises(UserError, match="half of a character"):
        writer.write_index(
            tmp_path / "index",
            documents,
            make_chunks(documents, 20),
            make_vectors(1),
            StubEmbedder(),
        )
    assert not (tmp_path / "index" / MANIFEST).exists()
