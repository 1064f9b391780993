"""Fixtures of the tests of rerankers: tiny models, and a collection of six passages."""

import pytest

from rag.embed.bert import BertEmbedder
from rag.generate.local import LocalGenerator
from tests.retrieve.passages import TEXTS
from tests.tiny_collections import collection_of
from tests.tiny_models import write_classifier, write_decoder, write_encoder


@pytest.fixture(scope="module")
def own_cache(tmp_path_factory):
    """Give the tests of a module a cache folder of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def embedder(own_cache, tmp_path_factory):
    return BertEmbedder(str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")), tokens_per_batch=128)


@pytest.fixture(scope="module")
def generator(own_cache, tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    write_decoder(folder)
    generator = LocalGenerator(str(folder), "float32")
    assert generator.context_length == 512
    return generator


@pytest.fixture(scope="module")
def classifier(own_cache, tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "bert", "bert")


@pytest.fixture
def collection(embedder, generator):
    return collection_of(TEXTS, embedder, generator)
