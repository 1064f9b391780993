"""Lexical search against sums written out in float64, and the index against one built at once."""

import json
import math
from collections import Counter
from dataclasses import fields

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex, Postings
from rag.index.lexical.weighting import BM25Weights, TfIdfWeights, bm25_scores
from rag.runtime import files
from rag.types import UserError
from tests.typecheck import unchecked

VARIANTS = ("lucene", "robertson", "atire", "bm25+", "bm25l")
PLAIN = Analyzer(stop_words=None)
OPTIONS = [BM25Weights(v, k1, b) for v in VARIANTS for k1, b in ((1.5, 0.75), (0.4, 1.0), (0.0, 0.3))]
OPTIONS += [TfIdfWeights(), TfIdfWeights(sublinear=True)]


def corpus(count: int, words: int = 300, seed: int = 0) -> list[str]:
    """Passages of 0 to 40 words, some of which are in nearly every passage and some in one; with duplicates."""
    rng = np.random.default_rng(seed)
    draws = [np.minimum(rng.zipf(1.3, size=rng.integers(41)) - 1, words - 1) for _ in range(count)]
    texts = [" ".join(f"w{i:03d}" for i in draw) for draw in draws]
    texts[count // 2 : count // 2 + 3] = texts[:3]
    return texts


def questions(count: int, words: int = 300, seed: int = 1) -> list[str]:
    rng = np.random.default_rng(seed)
    draws = [np.minimum(rng.zipf(1.2, size=rng.integers(1, 9)) - 1, words + 20) for _ in range(count)]
    return [" ".join(f"w{i:03d}" for i in draw) for draw in draws]  # with repetitions and unknown words


def oracle(texts: list[str], question: str, weights) -> dict[int, float]:
    """Row -> score of every passage that shares a word with the question, one sum at a time, in float64."""
    passages = [Counter(text.split()) for text in texts]
    df = Counter(word for passage in passages for word in passage)
    mean = sum(passage.total() for passage in passages) / len(passages)
    wanted = [word for word in question.split() if df[word]]
    score = cosine if isinstance(weights, TfIdfWeights) else okapi
    return {
        row: score(passages, mean, df, wanted, passage, weights)
        for row, passage in enumerate(passages)
        if any(passage[word] for word in wanted)
    }


def okapi(passages, mean, df, wanted, passage, w) -> float:
    n = len(passages)
    norm = 1 - w.b + w.b * passage.total() / mean
    total = 0.0
    for word in wanted:
        f, d = passage[word], df[word]
        if w.variant in ("lucene", "robertson"):
            rate = (n - d + 0.5) / (d + 0.5)
            idf = math.log(1 + rate) if w.variant == "lucene" else max(0.0, math.log(rate))
            total += idf * f / (f + w.k1 * norm) if f else 0.0
        elif w.variant == "atire":
            total += math.log(n / d) * (w.k1 + 1) * f / (w.k1 * norm + f) if f else 0.0
        elif w.variant == "bm25+":
            part = (w.k1 + 1) * f / (w.k1 * norm + f) if f else 0.0
            total += math.log((n + 1) / d) * (part + w.delta)
        else:
            c = f / norm
            total += math.log((n + 1) / (d + 0.5)) * (w.k1 + 1) * (c + w.delta) / (w.k1 + c + w.delta)
    return total


def cosine(passages, mean, df, wanted, passage, w) -> float:
    def vector(counts: Counter) -> dict[str, float]:
        idf = {word: math.log((1 + len(passages)) / (1 + df[word])) + 1 for word in counts}
        return {word: (1 + math.log(c) if w.sublinear else c) * idf[word] for word, c in counts.items()}

    one, other = vector(Counter(wanted)), vector(passage)
    product = sum(value * other.get(word, 0.0) for word, value in one.items())
    return product / math.hypot(*one.values()) / math.hypot(*other.values())


def check(found, wanted: dict[int, float], k: int) -> None:
    """The k best, each with its score, in an order that only rounding or a tie could change."""
    scores, rows = found
    best = sorted(wanted.values(), reverse=True)[:k]
    assert (scores.dtype, rows.dtype) == (np.float32, np.int32)
    assert len(scores) == len(rows) == len(set(rows.tolist())) == len(best)
    np.testing.assert_allclose(scores, best, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(scores, [wanted[row] for row in rows.tolist()], rtol=1e-5, atol=1e-7)
    ranked = list(zip((-scores).tolist(), rows.tolist(), strict=True))
    assert ranked == sorted(ranked)


@pytest.mark.parametrize("weights", OPTIONS, ids=str)
def test_scores_and_ranking(weights):
    texts = corpus(150)
    index = LexicalIndex.build(texts, PLAIN)
    asked = questions(12)
    for k in (1, 10, 1000):
        for question, found in zip(asked, index.search(asked, k, weights), strict=True):
            check(found, oracle(texts, question, weights), k)


@pytest.mark.parametrize("k", [1, 7, 100])
def test_choosing_by_group_maxima(k):
    texts = corpus(3001, words=2000)
    index = LexicalIndex.build(texts, PLAIN)
    for question in questions(5, words=2000):
        check(index.search([question], k, BM25Weights())[0], oracle(texts, question, BM25Weights()), k)


def test_ties_go_to_the_lower_row():
    texts = ["apple pie", "plum", "apple pie", "apple pie apple"] * 200
    scores, rows = LexicalIndex.build(texts, PLAIN).search(["pie"], 5, BM25Weights())[0]
    assert rows.tolist() == [0, 2, 4, 6, 8]
    assert len(set(scores.tolist())) == 1


def test_a_batch_changes_nothing():
    index, asked = LexicalIndex.build(corpus(500), PLAIN), questions(40)
    together = index.search(asked, 10, BM25Weights())
    alone = [index.search([question], 10, BM25Weights())[0] for question in reversed(asked)][::-1]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_array_equal(one[0], other[0])
        np.testing.assert_array_equal(one[1], other[1])


def test_weights_change_between_searches():
    texts, index = corpus(60), LexicalIndex.build(corpus(60), PLAIN)
    for weights in (*OPTIONS, *OPTIONS[::-1]):
        check(index.search(["w001 w003"], 9, weights)[0], oracle(texts, "w001 w003", weights), 9)


def test_a_repeated_word_counts_each_time():
    index = LexicalIndex.build(corpus(100), PLAIN)
    [once, twice] = index.search(["w002", "w002 w002"], 5, BM25Weights())
    np.testing.assert_allclose(twice[0], 2 * once[0], rtol=1e-6)
    np.testing.assert_array_equal(twice[1], once[1])
    [once, twice] = index.search(["w002", "w002 w002"], 5, TfIdfWeights())
    np.testing.assert_allclose(twice[0], once[0], rtol=1e-6)  # a longer vector of the same direction


# --- growing and keeping


def assert_same(one: LexicalIndex, other: LexicalIndex) -> None:
    assert one.analyzer == other.analyzer
    assert len(one) == len(other)
    for field in fields(Postings):
        a, b = getattr(one.postings, field.name), getattr(other.postings, field.name)
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)
    asked = [*questions(8), "w001", "fresh word"]
    for a, b in zip(
        one.search(asked, 20, BM25Weights()), other.search(asked, 20, BM25Weights()), strict=True
    ):
        np.testing.assert_array_equal(a[0], b[0])
        np.testing.assert_array_equal(a[1], b[1])


def test_adding_equals_building():
    texts = [*corpus(120), "fresh " * 300, ""]
    grown = LexicalIndex.build(texts[:50], PLAIN)
    grown.search(["w001"], 3, BM25Weights())  # what the words were worth must not stay
    for start, end in ((50, 50), (50, 51), (51, 110), (110, len(texts))):
        grown.add(texts[start:end])
    assert_same(grown, LexicalIndex.build(texts, PLAIN))


def test_saved_and_loaded(tmp_path):
    index = LexicalIndex.build(
        [*corpus(80), "half \ud83d"], Analyzer(stemmer="english", stop_words=["of"], cjk=2)
    )
    with files.atomic_folder(tmp_path / "index") as folder:
        index.save(folder)
    loaded = LexicalIndex.load(tmp_path / "index")
    assert_same(loaded, index)
    assert (
        loaded.nbytes
        == index.nbytes
        == sum(np.load(path).nbytes for path in (tmp_path / "index").glob("*.npy"))
    )
    loaded.add(["fresh word"])
    index.add(["fresh word"])
    assert_same(loaded, index)
    assert len(LexicalIndex.load(tmp_path / "index")) == 81  # the files are as they were


def test_what_is_no_index_is_named(tmp_path):
    with pytest.raises(UserError, match="no whole lexical index"):
        LexicalIndex.load(tmp_path)
    LexicalIndex.build(["one"], PLAIN).save(tmp_path)
    (tmp_path / "rows.npy").write_bytes(b"")
    with pytest.raises(UserError, match="no whole lexical index"):
        LexicalIndex.load(tmp_path)
    LexicalIndex.build(["one"], PLAIN).save(tmp_path)
    text = (tmp_path / "lexical.json").read_text()
    (tmp_path / "lexical.json").write_text(json.dumps(json.loads(text) | {"terms": [1]}))
    with pytest.raises(
        UserError, match=r"lexical\.json is not as it should be \(terms\.0: .*build the index again"
    ):
        LexicalIndex.load(tmp_path)
    meta = json.loads(text) | {"format": 99}
    (tmp_path / "lexical.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="another format"):
        LexicalIndex.load(tmp_path)


def test_progress_counts_passages():
    heard = []
    LexicalIndex.build((f"text {i}" for i in range(5000)), PLAIN, heard.append)
    assert heard == [4096, 5000]


# --- degenerate inputs


@pytest.mark.parametrize("weights", OPTIONS, ids=str)
@pytest.mark.parametrize("texts", [[], [""], ["", "of the"], ["!?", "🦊"]], ids=repr)
def test_passages_without_words(texts, weights):
    index = LexicalIndex.build(texts, Analyzer())
    assert len(index) == len(texts)
    for scores, rows in index.search(["fox", "", "of the"], 5, weights):
        assert scores.shape == rows.shape == (0,)


@pytest.mark.parametrize("weights", OPTIONS, ids=str)
def test_questions_without_words_to_search_for(weights):
    index = LexicalIndex.build(["the fox", "", "a dog"], Analyzer())
    for scores, rows in index.search(["", "of the and", "unknown", "🦊 ?", "\ud83d"], 5, weights):
        assert scores.shape == rows.shape == (0,)
    assert index.search([], 5, weights) == []


@pytest.mark.parametrize("weights", OPTIONS, ids=str)
def test_one_passage_is_found_by_its_word(weights):
    texts = ["fox"]  # worth nothing by some idf, but shared
    check(
        LexicalIndex.build(texts, PLAIN).search(["fox fox"], 5, weights)[0],
        oracle(texts, "fox fox", weights),
        5,
    )


def test_words_worth_nothing_come_last():
    texts = ["common rare", "common", "common", "", "common rare rare", "other"]
    weights = BM25Weights("robertson")  # common is in more than half
    index = LexicalIndex.build(texts, PLAIN)
    scores, rows = index.search(["common other"], 4, weights)[0]
    assert rows.tolist() == [5, 0, 1, 2]
    assert scores[0] > 0 and scores[1:].tolist() == [0, 0, 0]
    check((scores, rows), oracle(texts, "common other", weights), 4)


def test_emoji_and_accents():
    texts = ["naïve café 🦊", "NAÏVE Straße", "日本語の文"]
    index = LexicalIndex.build(texts, PLAIN)
    assert index.search(["Naïve 🦊 CAFÉ"], 5, BM25Weights())[0][1].tolist() == [0, 1]
    assert index.search(["日本"], 5, BM25Weights())[0][1].tolist() == []
    bigrams = LexicalIndex.build(texts, Analyzer(cjk=2))
    assert bigrams.search(["日本"], 5, BM25Weights())[0][1].tolist() == [2]


def test_a_question_of_a_megabyte():
    texts = corpus(40)
    question = " ".join(f"w{i % 400:03d}" for i in range(1 << 18))
    assert len(question) > 1_000_000
    index = LexicalIndex.build(texts, PLAIN)
    check(index.search([question], 3, BM25Weights())[0], oracle(texts, question, BM25Weights()), 3)


def test_fewer_than_one_result_is_refused():
    with pytest.raises(UserError, match="k of 1 or more"):
        LexicalIndex.build(["one"], PLAIN).search(["one"], 0, BM25Weights())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"k1": -0.1}, r"k1=-0.1 .* from 0 to 1000"),
        ({"k1": math.nan}, "k1=nan"),
        ({"k1": math.inf}, "k1=inf"),
        ({"b": 1.1}, r"b=1.1 .* 0 to 1"),
        ({"delta": -1.0}, "delta=-1.0"),
    ],
)
def test_bad_weights_are_named(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        BM25Weights(**settings)


def test_an_unknown_variant_is_named():
    with pytest.raises(UserError, match=r"variant=okapi .* lucene"):
        unchecked(BM25Weights, variant="okapi")


# --- features for tuning


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("delta", [0.0, 0.5])
def test_scores_from_features(variant, delta):
    texts = corpus(90)
    index, question = LexicalIndex.build(texts, PLAIN), "w001 w004 w001 w077 unknown"
    rows = np.array([5, 0, 89, 44, 45, 46, 7])
    tf, df, lengths = index.features(question, rows)
    assert tf.shape == (4 if "w077" in " ".join(texts) else 3, 7)
    assert tf.tolist() == [
        [texts[row].split().count(word) for row in rows]
        for word in question.split()
        if word in " ".join(texts)
    ]
    assert lengths.tolist() == [len(texts[row].split()) for row in rows]
    mean = sum(len(text.split()) for text in texts) / len(texts)
    assert index.average_length == pytest.approx(mean, rel=1e-12)
    tf, df = np.pad(tf, ((0, 3), (0, 0))), np.pad(df, (0, 3))  # as questions of different lengths are
    grid = jnp.array([(1.5, 0.75), (0.0, 0.0), (3.0, 1.0)])

    @jax.jit
    @jax.vmap
    def scores(pair):
        k1, b = pair
        return bm25_scores(
            tf, df, lengths, len(index), index.average_length, k1, b, variant=variant, delta=delta
        )

    for (k1, b), found in zip(grid.tolist(), np.asarray(scores(grid)), strict=True):
        weights = BM25Weights(variant, k1, b, delta)
        passages = [Counter(text.split()) for text in texts]
        counts = Counter(word for passage in passages for word in passage)
        wanted = [word for word in question.split() if counts[word]]
        if (variant, delta, k1) == ("bm25l", 0.0, 0.0):  # 0 / 0 where a word is absent; it adds nothing
            continue
        exact = [okapi(passages, mean, counts, wanted, passages[row], weights) for row in rows]
        np.testing.assert_allclose(found, exact, rtol=1e-5, atol=1e-6)
