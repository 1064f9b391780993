"""Decoding files: byte order marks, UTF-8, declared encodings and guesses."""

import pytest

from rag.ingest.load.encoding import decode
from tests.tiny_collections import load_all, write_tree


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_unicode_encodings(encoding):
    text = "naïve 東京 🤖 שלום"
    assert decode(text.encode(encoding)) == text


def test_big_endian_marks():
    assert decode(b"\xfe\xff" + "Ωmega".encode("utf-16-be")) == "Ωmega"
    assert decode(b"\x00\x00\xfe\xff" + "Ωmega".encode("utf-32-be")) == "Ωmega"


@pytest.mark.parametrize(
    "encoding, text",
    [
        ("cp1252", "café"),
        ("cp1252", "El niño comió piñas."),
        ("cp1252", "Price: 5€ – naïve résumé “£10”"),
        ("cp1250", "Zażółć gęślą jaźń"),
        ("cp1251", "Привет, как дела? Всё хорошо."),
        ("koi8_r", "Привет, как дела? Всё хорошо."),
        ("cp932", "東京は日本の首都です。人口は多い。"),
        ("euc_jp", "東京は日本の首都です。"),
        ("gbk", "中国的首都是北京。人口很多"),
        ("big5", "台灣的首都是台北，人口很多。"),
        ("euc_kr", "서울은 한국의 수도입니다"),
    ],
)
def test_legacy_encodings_are_guessed(encoding, text):
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize("shift", range(4))
@pytest.mark.parametrize(
    ("encoding", "text"),
    [
        ("cp932", "東京は日本の首都です。人口は多い。"),
        ("gb18030", "中国的首都是北京。人口很多"),
        ("euc_kr", "서울은한국의수도입니다"),
        ("cp1251", "Привет, как дела? Всё хорошо."),
    ],
)
def test_of_a_long_text_a_sample_tells_the_encoding(encoding, text, shift):
    """The sample may end within a character of two or four bytes, without a line end near it."""
    text = "x" * shift + text * 5_000
    assert decode(text.encode(encoding)) == text


def test_the_sample_is_taken_where_the_encoding_shows():
    text = "All of this is plain. " * 50_000 + "Le café était déjà fermé. " + "And so is this. " * 50_000
    assert decode(text.encode("cp1252")) == text


def test_a_text_that_turns_to_noise_after_the_sample_is_not_read_half(tmp_path):
    noise = bytes(range(128, 256)) * 3 + b"\x81\x8d\x90\x9d\xff\xfe" * 40
    write_tree(tmp_path, x_txt="El niño comió piñas. ".encode("cp1252") * 10_000 + noise * 1000)
    documents, reasons = load_all(tmp_path)
    assert documents or "encoding" in reasons["x.txt"]


def test_a_page_may_declare_its_encoding(tmp_path):
    page = '<meta http-equiv="Content-Type" content="text/html; charset={}"><p>{}</p>'
    write_tree(
        tmp_path,
        hebrew_html=page.format("windows-1255", "שלום עולם").encode("cp1255"),
        latin_html=page.format("iso-8859-1", "“naïve”").encode("cp1252"),  # what browsers make of that label
        wrong_html=page.format("iso-8859-1", "naïve 東京").encode(
            "utf-8"
        ),  # the bytes are believed, not the label
        unknown_html=page.format("x-no-such-code", "naïve café").encode("cp1252"),
        codec_html=page.format("base64", "naïve café").encode("cp1252"),
    )
    documents, _ = load_all(tmp_path)
    assert {d.id: d.text for d in documents.values()} == {
        "codec.html": "naïve café",
        "hebrew.html": "שלום עולם",
        "latin.html": "“naïve”",
        "unknown.html": "naïve café",
        "wrong.html": "naïve 東京",
    }


@pytest.mark.parametrize(
    "declared", ["utf-16", "UTF-16LE", "unicode_escape", "idna", "rot13", "base64", "nonsense"]
)
def test_what_a_page_may_not_declare_is_not_believed(declared):
    """Python knows encodings that no page may declare; a page that says UTF-16 in ASCII letters is not in UTF-16."""
    assert decode("Ein Café, ein \\x41.".encode("cp1252"), declared) == "Ein Café, ein \\x41."
