"""A page as Markdown and as HTML: nothing gets in that is not in its blocks."""

import re
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from rag.report import page as pages
from rag.report.numbers import difference, number, with_interval
from rag.report.page import Bullets, Details, Heading, Paragraph, Table
from tests.report.result_folders import HOSTILE


class Reader(HTMLParser):
    """Collects tags, text and references; knows that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.references, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_html_stands_alone(output):
    text = (output / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert not {"script", "link", "iframe", "b"} & set(reader.tags)
    assert all(r.startswith(("data:image/png;base64,", "#s")) for r in reader.references)
    assert sum(r.startswith("data:") for r in reader.references) == 5
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert f"sampled, k='{HOSTILE}'" in "".join(reader.words)  # as typed, once unescaped


def test_the_html_fits_a_narrow_window(output, blocks):
    """As far as it shows without a browser: every text may wrap, and no table has many columns."""
    text = (output / "report.html").read_text()
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "overflow-wrap: anywhere" in style and "nowrap" not in style
    assert "prefers-color-scheme: dark" in style
    assert max(len(table.header) for table in all_tables(blocks)) <= 10
    numbers = re.findall(r'<td class="number">(.*?)</td>', text)
    assert max(len(part) for number in numbers for part in number.split(" ")) <= 24


def all_tables(blocks):
    for block in blocks:
        if isinstance(block, Details):
            yield from all_tables(block.blocks)
        elif isinstance(block, Table):
            yield block


def test_the_html_hides_each_query_behind_one_line(output, blocks):
    text = (output / "report.html").read_text()
    lines = re.findall(r'<details>\s*<summary dir="auto">(q[0-9]+): .*?</summary>', text)
    assert sorted(lines) == sorted(f"q{q}" for q in range(60))
    assert text.count("<details>") == text.count("</details>") == sum(isinstance(b, Details) for b in blocks)
    assert "-0.0000" not in text


@given(value=st.floats(-1e-3, 1e-3))
def test_no_number_is_minus_zero(value):
    shown = (number(value), difference(value), with_interval(value, [value, value]))
    assert not any(re.search(r"-0\.0000(?![0-9])", text) for text in shown)


@given(st.integers(1, 3), st.integers(0, 40))
def test_wide_tables_become_narrow_ones_with_the_same_cells(named, others):
    header = [str(i) for i in range(named + others)]
    parts = pages.tables(header, [[f"c{i}" for i in header]], named)
    assert all(list(part.header[:named]) == header[:named] for part in parts)
    assert all(len(part.header) <= named + 6 for part in parts)
    assert [name for part in parts for name in part.header[named:]] == header[named:]
    assert [cell for part in parts for cell in part.rows[0][named:]] == [f"c{i}" for i in header[named:]]


def test_the_markdown_says_the_same_and_names_its_pictures(output, blocks):
    text = (output / "report.md").read_text()
    names = re.findall(r"^!\[[^\]]*\]\(([^)]*)\)$", text, re.M)
    assert len(names) == 5
    assert all((output / name).is_file() for name in names)
    assert "<b>" not in text
    assert r"&lt;b&gt;bold&lt;/b&gt; \| \*x\* &amp; \$y\$ [z\](http" in text
    for block in blocks:
        if isinstance(block, Table):
            assert f"| {block.rows[0][0]}" in text.replace("**", "").replace("\\", "")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    board = lines[: 2 + 5]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in board}) == 1


def test_pictures_are_drawn(output):
    found = sorted(output.glob("*.png"))
    assert {path.stem.partition("-seals-")[2] for path in found} >= {
        "intervals",
        "pareto",
        "queries",
        "error-breakdown-f1",
    }
    for path in found:
        pixels = np.asarray(Image.open(path).convert("L"), float)
        assert min(pixels.shape) >= 200
        assert pixels.std() > 5
        assert (pixels < 128).mean() > 0.001  # there is ink
        inner = pixels[len(pixels) // 4 : -len(pixels) // 4, pixels.shape[1] // 4 : -pixels.shape[1] // 4]
        assert inner.std() > 5


@pytest.mark.parametrize(
    "text", ["# x", "- x", "+ x", "1. x", "2) x", "===", "[ ] x", "_x_ and __y__", "`x`", "~~x~~"]
)
def test_marks_are_escaped_in_markdown(text):
    from markdown_it import MarkdownIt

    tokens = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(pages.markdown([Paragraph(text)]))
    )
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert "".join(child.content for child in tokens[1].children) == text
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}


HIDDEN = "".join(map(chr, [0, 0x1B, 0x7F, 0x85, 0x202E, 0x2066]))


def test_control_characters_are_replaced_and_texts_have_their_own_direction():
    cell = Table(["name"], [[f"a{HIDDEN}b"]])
    blocks = [Heading(2, HIDDEN), Paragraph(HIDDEN), Bullets([HIDDEN]), cell, Details(HIDDEN, [])]
    for text in (pages.html("a", blocks), pages.markdown(blocks)):
        assert not any(sign in text for sign in HIDDEN)
        assert "a\ufffd\ufffd\ufffd" in text
    text = pages.html("a", blocks)
    for tag in ("h2", "p", "li", "td", "th", "summary", "a"):
        opened = re.findall(rf"<{tag} [^>]*>", text)
        assert opened and all('dir="auto"' in one for one in opened), tag
