"""Vectors come in the order of the texts and do not depend on other texts; the cosine of word counts."""

import json
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings, strategies

from rag.embed import bert as bert_embedder
from rag.embed.bag_of_words import BagOfWords
from rag.embed.bert import BertEmbedder
from rag.embed.packing import max_texts, pack_texts, plan_batches
from rag.models.bert import checkpoint as bert_checkpoint
from rag.models.bert import model as bert
from rag.runtime.cache.memo import model_version
from rag.runtime.shapes import round_up_text
from rag.types import UserError
from tests.reference import ENCODER_TOLERANCE, counter_cosine
from tests.tiny_models import encoder_tensors, write_encoder, write_sentence_files

GOLDENS = Path(__file__).parents[1] / "goldens"
TEXTS = [
    "hello world",
    "",
    "a",
    "hello world",
    "z" * 60,
    "the brown fox",
    "a b c " * 100,
    "   ",
    "hello",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_encoder(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("RAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def embedder(folder):
    return BertEmbedder(str(folder), tokens_per_batch=128)


@pytest.fixture
def batches(monkeypatch):
    """Return a list to which the shape of every batch is added."""
    shapes, run = [], bert.embed

    def spy(model, tokens, lengths, *, pooling):
        shapes.append(tokens.shape)
        return run(model, tokens, lengths, pooling=pooling)

    monkeypatch.setattr(bert, "embed", spy)
    return shapes


def test_unit_vectors_in_the_order_of_the_texts(embedder):
    vectors = embedder.encode(TEXTS)
    assert vectors.dtype == np.float32
    assert vectors.shape == (len(TEXTS), embedder.dim)
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)
    for text, vector in zip(TEXTS, vectors, strict=True):  # alone, each in a batch of one
        np.testing.assert_allclose(embedder.encode([text])[0], vector, atol=ENCODER_TOLERANCE)
    assert np.abs(vectors[0] - vectors[5]).max() > 0.01


def test_vectors_do_not_depend_on_the_batching(folder, embedder):
    expected = embedder.encode(TEXTS)
    shuffled = np.random.default_rng(0).permutation(len(TEXTS))
    for tokens_per_batch in (1, 33, 4096):
        other = BertEmbedder(str(folder), tokens_per_batch=tokens_per_batch)
        vectors = other.encode([TEXTS[i] for i in shuffled])
        np.testing.assert_allclose(vectors, expected[shuffled], atol=ENCODER_TOLERANCE)
        assert other.fingerprint == embedder.fingerprint


def test_equal_texts_are_embedded_once(embedder, batches):
    done = []
    vectors = embedder.encode(["ab", "cd", "ab"] * 5, progress=done.append)
    assert batches == [(2, 16)]  # [CLS], two letters, [SEP]
    assert done == [15]
    np.testing.assert_array_equal(vectors[0], vectors[2])


def test_blocks_of_texts(embedder, batches, monkeypatch):
    expected = embedder.encode(TEXTS)
    monkeypatch.setattr(bert_embedder, "_BLOCK", 2)
    monkeypatch.setattr(bert_embedder, "_IN_FLIGHT", 1)
    done = []
    vectors = embedder.encode(TEXTS, progress=done.append)
    np.testing.assert_allclose(vectors, expected, atol=ENCODER_TOLERANCE)
    assert done == sorted(done) and done[-1] == len(TEXTS) and len(done) >= 4


def test_no_texts(embedder):
    assert embedder.encode([]).shape == (0, embedder.dim)


def test_long_texts_are_cut(folder, embedder, batches):
    short = BertEmbedder(str(folder), max_length=10)
    vectors = short.encode(["abcdefgh", "abcdefghijklm", "a" * 100_000])
    np.testing.assert_allclose(vectors[0], vectors[1], atol=1e-6)  # [CLS], eight letters, [SEP]
    assert batches == [(4, 10)]
    assert short.fingerprint != embedder.fingerprint
    cut, whole = (short.encode_queries(["a" * count + "b"])[0] for count in (8, 7))
    assert short.max_query_tokens == 8
    np.testing.assert_allclose(cut, short.encode_queries(["a" * 8])[0], atol=1e-6)
    assert np.abs(whole - short.encode_queries(["a" * 7])[0]).max() > 1e-3
    for length in (2, 81):
        with pytest.raises(UserError, match=f"max_length={length} .* from 3 to 80"):
            BertEmbedder(str(folder), max_length=length)
    with pytest.raises(UserError, match=r"BertEmbedder\.tokens_per_batch=0"):
        BertEmbedder(str(folder), tokens_per_batch=0)


def test_pooling_and_prompts_of_the_checkpoint(tmp_path, embedder):
    folder = write_encoder(tmp_path / "tiny")
    write_sentence_files(folder, {"pooling_mode": "cls"}, normalize=False)
    own = BertEmbedder(str(folder))
    assert own.spec["pooling"] == {"mode": "cls", "normalize": True, "max_length": 50}
    model, tokenizer, _ = bert_checkpoint.load(folder)
    tokens = jnp.array([tokenizer.encode("question why")])
    first = bert.forward(model, tokens, jnp.array([[tokens.shape[1]]]))[0, 0]
    np.testing.assert_allclose(
        own.encode_queries(["why"])[0], first / np.linalg.norm(first), atol=ENCODER_TOLERANCE
    )
    np.testing.assert_array_equal(own.encode(["question why"]), own.encode_queries(["why"]))
    asked = BertEmbedder(str(folder), query_prompt="", document_prompt="passage ")
    np.testing.assert_array_equal(asked.encode_queries(["passage why"]), asked.encode(["why"]))
    assert len({own.fingerprint, asked.fingerprint, embedder.fingerprint}) == 3


def test_the_fingerprint_is_of_the_contents(tmp_path, embedder):
    assert BertEmbedder(str(write_encoder(tmp_path / "copy"))).fingerprint == embedder.fingerprint
    others = write_encoder(tmp_path / "others", encoder_tensors(seed=1))
    assert BertEmbedder(str(others)).fingerprint != embedder.fingerprint
    assert len(embedder.fingerprint) == 64
    assert json.loads(json.dumps(embedder.spec)) == embedder.spec


def test_an_encoder_learns_nothing_from_a_corpus(tmp_path, embedder):
    assert embedder.fit(TEXTS) is embedder
    embedder.save(tmp_path)
    assert list(tmp_path.iterdir()) == []
    assert embedder.restore(tmp_path) is embedder


def test_token_vectors_are_the_states_between_the_special_tokens(folder, embedder):
    model, tokenizer, _ = bert_checkpoint.load(folder)
    for text, vectors in zip(TEXTS, embedder.token_vectors(TEXTS), strict=True):
        ids = tokenizer.encode_batch([text], max_length=70)[0]
        hidden = np.asarray(bert.forward(model, jnp.array([ids]), jnp.array([[len(ids)]])))[0, 1:-1]
        assert vectors.dtype == np.float32
        assert vectors.shape == (len(ids) - 2, embedder.dim)
        expected = hidden / np.linalg.norm(hidden, axis=1, keepdims=True)
        np.testing.assert_allclose(vectors, expected, atol=10 * ENCODER_TOLERANCE)  # no mean evens them out
    assert embedder.token_vectors([]) == []


def test_token_vectors_do_not_change_with_what_is_beside_them(embedder):
    together = embedder.token_vectors(TEXTS)
    for texts in (TEXTS[::-1], *([text] for text in TEXTS)):
        for text, vectors in zip(texts, embedder.token_vectors(texts), strict=True):
            np.testing.assert_array_equal(vectors, together[TEXTS.index(text)])


def test_token_vectors_of_questions_have_the_questions_prompt(folder):
    asked = BertEmbedder(str(folder), query_prompt="ask ", document_prompt="")
    plain, prompted = asked.token_vectors(["why"]), asked.token_vectors(["why"], queries=True)
    assert [len(plain[0]), len(prompted[0])] == [3, 6]
    np.testing.assert_array_equal(prompted[0], asked.token_vectors(["ask why"])[0])


def test_token_spans_of_an_encoder(embedder):
    text = "ab  c"
    assert [text[a:b] for a, b in embedder.token_spans(text)] == ["a", "b", "c"]


@settings(deadline=None, max_examples=200)
@given(strategies.lists(strategies.integers(1, 256), max_size=60), strategies.integers(1, 2048))
def test_a_plan_runs_each_row_once(lengths, tokens_per_batch):
    seen = []
    for rows, size, width in plan_batches(np.array(lengths, np.int64), tokens_per_batch, 256):
        assert 1 <= len(rows) <= size
        assert size == 1 or size * width <= tokens_per_batch
        assert max(lengths[row] for row in rows) <= width == round_up_text(lengths[rows[0]], 256)
        seen += rows.tolist()
    assert sorted(seen) == list(range(len(lengths)))


@settings(deadline=None, max_examples=200)
@given(strategies.lists(strategies.integers(1, 300), max_size=80), strategies.sampled_from([40, 256, 300]))
def test_packing_places_each_text_once_in_a_row_with_room(lengths, longest):
    lengths = [min(length, longest) for length in lengths]
    rows = pack_texts(lengths, longest)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    for row in rows:
        used, first = sum(lengths[i] for i in row), lengths[row[0]]
        assert used <= longest
        assert len(row) <= max_texts(round_up_text(used, longest))
        assert len(row) == 1 or (used < max(2 * first, 17) and used <= 256)  # attention is over the whole row
    assert rows == pack_texts(lengths, longest)


def test_packing_fills_rows():
    lengths = np.clip(np.random.default_rng(0).lognormal(4, 1, 500), 3, 256).astype(int).tolist()
    rows = pack_texts(lengths, 256)
    filled = sum(round_up_text(sum(lengths[i] for i in row), 256) for row in rows)
    assert filled < 1.05 * sum(lengths)
    assert len({round_up_text(sum(lengths[i] for i in row), 256) for row in rows}) <= 8
    assert pack_texts([200, 100, 56, 9], 256) == [[0, 2], [1, 3]]  # the largest that fits
    assert pack_texts([], 256) == []


def test_texts_of_all_lengths_share_rows(embedder, batches):
    letters = "abcdefghijklmnopqrstuvwxyz"
    texts = [
        (letters * 3)[i % 26 : i % 26 + n] for i, n in enumerate([60, 4, 30, 2, 9, 20, 33, 1, 16, 68, 5, 12])
    ]
    together = embedder.encode(texts)
    used = sum(min(len(text), 68) + 2 for text in texts)
    assert sum(b * t for b, t in batches) < 1.3 * used
    for text, vector in zip(texts, together, strict=True):
        np.testing.assert_allclose(embedder.encode([text])[0], vector, atol=ENCODER_TOLERANCE)


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_weights_in_fewer_bits(folder, embedder, dtype):
    less = BertEmbedder(str(folder), dtype=dtype)
    vectors = less.encode(TEXTS)
    cosines = np.sum(vectors * embedder.encode(TEXTS), axis=1)
    assert vectors.dtype == np.float32
    assert 0.98 < cosines.min() < 0.9999999
    assert less.fingerprint != embedder.fingerprint
    assert less.spec["dtype"] == dtype
    assert model_version(less) != model_version(embedder)  # the key of cached vectors


def test_an_unknown_dtype_is_refused(folder):
    with pytest.raises(UserError, match=r"dtype=float16 .* float32, bfloat16 or int8"):
        BertEmbedder(str(folder), dtype="float16")


def test_padded_lengths_are_few():
    widths = [round_up_text(length, 500) for length in range(1, 501)]
    assert widths == sorted(widths)
    assert all(length <= width <= 500 for length, width in enumerate(widths, 1))
    assert len(set(widths)) == 16


# --- bag of words -------------------------------------------------------------------------------------------

SEED = [
    "The dominant sequence transduction models are based on complex recurrent or convolutional neural "
    "networks that include an encoder and a decoder.",
    "The best performing models also connect the encoder and decoder through an attention mechanism.",
    "The fundamental constraint of sequential computation, however, remains.",
    "In all but a few cases, such attention mechanisms are used in conjunction with a recurrent network.",
]
QUESTION = "What is attention mechanism?"


def test_the_cosines_of_the_first_seed():
    def cosine(left: str, right: str) -> float:
        bag = BagOfWords().fit([left, right])
        return float(bag.vector(left) @ bag.vector(right))

    assert cosine("hello world", "hello world") == 0.9999999999999998
    other = "Attention is all you need, you know that!"
    assert cosine(QUESTION, other) == pytest.approx(0.31622776601683794, abs=1e-16)
    assert cosine("A  a", "a a") == pytest.approx(counter_cosine("A  a", "a a"))  # an empty word between


def test_questions_against_a_corpus():
    bag = BagOfWords().fit(SEED)
    vectors, questions = bag.encode(SEED), [QUESTION, SEED[0].upper(), "two  spaces", "nothing known", ""]
    scores = bag.encode_queries(questions) @ vectors.T
    expected = [[counter_cosine(question, text) for text in SEED] for question in questions]
    np.testing.assert_allclose(scores, expected, atol=1e-6)
    assert vectors.dtype == scores.dtype == np.float32
    assert scores[0].argmax() == np.argmax(expected[0])
    np.testing.assert_allclose(np.linalg.norm(vectors, axis=1), 1, atol=1e-6)


def test_unknown_words_lengthen_a_question():
    bag = BagOfWords().fit(["known word"])
    np.testing.assert_allclose(bag.encode_queries(["known x y z"]), [[0.5, 0]], atol=1e-7)
    np.testing.assert_array_equal(bag.encode_queries(["x y z"]), [[0, 0]])


def test_the_vocabulary_is_saved_and_restored(tmp_path):
    bag = BagOfWords().fit([*SEED, "naïve 🤖 \udcff"[:8]])
    bag.save(tmp_path)
    restored = BagOfWords().restore(tmp_path)
    assert restored.dim == bag.dim == restored.encode([""]).shape[1]
    np.testing.assert_array_equal(restored.encode(SEED), bag.encode(SEED))
    assert restored.fingerprint == bag.fingerprint == BagOfWords().fingerprint
    (tmp_path / "vocabulary.json").write_text('["ice", 3]')
    with pytest.raises(UserError, match=r"vocabulary\.json .*valid string.*ingest the corpus again$"):
        bag.restore(tmp_path)
    (tmp_path / "vocabulary.json").unlink()
    with pytest.raises(UserError, match=r"vocabulary\.json.*ingest the corpus again"):
        BagOfWords().restore(tmp_path)


def test_a_matrix_too_large_is_refused():
    with pytest.raises(UserError, match=r"2 passages of 3 different words .* 24 bytes.*max_bytes=23"):
        BagOfWords(max_bytes=23).fit(["a b", "a c"])
    assert BagOfWords(max_bytes=24).fit(["a b", "a c"]).dim == 3


def test_no_dimensions_before_a_corpus():
    with pytest.raises(RuntimeError, match="fit"):
        BagOfWords().encode(["a"])


def test_word_spans():
    text = " ab  c\nd "
    assert [text[a:b] for a, b in BagOfWords().token_spans(text)] == ["ab", "c\nd"]
    assert BagOfWords().token_spans("").shape == (0, 2)


# --- the default weights ------------------------------------------------------------------------------------


@pytest.mark.weights
def test_minilm_is_that_of_sentence_transformers(embedder_weights):
    texts = json.loads((GOLDENS / "minilm.json").read_text(encoding="utf-8"))
    expected = np.load(GOLDENS / "minilm.npy").astype(np.float64)
    vectors = BertEmbedder(str(embedder_weights)).encode(texts)
    cosines = np.sum(vectors * expected, axis=1)
    assert len(texts) == 40
    assert cosines.min() >= 0.99999
