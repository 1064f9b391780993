"""Rerankers against their formulas, one pair at a time, and the invariants of all of them."""

import gc
import json
import math
import weakref
from dataclasses import dataclass, field

import jax.numpy as jnp
import numpy as np
import pytest
import tokenizers
from hypothesis import given, settings, strategies

from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.generate import LogLikelihood
from rag.generate.local import LocalGenerator
from rag.index.memory import MemoryIndex
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker, maxsim
from rag.retrieve.rerank.cross_encoder import CrossEncoder, label_scores, longest_first
from rag.retrieve.rerank.likelihood import Likelihood
from rag.retrieve.rerank.maxsim import MaxSim
from rag.runtime.cache_key import content_key
from rag.types import Chunk, Document, Hit, Message, UserError
from tests import tiny_models
from tests.reference import ENCODER_TOLERANCE
from tests.tiny_models import write_classifier, write_encoder
from tests.typecheck import unchecked

TEXTS = ["a seal eats fish", "fish", "krill drift in swarms " * 12, "a gull nests on a cliff", "", "the seal"]
QUESTIONS = ["what does a seal eat", "gulls", "q" * 200]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def embedder(tmp_path_factory):
    return BertEmbedder(str(write_encoder(tmp_path_factory.mktemp("encoder") / "tiny")), tokens_per_batch=128)


@pytest.fixture(scope="module")
def generator(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decoder")
    tiny_models.write_decoder(folder)
    generator = LocalGenerator(str(folder), "float32")
    assert generator.context_length == 512
    return generator


@pytest.fixture(scope="module")
def classifier(tmp_path_factory):
    return write_classifier(tmp_path_factory.mktemp("classifier") / "bert", "bert")


def collection_of(embedder, generator=None, texts=TEXTS) -> Collection:
    chunks = [
        Chunk(f"{n}:0-{len(text)}", str(n), f"{n}.txt", 0, len(text), text) for n, text in enumerate(texts)
    ]
    documents = [Document(chunk.document_id, chunk.path, chunk.text) for chunk in chunks]
    return Collection(MemoryIndex(documents, chunks, embedder.encode), embedder, lambda: generator)


@pytest.fixture
def collection(embedder, generator):
    return collection_of(embedder, generator)


def hits_of(collection, rows) -> list[Hit]:
    return collection.hits(rows, [1 / (1 + rank) for rank in range(len(rows))])


def everything(collection) -> list[list[Hit]]:
    return [hits_of(collection, range(len(TEXTS))) for _ in QUESTIONS]


def scores_of(results) -> list[dict[str, float]]:
    return [{hit.chunk.text: hit.score for hit in found} for found in results]


@pytest.fixture(params=["cross_encoder", "maxsim", "likelihood"])
def reranker(request, classifier) -> Reranker:
    match request.param:
        case "cross_encoder":
            return CrossEncoder(str(classifier))
        case "maxsim":
            return MaxSim()
    return Likelihood(passage_tokens=40, question_tokens=20)


# --- all of them --------------------------------------------------------------------------------------------


def test_the_same_hits_best_first(collection, reranker):
    given = everything(collection)
    results = reranker.rerank(collection, QUESTIONS, given)
    assert isinstance(reranker, Reranker)
    for before, after in zip(given, results, strict=True):
        assert {hit.chunk.id for hit in after} == {hit.chunk.id for hit in before}
        assert len(after) == len(before)
        scores = [hit.score for hit in after]
        assert scores == sorted(scores, reverse=True)
        assert all(type(score) is float and math.isfinite(score) for score in scores)
        assert len(set(scores)) > 3


def test_no_hits(collection, reranker):
    some = hits_of(collection, [1, 3])
    assert reranker.rerank(collection, [], []) == []
    assert reranker.rerank(collection, QUESTIONS, [[], [], []]) == [[], [], []]
    [first, second, third] = reranker.rerank(collection, QUESTIONS, [[], some, []])
    assert (first, len(second), third) == ([], 2, [])


def test_equal_passages_keep_their_order(embedder, generator, reranker):
    collection = collection_of(embedder, generator, ["seal", "gull", "seal", "gull", "seal"])
    [found] = reranker.rerank(collection, ["seals"], [hits_of(collection, [4, 3, 2, 1, 0])])
    ids = [hit.chunk.document_id for hit in found]
    assert ids in (["4", "2", "0", "3", "1"], ["3", "1", "4", "2", "0"])


def test_a_question_is_scored_as_it_is_alone(collection, reranker):
    together = scores_of(reranker.rerank(collection, QUESTIONS, everything(collection)))
    for question, expected in zip(QUESTIONS, together, strict=True):
        [alone] = reranker.rerank(collection, [question], [hits_of(collection, range(len(TEXTS)))[::-1]])
        assert {hit.chunk.text: hit.score for hit in alone} == pytest.approx(expected, abs=1e-4)


def test_its_options_are_its_cache_key(reranker):
    assert len(content_key(reranker)) == 64
    assert hash(reranker) == hash(reranker)
    assert set(reranker.depends_on) <= {"embedder", "generator"}


@pytest.mark.parametrize("question", ["", "   ", "\U0001f9ad", "z" * 1_000_000, "seal " * 200_000])
def test_odd_questions(collection, reranker, question):
    [found] = reranker.rerank(collection, [question], [hits_of(collection, range(len(TEXTS)))])
    assert len(found) == len(TEXTS)
    assert all(math.isfinite(hit.score) for hit in found)


# --- cross-encoder ------------------------------------------------------------------------------------------


def test_a_cross_encoder_reads_the_pair_as_tokenizers_writes_it(collection, classifier):
    """The library's own post-processor and truncation, then one forward a pair, are the oracle."""
    model, _, checkpoint = bert_checkpoint.load_classifier(classifier)
    for max_length in (None, 20, 21):
        core = tokenizers.Tokenizer.from_file(str(classifier / "tokenizer.json"))
        core.enable_truncation(max_length or checkpoint.max_length, strategy="longest_first")
        reranker = CrossEncoder(str(classifier), max_length, tokens_per_batch=64)
        results = scores_of(reranker.rerank(collection, QUESTIONS, everything(collection)))
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


# --- late interaction ---------------------------------------------------------------------------------------


def test_maxsim_is_the_mean_of_the_best_cosines(collection, embedder):
    results = scores_of(MaxSim().rerank(collection, QUESTIONS, everything(collection)))
    for question, found in zip(QUESTIONS, results, strict=True):
        query = embedder.token_vectors([question])[0].astype(np.float64)
        for text, score in found.items():
            passage = embedder.token_vectors([text])[0].astype(np.float64)
            if len(passage):
                expected = sum(max(float(q @ p) for p in passage) for q in query) / len(query)
                assert score == pytest.approx(expected, abs=5e-4)  # passages are cached in float16
            else:
                assert score == -1.0


def test_a_passage_scores_one_with_itself(collection):
    [found] = MaxSim().rerank(collection, ["the seal"], [hits_of(collection, range(len(TEXTS)))])
    assert found[0].chunk.text == "the seal"
    assert found[0].score == pytest.approx(1, abs=5e-4)


def test_a_question_without_tokens_leaves_the_order(collection):
    [found] = MaxSim().rerank(collection, [""], [hits_of(collection, [3, 0, 4, 1])])
    assert [hit.chunk.document_id for hit in found] == ["3", "0", "4", "1"]
    assert {hit.score for hit in found} == {0.0}


def test_maxsim_of_padded_rows():
    rng = np.random.default_rng(0)
    query, passages = (
        rng.normal(size=(5, 8)).astype(np.float32),
        rng.normal(size=(3, 7, 8)).astype(np.float32),
    )
    sizes = np.array([7, 2, 0], np.int32)
    found = maxsim.maxsim(query, np.int32(4), passages, sizes)
    for score, passage, size in zip(found, passages, sizes, strict=True):
        best = [max([float(q @ p) for p in passage[:size]] + [-1.0]) for q in query[:4]]
        assert float(score) == pytest.approx(sum(best) / 4, abs=1e-5)


def test_each_passage_is_encoded_once_in_all(embedder, monkeypatch):
    """Over several calls, as a sweep makes them; and the cached vectors give the same scores to the bit."""
    collection, encoded, encode = collection_of(embedder), [], embedder.token_vectors

    def spy(texts, *, queries=False):
        if not queries:
            encoded.extend(texts)
        return encode(texts, queries=queries)

    monkeypatch.setattr(embedder, "token_vectors", spy)
    rows = [[0, 1, 2], [2, 3, 0], [5, 4, 1, 3]]
    parts = [
        MaxSim().rerank(collection, [q], [hits_of(collection, r)])
        for q, r in zip(QUESTIONS, rows, strict=True)
    ]
    assert sorted(encoded) == sorted(TEXTS)
    fresh = collection_of(embedder)
    whole = MaxSim().rerank(fresh, QUESTIONS, [hits_of(fresh, r) for r in rows])
    assert [found for [found] in parts] == whole


def test_kept_token_vectors_are_bounded_and_go_with_the_collection(embedder, monkeypatch):
    collection = collection_of(embedder)
    expected = MaxSim().rerank(collection, QUESTIONS, everything(collection))
    monkeypatch.setattr(maxsim, "_CACHE_BYTES", 3000)
    small = collection_of(embedder)
    assert MaxSim().rerank(small, QUESTIONS, everything(small)) == expected
    assert 0 < sum(vectors.nbytes for vectors in maxsim._cache[small].values()) <= 3000
    gone = weakref.ref(small)
    del small
    gc.collect()
    assert gone() is None


def test_counted_words_have_no_token_vectors():
    collection = collection_of(BagOfWords().fit(TEXTS))
    with pytest.raises(UserError, match="embedder=minilm"):
        MaxSim().rerank(collection, ["seal"], [hits_of(collection, [0])])


# --- likelihood ---------------------------------------------------------------------------------------------


@dataclass
class Told:
    """A generator whose token is a word and whose log-likelihood is minus the words of the prompt and the text."""

    asked: list = field(default_factory=list)
    fingerprint: str = "0" * 64
    context_length: int = 1000

    def count(self, text):
        return len(text.split())

    def prompt_tokens(self, messages):
        return sum(self.count(message.content) for message in messages)

    def stream(self, request):
        raise NotImplementedError

    def generate(self, requests):
        raise NotImplementedError

    def log_likelihood(self, pairs):
        self.asked += pairs
        return [LogLikelihood(-float(self.prompt_tokens(m) + self.count(t)), self.count(t)) for m, t in pairs]

    def text_log_likelihood(self, pairs):
        self.asked += pairs
        return [LogLikelihood(-float(self.count(p) + self.count(t)), self.count(t)) for p, t in pairs]


def test_the_prompt_stands_before_the_question(embedder):
    told = Told()
    collection = collection_of(embedder, told, ["{question} one two three", "four"])
    reranker = Likelihood(prompt="Passage: {passage} {x}\nQuestion:  {question}", average="sum")
    [found] = reranker.rerank(collection, ["why {passage}?"], [hits_of(collection, [0, 1])])
    assert told.asked == [
        ("Passage: {question} one two three {x}\nQuestion:", "  why {passage}?"),
        ("Passage: four {x}\nQuestion:", "  why {passage}?"),
    ]
    assert [(hit.chunk.document_id, hit.score) for hit in found] == [("1", -6.0), ("0", -9.0)]


def test_the_mean_over_the_questions_tokens(embedder):
    collection = collection_of(embedder, Told(), ["one two", "three"])
    [found] = Likelihood(prompt="{passage}{question}").rerank(
        collection, ["a b c d"], [hits_of(collection, [0, 1])]
    )
    assert [hit.score for hit in found] == [-5 / 4, -6 / 4]


def test_in_the_chat_format_the_prompt_is_the_users_message(embedder):
    told = Told()
    collection = collection_of(embedder, told, ["text"])
    Likelihood(prompt="Ask about {passage}. {question}", chat=True).rerank(
        collection, ["why?"], [hits_of(collection, [0])]
    )
    assert told.asked == [([Message("user", "Ask about text.")], "why?")]


def test_long_texts_are_cut_at_a_word(embedder):
    told = Told()
    collection = collection_of(embedder, told, ["one two  three four five"])
    Likelihood(prompt="{passage}|{question}", passage_tokens=3, question_tokens=2).rerank(
        collection, ["a b c"], [hits_of(collection, [0])]
    )
    assert told.asked == [("one two  three|", "a b")]


def test_a_likelihood_of_the_real_engine(collection, generator):
    reranker = Likelihood(prompt="P: {passage}\nQ: {question}")
    [found] = reranker.rerank(collection, ["what eats fish"], [hits_of(collection, [0, 1, 3])])
    for hit in found:
        [value] = generator.text_log_likelihood([(f"P: {hit.chunk.text}\nQ:", " what eats fish")])
        assert value.tokens == len(" what eats fish")
        assert hit.score == pytest.approx(value.total / value.tokens, abs=1e-4)


@pytest.mark.parametrize(
    "prompt",
    ["{passage}", "{question}", "{question} {passage}", "{passage} {question}?", "{passage}{passage}{question}",
     "{question}{passage}{question}", "{passage} {question}{question}", ""],
)  # fmt: skip
def test_prompts_of_another_form_are_refused(prompt):
    with pytest.raises(UserError, match=r"reranker\.prompt must hold"):
        Likelihood(prompt=prompt)


def test_other_settings_that_cannot_be():
    with pytest.raises(UserError, match=r"average=max .*mean or sum"):
        unchecked(Likelihood, average="max")
    with pytest.raises(UserError, match="passage_tokens=0"):
        Likelihood(passage_tokens=0)
    with pytest.raises(UserError, match="question_tokens=-1"):
        Likelihood(question_tokens=-1)
