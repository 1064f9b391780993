"""The cross-encoder against the tokenizers library and one forward pass a pair."""

import json

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies

from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.retrieve.rerank.cross_encoder import CrossEncoder, label_scores, longest_first
from rag.runtime.cache.keys import content_key
from rag.types import UserError
from tests.reference import ENCODER_TOLERANCE
from tests.retrieve.passages import QUESTIONS, TEXTS, all_hits, hits_of, scores_of
from tests.tiny_models import write_classifier


def test_a_cross_encoder_reads_the_pair_as_tokenizers_writes_it(collection, classifier):
    """The library's own post-processor and truncation, then one forward a pair, are the oracle."""
    model, _, checkpoint = bert_checkpoint.load_classifier(classifier)
    for max_length in (None, 20, 21):
        core = tokenizers.Tokenizer.from_file(str(classifier / "tokenizer.json"))
        core.enable_truncation(max_length or checkpoint.max_length, strategy="longest_first")
        reranker = CrossEncoder(str(classifier), max_length, tokens_per_batch=64)
        results = scores_of(reranker.rerank(collection, QUESTIONS, all_hits(collection)))
        for question, found in zip(QUESTIONS, results, strict=True):
            for text, score in found.items():
                pair = core.encode(question, text)
                tokens, types = np.zeros((2, 1, 80), np.int32)  # padded, to share one program
                tokens[0, : len(pair.ids)], types[0, : len(pair.ids)] = pair.ids, pair.type_ids
                logits = bert.classify(model, tokens, np.array([len(pair.ids)], np.int32), types)
                assert score == pytest.approx(float(logits[0, 0]), abs=ENCODER_TOLERANCE)


@settings(deadline=None, max_examples=300)
@given(*[strategies.integers(0, 40)] * 2, strategies.integers(2, 50))
def test_longest_first_cuts_as_the_library_does(left, right, room):
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.enable_truncation(room, strategy="longest_first")
    pair = core.encode("a " * left, "b " * right)
    expected = pair.ids.count(0), pair.ids.count(1)
    if left + right == 0 or 0 in (left, right):
        assert sum(longest_first(left, right, room)) == min(left + right, room)
    else:
        assert longest_first(left, right, room) == expected


def test_roberta_separates_by_two_tokens_and_has_one_type(collection, tmp_path):
    folder = write_classifier(tmp_path / "roberta", "roberta")
    model, tokenizer, _ = bert_checkpoint.load_classifier(folder)
    [found] = CrossEncoder(str(folder)).rerank(collection, ["seal"], [hits_of(collection, [1])])
    ids = [2, *tokenizer.encode("seal", special=False), 3, 3, *tokenizer.encode("fish", special=False), 3]
    expected = bert.classify(
        model, jnp.array([ids]), jnp.array([len(ids)]), jnp.zeros((1, len(ids)), jnp.int32)
    )
    assert found[0].score == pytest.approx(float(expected[0, 0]), abs=ENCODER_TOLERANCE)


def test_several_labels_give_log_odds():
    logits = np.array([[1.0, 2.0, 4.0], [0.0, 0.0, 0.0]], np.float32)
    p = np.exp(logits.astype(np.float64)) / np.exp(logits.astype(np.float64)).sum(axis=1, keepdims=True)
    for label in (-1, 0, 1):
        expected = np.log(p[:, label] / (1 - p[:, label]))
        np.testing.assert_allclose(label_scores(logits, label), expected, rtol=1e-12)
    assert label_scores(logits[:, :1], -1).tolist() == [1.0, 0.0]


def test_the_label_is_an_option(collection, tmp_path):
    folder = str(write_classifier(tmp_path / "labels", "bert_labels"))
    last, first = (CrossEncoder(folder, label=n) for n in (-1, 0))
    given = [hits_of(collection, range(len(TEXTS)))]
    assert scores_of(last.rerank(collection, ["seal"], given)) != scores_of(
        first.rerank(collection, ["seal"], given)
    )
    with pytest.raises(UserError, match=r"label=3, but .* has 3 labels"):
        CrossEncoder(folder, label=3).rerank(collection, ["seal"], given)


def test_the_cache_key_is_of_the_weights_and_not_of_their_path(collection, tmp_path, classifier):
    """A changed file under the same path is another reranker, and is loaded again."""
    folder = write_classifier(tmp_path / "folder", "bert")
    before = CrossEncoder(str(folder))
    assert before.weights == CrossEncoder(str(classifier)).weights
    given = [hits_of(collection, range(3))]
    old = before.rerank(collection, ["seal"], given)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"hidden_act": "relu"}))
    after = CrossEncoder(str(folder))
    assert content_key(after) != content_key(before)
    assert scores_of(after.rerank(collection, ["seal"], given)) != scores_of(old)


def test_a_cross_encoder_is_loaded_once(collection, tmp_path, monkeypatch):
    folder, loads, load = (
        write_classifier(tmp_path / "once", "bert_labels"),
        [],
        bert_checkpoint.load_classifier,
    )
    monkeypatch.setattr(bert_checkpoint, "load_classifier", lambda path: loads.append(path) or load(path))
    for _ in range(3):
        CrossEncoder(str(folder)).rerank(collection, ["seal"], [hits_of(collection, [0, 1])])
    assert len(loads) == 1


def test_a_cross_encoder_that_cannot_be(collection, classifier, tmp_path):
    with pytest.raises(UserError, match="tokens_per_batch=0"):
        CrossEncoder(str(classifier), tokens_per_batch=0)
    with pytest.raises(UserError, match="no weights at"):
        CrossEncoder(str(tmp_path / "nowhere"))
    for length in (4, 81):
        with pytest.raises(UserError, match=f"max_length={length} .* from 5 to 80"):
            CrossEncoder(str(classifier), length).rerank(collection, ["a"], [hits_of(collection, [0])])
