"""The cache folder: where it is, and what happens if it cannot be trusted or written."""

import errno
import os

import pytest

from rag.runtime.cache.folder import cache_root, write_errors
from rag.types import UserError


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "cache"))


def test_cache_root_is_made_where_it_was_asked_for(tmp_path, monkeypatch):
    assert cache_root() == tmp_path / "cache"
    assert cache_root().is_dir()
    monkeypatch.delenv("RAG_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_root() == tmp_path / "home" / ".cache" / "rag-jax"


def test_the_cache_is_for_the_user_alone(tmp_path, monkeypatch):
    assert cache_root().stat().st_mode & 0o777 == 0o700
    os.chmod(cache_root(), 0o755)  # as earlier versions made it: others may look
    assert cache_root() == tmp_path / "cache"
    for mode in (0o770, 0o702):
        os.chmod(tmp_path / "cache", mode)
        with pytest.raises(UserError, match=r"Others may write to .*cache, so .*chmod -R go-w .*/cache`"):
            cache_root()
    (tmp_path / "link").symlink_to(tmp_path / "cache")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "link"))
    with pytest.raises(UserError, match=rf"chmod -R go-w {tmp_path}/cache`"):  # where the link leads
        cache_root()
    os.chmod(tmp_path / "cache", 0o700)
    assert cache_root() == tmp_path / "cache"
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    with pytest.raises(UserError, match="belongs to another user"):
        cache_root()


def test_a_cache_that_cannot_be_made_is_a_users_error(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("RAG_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(UserError, match="RAG_CACHE"):
        cache_root()


def test_a_failure_to_write_is_a_users_error(tmp_path):
    with (
        pytest.raises(UserError, match=r"folder .*cache \(Read-only file system\).*RAG_CACHE"),
        write_errors(),
    ):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    with pytest.raises(UserError, match=r"\(10 requested and 4 written\)"), write_errors():
        raise OSError("10 requested and 4 written")  # as numpy does
    with pytest.raises(KeyError), write_errors():
        raise KeyError("ours")
