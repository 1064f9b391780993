"""Kept vectors: the embedder's own, computed once each, resumed in the batches that were planned."""

import numpy as np
import pytest

from rag import embed_cache
from rag.embed import Embedder
from rag.embed_cache import CachedEmbedder


class Lengths:
    """A vector of a text's length and the size of the batch it was in: a rounding error one can see."""

    dim = 2
    relevant_from = 0.5

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
    monkeypatch.setattr(embed_cache, "_BATCH", 2)


def test_it_is_an_embedder_with_the_vectors_of_the_one_inside(tmp_path):
    cached = CachedEmbedder(Lengths(), tmp_path)
    assert isinstance(cached, Embedder)
    assert cached.encode(["aaa", "b", "aaa", "cc"])[:, 0].tolist() == [3, 1, 3, 2]
    assert cached.encode_queries(["aaa"])[:, 0].tolist() == [-3]  # a question is no passage
    assert (cached.dim, cached.fingerprint, cached.relevant_from) == (2, "lengths", 0.5)
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
    monkeypatch.setattr(embed_cache, "version_of", lambda embedder: "other code")
    other = Lengths()
    CachedEmbedder(other, tmp_path).encode(["aaa"])
    assert other.batches == [["aaa"]]
