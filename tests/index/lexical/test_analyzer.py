"""Text to terms: splitting, stop words, stemming, and ids that agree with the terms."""

import re

import numpy as np
import pytest

from rag.index.lexical.analyzer import ENGLISH_STOP_WORDS, WORDS, Analyzer
from rag.runtime.cache.keys import content_key
from rag.types import UserError

TEXTS = (
    "The quick brown foxes are jumping over the LAZY dog's back.",
    "",
    "of the and",
    "Déjà vu: naïve Straße, ﬁne — ΣΊΣΥΦΟΣ ; 3.14 x y_z __init__",
    "emoji 🦊🦊 family 👨‍👩‍👧 flags 🇫🇷 and text",
    "JAX入門は楽しい。犬 と ネコ、ｶﾀｶﾅ 한국어",
    "half a pair \ud83d of surrogates \x00 and a null",
)


def test_words_are_those_of_the_pattern():
    plain = Analyzer(stop_words=None)
    for text in TEXTS:
        assert plain.tokens(text) == re.findall(r"(?u)\b\w\w+\b", text.lower())


def test_stop_words_and_lower_case():
    assert Analyzer().tokens(TEXTS[0]) == "quick brown foxes jumping over lazy dog back".split()
    assert Analyzer().tokens("of the AND") == []
    assert Analyzer(stop_words=("Quick", "fox")).tokens("The quick fox") == ["the"]
    assert len(set(ENGLISH_STOP_WORDS)) == 33


def test_stop_words_go_before_stems():
    analyzer = Analyzer(stemmer="english", stop_words=["jumping"])
    assert analyzer.tokens("Jumping foxes jumped; generously generated relations") == [
        "fox",
        "jump",
        "generous",
        "generat",
        "relat",
    ]


def test_another_language():
    assert Analyzer(stemmer="german", stop_words=None).tokens("Häuser laufen") == ["haus", "lauf"]


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        (0, ["jax入門は楽しい", "ネコ", "ｶﾀｶﾅ", "한국어"]),
        (1, [*"jax 入 門 は 楽 し い 犬 と ネ コ ｶ ﾀ ｶ ﾅ 한국어".split()]),
        (2, "jax 入門 門は は楽 楽し しい 犬 と ネコ ｶﾀ ﾀｶ ｶﾅ 한국어".split()),
    ],
)
def test_scripts_without_spaces(size, wanted):
    assert Analyzer(cjk=size).tokens(TEXTS[5]) == wanted


def test_a_pattern_of_ones_own():
    assert Analyzer(pattern=r"\S+", stop_words=None).tokens("C++ and C#") == ["c++", "and", "c#"]


@pytest.mark.parametrize(
    "analyzer",
    [
        Analyzer(),
        Analyzer(stop_words=None),
        Analyzer(stemmer="english"),
        Analyzer(cjk=2, stop_words=["入門"]),
        Analyzer(pattern=r"\w"),
    ],
    ids=["default", "no stop words", "stemmed", "cjk", "letters"],
)
def test_ids_stand_for_the_tokens(analyzer, monkeypatch):
    monkeypatch.setattr("rag.index.lexical.analyzer._BATCH", 5)  # several blocks
    vocabulary = {"fox": 0}
    ids, lengths = analyzer.encode(iter(TEXTS), vocabulary)
    terms = list(vocabulary)
    wanted = [analyzer.tokens(text) for text in TEXTS]
    assert [terms[i] for i in ids] == [token for tokens in wanted for token in tokens]
    assert lengths.tolist() == [len(tokens) for tokens in wanted]
    assert list(vocabulary.values()) == list(range(len(terms)))
    assert set(terms) == {"fox", *(token for tokens in wanted for token in tokens)}
    assert (ids.dtype, lengths.dtype) == (np.int32, np.int32)


def test_no_texts():
    ids, lengths = Analyzer().encode([], {})
    assert ids.shape == lengths.shape == (0,)


def test_equal_settings_are_one_key():
    one, other = Analyzer(stop_words=["a", "b"]), Analyzer(stop_words=("a", "b"))
    assert one == other
    assert hash(one) == hash(other)
    one.tokens("its caches are not among its options")
    assert content_key(one) == content_key(other) != content_key(Analyzer())


@pytest.mark.parametrize(
    ("settings", "wanted"),
    [
        ({"stemmer": "klingon"}, r"no stemmer 'klingon'.*english"),
        ({"stop_words": "german"}, r"stop_words=german .* english, null or a list"),
        ({"pattern": "("}, r"no regular expression"),
        ({"pattern": r"(\w+)"}, r"has a group"),
        ({"pattern": r"\w*"}, r"matches nothing"),
        ({"cjk": -1}, r"cjk=-1"),
    ],
)
def test_bad_settings_are_named(settings, wanted):
    with pytest.raises(UserError, match=wanted):
        Analyzer(**settings)


def test_the_default_pattern_is_the_peers():
    assert Analyzer().pattern == WORDS == r"(?u)\b\w\w+\b"
