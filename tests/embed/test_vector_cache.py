"""Cached vectors equal the embedder's own, are computed once, and are resumed in the planned batches."""

import io
import os

import numpy as np
import pytest

from rag.embed import Embedder, vector_cache
from rag.embed.vector_cache import CachedEmbedder
from rag.runtime.cache import entries
from tests.damage import WAYS


class Lengths:
    """It embeds a text as its length and the size of its batch, as a rounding error would depend on it."""

    dim = 2
    score_threshold = 0.5

    def __init__(self, name="lengths", fail_after=None):
        self.spec = {"kind": "lengths"}
        self.fingerprint, self.batches, self._fail_after = name, [], fail_after

    def encode(self, texts, progress=lambda done: None):
        if len(self.batches) == self._fail_after:
            raise KeyboardInterrupt
        self.batches.append(list(texts))
        progress(len(texts))
        return np.array([[len(text), len(texts)] for text in texts], np.float32).reshape(-1, 2)

    def encode_queries(self, texts):
        return -self.encode(texts)

    def token_spans(self, text):
        return np.zeros((0, 2), np.int64)

    def fit(self, texts):
        return self

    def save(self, folder):
        pass

    def restore(self, folder):
        return self


@pytest.fixture(autouse=True)
def small_batches(monkeypatch):
    monkeypatch.setattr(vector_cache, "_BATCH", 2)


def test_it_is_an_embedder_with_the_vectors_of_the_one_inside(tmp_path):
    cached = CachedEmbedder(Lengths(), tmp_path)
    assert isinstance(cached, Embedder)
    assert cached.encode(["aaa", "b", "aaa", "cc"])[:, 0].tolist() == [3, 1, 3, 2]
    assert cached.encode_queries(["aaa"])[:, 0].tolist() == [-3]  # a question is no passage
    assert (cached.dim, cached.fingerprint, cached.score_threshold) == (2, "lengths", 0.5)
    assert cached.encode([]).shape == (0, 2)


def test_nothing_is_embedded_twice(tmp_path):
    first = Lengths()
    CachedEmbedder(first, tmp_path).encode(["aaa", "b", "cc"])
    assert first.batches == [["aaa", "b"], ["cc"]]
    second = Lengths()
    cached = CachedEmbedder(second, tmp_path)
    assert cached.missing(["cc", "aaa", "new"]) == 1
    assert cached.encode(["cc", "aaa", "new"])[:, 0].tolist() == [2, 3, 3]
    assert second.batches == [["new"]]
    assert (cached.passages, cached.reused) == (3, 2)


def test_another_embedder_shares_nothing(tmp_path):
    CachedEmbedder(Lengths(), tmp_path).encode(["aaa"])
    other = Lengths("other")
    CachedEmbedder(other, tmp_path).encode(["aaa"])
    assert other.batches == [["aaa"]]


def test_a_resumed_request_forms_the_same_batches(tmp_path):
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    whole = CachedEmbedder(Lengths(), tmp_path / "whole").encode(texts)
    with pytest.raises(KeyboardInterrupt):
        CachedEmbedder(Lengths(fail_after=1), tmp_path / "cut").encode(texts)
    rest = Lengths()
    resumed = CachedEmbedder(rest, tmp_path / "cut").encode(texts)
    assert rest.batches == [["ccc", "dddd"], ["eeeee"]]
    np.testing.assert_array_equal(resumed, whole)
    assert not list(tmp_path.rglob("*.todo"))


def test_progress_ends_at_the_number_of_texts(tmp_path):
    seen = []
    CachedEmbedder(Lengths(), tmp_path).encode(["a", "b", "a"], seen.append)
    assert seen[-1] == 3
    assert seen == sorted(seen)


def test_a_vector_that_was_used_stays_when_a_killed_request_is_resumed(tmp_path):
    texts = ["a", "bb", "ccc", "dddd"]
    with pytest.raises(KeyboardInterrupt):
        CachedEmbedder(Lengths(fail_after=1), tmp_path).encode(texts)
    used = CachedEmbedder(Lengths(), tmp_path).encode(["ccc"])
    resumed = CachedEmbedder(Lengths(), tmp_path).encode(texts)
    np.testing.assert_array_equal(resumed[2], used[0])  # though its planned batch was computed whole
    assert resumed[3].tolist() == [4, 2]


def test_another_version_of_the_embedders_code_shares_nothing(tmp_path, monkeypatch):
    CachedEmbedder(Lengths(), tmp_path).encode(["aaa"])
    monkeypatch.setattr(vector_cache, "model_version", lambda embedder: "other code")
    other = Lengths()
    CachedEmbedder(other, tmp_path).encode(["aaa"])
    assert other.batches == [["aaa"]]


@pytest.mark.parametrize("way", WAYS)
def test_damaged_vectors_are_computed_again(tmp_path, way, capsys):
    texts = ["a", "bb", "ccc"]
    whole = CachedEmbedder(Lengths(), tmp_path).encode(texts)
    for i in range(2):  # a file a batch
        file = sorted(tmp_path.rglob("*.npy"))[i]
        WAYS[way](file)
        again = Lengths()
        embedder = CachedEmbedder(again, tmp_path)
        assert 0 < embedder.missing(texts) < 3
        np.testing.assert_array_equal(embedder.encode(texts), whole)
        assert len(again.batches) == 1
        printed = capsys.readouterr().err
        assert (file.name in printed and printed.count("\n") == 1) == (way != "gone")
        np.testing.assert_array_equal(CachedEmbedder(Lengths(fail_after=0), tmp_path).encode(texts), whole)
        assert capsys.readouterr().err == ""
    assert not list(tmp_path.rglob("*.todo"))


@pytest.mark.parametrize("way", WAYS)
def test_a_damaged_plan_is_made_again(tmp_path, way, capsys):
    texts = ["a", "bb", "ccc", "dddd", "eeeee"]
    with pytest.raises(KeyboardInterrupt):
        CachedEmbedder(Lengths(fail_after=1), tmp_path).encode(texts)
    [plan] = tmp_path.rglob("*.todo")
    WAYS[way](plan)
    vectors = CachedEmbedder(Lengths(), tmp_path).encode(texts)
    assert vectors[:, 0].tolist() == [1, 2, 3, 4, 5]
    assert (plan.name in capsys.readouterr().err) == (way != "gone")
    assert not list(tmp_path.rglob("*.todo"))


def test_what_a_resumed_plan_took_for_granted_may_be_damaged(tmp_path, capsys):
    CachedEmbedder(Lengths(), tmp_path).encode(["a"])
    [known] = tmp_path.rglob("*.npy")
    texts = ["a", "bb", "ccc", "dddd"]
    with pytest.raises(KeyboardInterrupt):
        CachedEmbedder(Lengths(fail_after=1), tmp_path).encode(texts)  # its plan leaves "a" out
    WAYS["middle"](known)
    rest = Lengths()
    assert CachedEmbedder(rest, tmp_path).encode(texts)[:, 0].tolist() == [1, 2, 3, 4]
    assert rest.batches == [["dddd"], ["a"]]
    assert known.name in capsys.readouterr().err


def test_vectors_of_another_shape_are_not_taken(tmp_path, capsys):
    CachedEmbedder(Lengths(), tmp_path).encode(["a"])
    [file] = tmp_path.rglob("*.npy")
    content = io.BytesIO()
    np.save(content, np.zeros((3, 2), np.float32))
    entries.write(file, content.getvalue())
    assert CachedEmbedder(Lengths(), tmp_path).encode(["a"]).tolist() == [[1, 1]]
    assert "holds other vectors: its vectors are computed again" in capsys.readouterr().err


def test_what_is_known_is_not_looked_for_on_the_disk(tmp_path, monkeypatch):
    texts = [str(i) for i in range(50)]
    embedder = CachedEmbedder(Lengths(), tmp_path)
    looks = []
    listdir = os.listdir
    monkeypatch.setattr(os, "listdir", lambda path: looks.append(path) or listdir(path))
    embedder.encode(texts)
    assert len(looks) <= 2  # for 25 files: before the lock and behind it
    looks.clear()
    embedder.encode(texts[::-1])
    embedder.missing(texts)
    assert looks == []
    monkeypatch.setattr(vector_cache.entries, "read_array", lambda path: pytest.fail("read again"))
    assert embedder.encode(texts)[:, 0].tolist() == [len(text) for text in texts]


def test_a_read_only_folder_is_read_without_a_lock(tmp_path, monkeypatch):
    texts = ["a", "bb", "ccc"]
    whole = CachedEmbedder(Lengths(), tmp_path).encode(texts)
    monkeypatch.setattr(vector_cache, "entry_lock", lambda path: pytest.fail("a lock is a file in the cache"))
    np.testing.assert_array_equal(CachedEmbedder(Lengths(), tmp_path).encode(texts), whole)
