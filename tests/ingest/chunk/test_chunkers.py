"""Every chunker holds the guarantees of the protocol, on texts and tokenizers made to break them."""

import re
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rag.ingest.chunk import split as split_module
from rag.ingest.chunk.fixed import FixedChunker
from rag.ingest.chunk.markdown import MarkdownChunker
from rag.ingest.chunk.recursive import RecursiveChunker
from rag.ingest.chunk.semantic import SemanticChunker
from rag.ingest.chunk.sentence import SentenceChunker
from rag.ingest.chunk.sliding import SlidingWindowChunker
from rag.ingest.chunk.split import chunks_of
from rag.ingest.chunk.whole import WholeChunker
from rag.types import Document, UserError


def as_spans(pairs):
    return np.array(pairs, np.int64).reshape(-1, 2)


def words(text):
    """Return spans like those of a word tokenizer: white space belongs to no token."""
    return as_spans([match.span() for match in re.finditer(r"\S+", text)])


def pieces(text):
    """Return spans like those of WordPiece: up to three letters a token, other characters alone, marks in none."""
    return as_spans([m.span() for m in re.finditer(r"[^\W_]{1,3}|[^\w\s\u200d\u0301\ufffd]", text)])


def bytes_of(text):
    """Return spans like those of byte-level BPE: the space before belongs to a token; long characters are several."""
    spans = []
    for match in re.finditer(r"\s?[a-zA-Z]+|\s?[^a-zA-Z]", text):
        sign = match[0][-1].encode("utf-8", "replace")
        spans += [match.span()] * len(sign)
    return as_spans(spans)


def split_on_spaces(text):
    """Return spans like those of the bag of words: the text between spaces, so a token can cross a line break."""
    return as_spans([match.span() for match in re.finditer("[^ ]+", text)])


TOKENISERS = [words, pieces, bytes_of, split_on_spaces]
# fmt: off
PARTS = [
    "word ", "Two words. ", "a", "\n", "\n\n", "# Head\n", "- item\n", ". ", "?! ", "e.g. ", "3.14 ",
    "Dr. No ", "\t", "🤖", "👩\u200d👧 ", "e\u0301 ", "東京は首都。", "שלום ", "مرحبا. ",
    "\u200d", "\ufffd", "| a | b |\n", "x" * 30, "   ",
]
# fmt: on
TEXTS = st.lists(st.sampled_from(PARTS), max_size=40).map("".join)
SIZES = st.integers(1, 12).flatmap(lambda size: st.tuples(st.just(size), st.integers(0, size - 1)))


def sliding(size, overlap):
    return SlidingWindowChunker(sentences=3, stride=2, size=size)


def semantic(size, overlap):
    return SemanticChunker(size, percentile=60.0, window=1)


WITH_OVERLAP = [FixedChunker, SentenceChunker, RecursiveChunker, MarkdownChunker]
CHUNKERS = st.sampled_from([*WITH_OVERLAP, sliding, semantic])
OVERLAPS = {SlidingWindowChunker: 10**9, SemanticChunker: 0}  # of those without the option


def encode(texts):
    """Return unit vectors that differ between texts: how often each of eight kinds of characters occurs."""
    counts = [np.bincount([ord(sign) % 8 for sign in text] or [0], minlength=8) for text in texts]
    vectors = np.array(counts, np.float32) + 1e-3
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def tokens_inside(spans, start, end):
    return int(((spans[:, 0] >= start) & (spans[:, 1] <= end)).sum())


@given(TEXTS | st.text(max_size=60), CHUNKERS, SIZES, st.sampled_from(TOKENISERS))
@example("🤖" * 3, SentenceChunker, (1, 0), bytes_of)
@example("a\nb c", SentenceChunker, (1, 0), split_on_spaces)
def test_what_every_chunker_promises(text, make, sizes, tokenise):
    chunker, spans = make(*sizes), tokenise(text)
    chunks = chunker.split(text, tokenise, encode)
    covered = np.zeros(len(text), bool)
    for start, end in chunks:
        assert 0 <= start < end <= len(text)
        assert text[start:end] == text[start:end].strip() != ""
        covered[start:end] = True
        one_sign = len(np.unique(spans[(spans[:, 0] >= start) & (spans[:, 1] <= end)], axis=0)) <= 1
        assert tokens_inside(spans, start, end) <= chunker.size or one_sign
    assert all(sign.isspace() or seen for sign, seen in zip(text, covered, strict=True))
    for (start, end), (next_start, next_end) in pairwise(chunks):
        assert start < next_start and end < next_end
        allowed = chunker.overlap if hasattr(chunker, "overlap") else OVERLAPS[type(chunker)]
        assert tokens_inside(spans, next_start, end) <= allowed


@given(TEXTS, st.sampled_from([*WITH_OVERLAP, sliding]), st.sampled_from(TOKENISERS))
def test_chunks_of_a_document_are_its_text(text, make, tokenise):
    chunker = make(5, 2)
    document = Document(id="a/b.md", path="a/b.md", text=text)
    chunks = chunks_of(document, chunker, tokenise)
    assert [(c.start, c.end) for c in chunks] == chunker.split(text, tokenise)
    for chunk in chunks:
        assert chunk.text == text[chunk.start : chunk.end]
        assert (chunk.document_id, chunk.path) == ("a/b.md", "a/b.md")
        assert chunk.id == f"a/b.md:{chunk.start}-{chunk.end}"
    assert len({chunk.id for chunk in chunks}) == len(chunks)


@given(st.integers(0, 60), SIZES)
def test_fixed_chunks_have_exactly_the_size_and_the_overlap(length, sizes):
    size, overlap = sizes
    text = " ".join(f"w{i}" for i in range(length))
    chunks = [text[a:b].split() for a, b in FixedChunker(size, overlap).split(text, words)]
    assert all(len(chunk) == size for chunk in chunks[:-1])
    assert all(a[len(a) - overlap :] == b[:overlap] for a, b in pairwise(chunks))
    assert len(chunks) == (0 if not length else max(0, -(-(length - size) // (size - overlap))) + 1)


def split(chunker, text, tokenise=words):
    return [text[start:end] for start, end in chunker.split(text, tokenise)]


def test_sentence_chunks_hold_whole_sentences_and_repeat_whole_sentences():
    text = "One two three. Four five. Six seven eight. Nine. Ten eleven."
    assert split(SentenceChunker(5), text) == [
        "One two three. Four five.",
        "Six seven eight. Nine.",
        "Ten eleven.",
    ]
    assert split(SentenceChunker(5, 2), text) == [
        "One two three. Four five.",
        "Four five. Six seven eight.",
        "Nine. Ten eleven.",
    ]


def test_a_sentence_above_the_size_is_divided_at_lines_then_words_then_tokens():
    assert split(SentenceChunker(2), "Go. One two\nthree four five. Six") == [
        "Go.",
        "One two",
        "three four",
        "five. Six",
    ]
    assert split(SentenceChunker(3), "abcdefghijklmno", pieces) == ["abcdefghi", "jklmno"]


def test_recursive_chunks_keep_to_paragraphs_then_lines_then_words():
    text = "a b c\n\nd e\n\nf g h i j\nk l\nm n o p q r s t\n\nu"
    assert split(RecursiveChunker(5), text) == ["a b c\n\nd e", "f g h i j", "k l", "m n o p q", "r s t", "u"]
    assert split(RecursiveChunker(100), text) == [text]


def test_recursive_separators_are_a_choice():
    text = "intro\n## One\na b\n## Two\nc d, e f"
    by_heading = RecursiveChunker(4, 0, ("\n## ", ", "))
    assert split(by_heading, text) == ["intro", "## One\na b", "## Two\nc d,", "e f"]
    assert hash(RecursiveChunker(4, 0, ["\n", " "])) == hash(RecursiveChunker(4, 0, ("\n", " ")))


@pytest.mark.parametrize("make", WITH_OVERLAP)
@pytest.mark.parametrize(
    "size, overlap, named",
    [(0, 0, "size"), (-5, 0, "size"), (4, 4, "overlap"), (4, 9, "overlap"), (4, -1, "overlap")],
)
def test_impossible_sizes_are_errors_that_name_the_option(make, size, overlap, named):
    value = size if named == "size" else overlap
    with pytest.raises(UserError, match=rf"{named}={value} .* must be|{named} must be .* not {value}"):
        make(size, overlap)


@pytest.mark.parametrize("separators", [("", " "), ["\n", ""]])
def test_an_empty_separator_is_an_error(separators):
    with pytest.raises(UserError, match=r"separators=.* of which each is text that is not empty"):
        RecursiveChunker(4, 0, separators)


@pytest.mark.parametrize("text", ["", " \n\t "])
@pytest.mark.parametrize("make", [*WITH_OVERLAP, sliding, semantic, lambda size, overlap: WholeChunker()])
def test_no_text_no_chunks(make, text):
    assert make(3, 0).split(text, words, encode) == []
    assert chunks_of(Document(id="e", path="e", text=text), FixedChunker(3), words) == []


def test_a_document_is_tokenised_once():
    calls = []

    def counting(text):
        calls.append(text)
        return words(text)

    text = "One two three. " * 50
    for make in (*WITH_OVERLAP, sliding, semantic):
        make(4, 1).split(text, counting, encode)
    assert calls == [text] * 6


@pytest.mark.parametrize("unit", [". ", "|", "a", "\n|", "\n\n", "# \n", "```\n", "1. ", "。"])
@pytest.mark.parametrize("make", [*WITH_OVERLAP, sliding])
def test_long_runs_are_linear(make, unit):
    text = unit * (2000 // len(unit)) + "x"  # a quadratic pattern would not come back
    assert make(64, 8).split(text, words)[-1][1] == len(text)


# --- sliding windows


def test_windows_have_as_many_sentences_whatever_their_length():
    text = "One. Two two. Three three three. Four. Five five. Six. Seven."
    assert split(SlidingWindowChunker(3, 2, size=100), text) == [
        "One. Two two. Three three three.",
        "Three three three. Four. Five five.",
        "Five five. Six. Seven.",
    ]
    assert split(SlidingWindowChunker(2, 2, size=100), text) == [
        "One. Two two.",
        "Three three three. Four.",
        "Five five. Six.",
        "Seven.",
    ]


def test_a_window_above_the_size_ends_earlier_and_leaves_nothing_out():
    text = "One. Two two. Three three three. Four. Five five. Six. Seven."
    assert split(SlidingWindowChunker(4, 3, size=4), text) == [
        "One. Two two.",
        "Three three three. Four.",
        "Five five. Six. Seven.",
    ]
    assert split(SlidingWindowChunker(3, 1, size=5), text)[:3] == [
        "One. Two two.",
        "Two two. Three three three.",
        "Three three three. Four.",
    ]


def test_a_sentence_above_the_size_is_as_many_as_its_chunks():
    text = "One. Two two. " + " ".join(f"W{i}" for i in range(10)) + ". End."
    assert split(SlidingWindowChunker(2, 1, size=4), text) == [
        "One. Two two.",
        "W0 W1 W2 W3",
        "W4 W5 W6 W7",
        "W8 W9. End.",
    ]


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"sentences": 0}, "sentences"),
        ({"stride": 0}, "stride"),
        ({"stride": 6}, "stride"),
        ({"size": 0}, "size"),
    ],
)
def test_impossible_windows_are_errors(options, named):
    with pytest.raises(UserError, match=f"{named}.* must be a whole number"):
        SlidingWindowChunker(**options)


# --- degenerate texts


@pytest.mark.parametrize(
    "text", ["🌊" * 50, "e\u0301" * 40, "שלום " * 30, "\u200d" * 9, "\ufffd", "a", "x" * 999]
)
@pytest.mark.parametrize("make", [*WITH_OVERLAP, sliding, semantic])
def test_texts_without_words_are_chunked(make, text):
    chunks = make(4, 0).split(text, bytes_of, encode)
    assert (chunks[0][0], chunks[-1][1]) == (0, len(text.rstrip()))
    assert all(not text[end:start].strip() for (_, end), (start, _) in pairwise(chunks))


def test_a_chunker_keeps_a_tokenizer_without_tokens_whole():
    def none(text):
        return as_spans([])

    for make in (SentenceChunker, RecursiveChunker, MarkdownChunker):
        assert make(4, 0).split("no token here", none) == [(0, 13)]


# --- long texts, divided block by block -------------------------------------------------------------------------


@pytest.mark.parametrize("tokeniser", TOKENISERS)
@given(text=TEXTS, block=st.integers(1, 60))
@example(text="東京は首都。" * 10 + "x" * 50, block=7)
def test_a_text_longer_than_a_block_is_divided_as_others_are(tokeniser, text, block):
    document = Document("d", "d", text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(split_module, "_BLOCK", block)
        made = chunks_of(document, SentenceChunker(6, 2), tokeniser)
        whole = chunks_of(document, WholeChunker(), tokeniser)
    assert all(c.text == text[c.start : c.end] and 0 < len(c.text) <= block for c in made)
    assert all(a.start < b.start and a.end < b.end for a, b in pairwise(made))
    inside = {position for c in made for position in range(c.start, c.end)}
    assert all(position in inside for position, sign in enumerate(text) if not sign.isspace())
    assert whole == chunks_of(document, WholeChunker(), tokeniser)
    if len(text) <= block:
        assert made == chunks_of(document, SentenceChunker(6, 2), tokeniser)


def test_a_block_ends_where_a_paragraph_a_line_or_a_word_does(monkeypatch):
    monkeypatch.setattr(split_module, "_BLOCK", 20)
    texts = ["one two three\n\nfour five six", "one two three\nfour five six", "one two threefour five six"]
    ends = [chunks_of(Document("d", "d", text), FixedChunker(50), words)[0].text for text in texts]
    assert ends == ["one two three", "one two three", "one two threefour"]
