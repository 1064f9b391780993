"""Markdown is divided at its headings, and elsewhere only where it must be."""

import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.ingest.chunk.markdown import MarkdownChunker, sections


def words(text):
    return np.array([match.span() for match in re.finditer(r"\S+", text)], np.int64).reshape(-1, 2)


@pytest.mark.parametrize(
    "marked",  # a section begins after each ¦
    [
        "Before any.\n\n¦# One\nText. More.\n\n¦## Two\nText.",
        "no heading\nat all",
        "¦# Alone",
        "¦# One\n\n## Two\n\n### Three\ntext\n¦## Four",  # headings without text of their own
        "¦Title\n=====\ntext\n\n¦Next\n---\ntext",
        "a paragraph of\ntwo lines\n---\ntext",  # a rule, not a heading's line
        "text\n\n---\n\nmore",
        "- item\n---\nmore\n\n| a | b |\n---\nc",
        "a | b\n--- | ---\nc | d",
        "#no space\n#hashtag and #1",
        "text\n¦#\ntext\n¦###### six\ntext\n####### seven",
        "    # code\ntext\n   ¦# three spaces\ntext",
        "¦# One\n```sh\n# a comment\n```\ntext\n¦# Two\ntext",
        "¦# One\n~~~~\n# a\n~~~\n# b\n~~~~\n¦# Two",  # closed by as many of the same sign
        "¦# One\n```\n# a\n~~~\n# b\n``` no\n# c",  # never closed
        "¦# One\n``` a`b\ntext\n¦# Two",  # a code span, not a fence
        "¦# One\r\ntext\r\n¦# Two\r\ntext",
        "¦# 東京\n首都。\n¦## 🌊\n波。",
    ],
)
def test_sections_begin_at_headings(marked):
    text = marked.replace("¦", "")
    found = [text[start:end] for start, end in sections(text)]
    assert found == [part.strip() for part in marked.split("¦") if part.strip()]


def split(text, size, overlap=0):
    return [text[start:end] for start, end in MarkdownChunker(size, overlap).split(text, words)]


def test_a_section_above_the_size_is_divided_at_sentences_and_none_is_filled_from_the_next():
    text = "# One\n\nTwo three. Four five six. Seven.\n\n# Eight\n\nNine. Ten."
    assert split(text, 100) == ["# One\n\nTwo three. Four five six. Seven.", "# Eight\n\nNine. Ten."]
    assert split(text, 5) == ["# One\n\nTwo three.", "Four five six. Seven.", "# Eight\n\nNine. Ten."]
    assert split(text, 5, 1) == ["# One\n\nTwo three.", "Four five six. Seven.", "# Eight\n\nNine. Ten."]
    assert split(text, 4, 1)[1:3] == ["Four five six. Seven.", "# Eight\n\nNine. Ten."]


def test_fenced_code_stays_in_one_piece_or_is_divided_at_lines():
    code = "```\na = 1. Then b.\nc = 2\n```"
    text = f"# One\n\nRun this:\n\n{code}\n\nDone."
    assert split(text, 10) == ["# One\n\nRun this:", code, "Done."]
    assert split(text, 5) == ["# One\n\nRun this:\n\n```", "a = 1. Then b.", "c = 2\n```\n\nDone."]


PARTS = [
    "# H\n",
    "## H2\n\n",
    "word word. ",
    "\n",
    "\n\n",
    "```\n",
    "~~~\n",
    "Title\n===\n",
    "x\n---\n",
    "- a\n",
    "🌊 ",
]


@given(st.lists(st.sampled_from(PARTS), max_size=30).map("".join), st.integers(1, 12))
def test_no_chunk_crosses_a_section(text, size):
    spans = sections(text)
    assert "".join("".join(text[a:b].split()) for a, b in spans) == "".join(text.split())
    for start, end in MarkdownChunker(size).split(text, words):
        assert sum(a <= start and end <= b for a, b in spans) == 1


@pytest.mark.parametrize(
    "unit", ["# \n", "```\n", "x\n---\n", "x\ny\n---\n", "`", "~~~~\n~~~\n", "#", " #\n", "---\n"]
)
def test_long_runs_are_linear(unit):
    text = unit * (60_000 // len(unit)) + "x"  # a quadratic scan would not come back
    assert sections(text)[-1][1] == len(text)
