"""Checkpoints are converted once for the same files and code, and what fails leaves nothing behind."""

import errno
import os
from functools import partial

import pytest

from rag.models import conversion_cache
from rag.runtime import files
from rag.runtime.cache import entries
from rag.runtime.cache.folder import cache_root
from rag.types import UserError


def test_the_same_bytes_are_converted_once(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source, calls = tmp_path / "source", []

    def convert(label, folder):
        calls.append(label)
        (folder / "out").write_text(label)

    source.write_text("weights")
    first = conversion_cache.converted_folder("toy", [source], partial(convert, "first"))
    assert conversion_cache.converted_folder("toy", [source], partial(convert, "second")) == first
    assert (first / "out").read_text() == "first"
    source.write_text("other weights")
    assert (
        conversion_cache.converted_folder("toy", [source], partial(convert, "third")) / "out"
    ).read_text() == "third"
    other = conversion_cache.converted_folder("another toy", [source], partial(convert, "as another"))
    assert (other / "out").read_text() == "as another"
    assert calls == ["first", "third", "as another"]


def test_what_other_code_converted_is_not_found_and_what_is_equal_takes_no_room(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source, code = tmp_path / "source", ["one"]
    source.write_text("weights")
    monkeypatch.setattr(conversion_cache, "code_version", lambda convert: code[0])

    def convert(folder):
        (folder / "same.npy").write_text("as before")
        (folder / "other.npy").write_text(code[0])

    first = conversion_cache.converted_folder("toy", [source], convert)
    code[0] = "two"
    second = conversion_cache.converted_folder("toy", [source], convert)
    assert [(folder / "other.npy").read_text() for folder in (first, second)] == ["one", "two"]
    assert (first / "same.npy").samefile(second / "same.npy")
    assert not (first / "other.npy").samefile(second / "other.npy")
    assert sorted(path.name for path in second.iterdir()) == [entries.CHECKSUMS, "other.npy", "same.npy"]


def test_a_file_of_a_folder_that_is_renamed_is_another_checkpoint(tmp_path, monkeypatch):
    """In a folder a name says what a file is; a file that is all of a checkpoint may be called anything."""
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    for folder, name in (("one", "a.json"), ("two", "b.json"), ("three", "a.json")):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / name).write_text("{}")
        (tmp_path / folder / "model").write_text("weights")
    one, two, three = (
        conversion_cache.file_digests(sorted((tmp_path / folder).iterdir()))
        for folder in ("one", "two", "three")
    )
    assert one != two and one == three
    alone = (
        conversion_cache.file_digests([tmp_path / path]) for path in ("one/a.json", "two/b.json", "one/model")
    )
    first, renamed, other = alone
    assert first == renamed != other


def test_a_cache_that_cannot_be_written_is_an_error_unless_all_is_there(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_text("weights")

    def fill_the_disk(folder):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(UserError, match=r"cache folder .*cache \(No space left.*RAG_CACHE"):
        conversion_cache.converted_folder("toy", [source], fill_the_disk)
    folder = conversion_cache.converted_folder("toy", [source], lambda folder: None)
    monkeypatch.setattr(files, "locked", lambda path: pytest.fail("a lock is a file in the cache"))
    assert conversion_cache.converted_folder("toy", [source], fill_the_disk) == folder


def test_a_failed_conversion_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "source"
    source.write_text("weights")

    def fail(folder):
        (folder / "half").write_text("half")
        raise UserError("no")

    with pytest.raises(UserError, match="no"):
        conversion_cache.converted_folder("toy", [source], fail)
    assert not list((cache_root() / "converted").rglob("half"))
    assert (
        conversion_cache.converted_folder("toy", [source], lambda folder: (folder / "whole").touch())
        / "whole"
    ).exists()
