"""SHA-256 of files: cached digests follow the content."""

import errno
import hashlib
import os

import pytest

from rag.runtime.cache import entries, file_hash
from rag.runtime.cache.file_hash import file_sha256
from rag.runtime.cache.folder import entry_name
from rag.runtime.checksums import append_checksum
from rag.runtime.files import atomic_file
from tests.damage import WAYS


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def test_file_sha256_follows_the_content(tmp_path):
    path = tmp_path / "weights"
    path.write_bytes(b"one" * 1_000_000)
    assert file_sha256(path) == hashlib.sha256(b"one" * 1_000_000).hexdigest()
    path.write_bytes(b"two" * 1_000_000)  # at once, and of the same size: the clock may not have moved
    assert file_sha256(path) == hashlib.sha256(b"two" * 1_000_000).hexdigest()


def test_file_sha256_reads_a_file_once_until_it_changes(tmp_path, monkeypatch):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    os.utime(path, (1000, 1000))
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    first = file_sha256(path)
    [memory] = (tmp_path / "cache" / "sha256").iterdir()
    with atomic_file(memory) as file:
        file.write(b"as remembered")
        append_checksum(file, entry_name(memory))
    assert file_sha256(path) == "as remembered"
    assert file_sha256(path, fresh=True) == file_sha256(path) == first
    path.write_bytes(b"two")
    os.utime(path, (1000, 1000))  # the same inode, size and mtime: as a copy that keeps times leaves it
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest() != first
    os.utime(path, (2000, 2000))
    assert file_sha256(path) == hashlib.sha256(b"two").hexdigest()
    other = tmp_path / "other"
    other.write_bytes(b"six")
    os.utime(other, (2000, 2000))
    os.replace(other, path)
    assert file_sha256(path) == hashlib.sha256(b"six").hexdigest()


def test_file_sha256_needs_no_memory(tmp_path, monkeypatch):
    path, tried = tmp_path / "weights", []

    def read_only(memory):
        tried.append(memory)
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(entries, "atomic_file", read_only)
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    path.write_bytes(b"one")
    assert file_sha256(path) == hashlib.sha256(b"one").hexdigest()
    assert len(tried) == 1
    with pytest.raises(FileNotFoundError):
        file_sha256(tmp_path / "nothing")


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_digest_is_never_believed(tmp_path, monkeypatch, way, capsys):
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    monkeypatch.setattr(file_hash, "_RACY_NS", 0)
    right = file_sha256(path)
    [memory] = (tmp_path / "cache" / "sha256").iterdir()
    before = memory.read_bytes()
    WAYS[way](memory)
    assert file_sha256(path) == right
    printed = capsys.readouterr().err
    assert (memory.name in printed and printed.count("\n") == 1) == (way != "gone")
    assert memory.read_bytes() == before
