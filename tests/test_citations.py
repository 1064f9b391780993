"""Citations in answers, and the lines, heading and excerpt by which a user finds a source."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.citations import KnownCitations, cited, excerpt, locate
from rag.ingest.load.html import load_html
from rag.types import Context, Source

HANDBOOK = """# Harbour

Ships come in.

## Boats and C#

```
# no heading
```

Use oars. Row well.
Come back.

Ice
---

It is cold.
"""


@pytest.mark.parametrize(
    "answer, numbers",
    [
        ("It is so [1].", (1,)),
        ("Both [1, 3], and [1][2]; see [2;3].", (1, 3, 2)),
        ("[ 2 ] [3 ,1]", (2, 3, 1)),
        ("Nothing [0], [4], [-1], [1.5], [a], [], 1 and (2).", ()),
        ("[2, 9]", (2,)),
        ("no marker", ()),
        ("", ()),
        ("[" + "9" * 10_000 + "]", ()),
        ("[" * 10_000 + "1" + "]" * 10_000, (1,)),
        ("[" + "1, " * 10_000, ()),
        ("اقرأ [1] 🤖[3]", (1, 3)),
    ],
)
def test_cited(answer, numbers):
    sources = tuple(Source(n, "p", 0, 1, 1.0, text) for n, text in enumerate("abc", 1))
    assert cited(answer, Context(sources, tokens=3)) == numbers


def located(text, phrase):
    start = text.index(phrase)
    return locate(Source(1, "a.md", start, start + len(phrase), 1.0, phrase), text)


@pytest.mark.parametrize(
    ("phrase", "first", "last", "heading"),
    [
        ("Ships come in.", 3, 3, "Harbour"),
        ("# Harbour\n\nShips come in.", 1, 3, "Harbour"),
        ("Row well.\nCome back.", 11, 12, "Boats and C#"),
        ("Come back.\n\nIce\n---\n\nIt is cold.", 12, 17, "Boats and C#"),
        ("Ice\n---\n\nIt is cold.", 14, 17, "Ice"),
        ("It is cold.", 17, 17, "Ice"),
    ],
)
def test_a_source_has_its_lines_and_its_heading(phrase, first, last, heading):
    source = located(HANDBOOK, phrase)
    assert (source.first_line, source.last_line, source.heading) == (first, last, heading)
    assert "\n".join(HANDBOOK.split("\n")[first - 1 : last]).endswith(source.text)


def test_headings_of_html_are_found():
    text, _ = load_html(b"<h1>Zoo</h1><p>Open daily.</p><h2>Seals</h2><p>They sleep.</p>")
    assert located(text, "They sleep.").heading == "Seals"
    assert located(text, "Open daily.").heading == "Zoo"


def test_a_heading_far_above_is_not_searched_for():
    for paragraphs, heading in ((10, "Far"), (10_000, "")):
        text = "# Far\n\n" + "A paragraph.\n\n" * paragraphs + "The end."
        source = located(text, "The end.")
        assert (source.heading, source.first_line) == (heading, 3 + 2 * paragraphs)


@given(st.text("ab#=- \n", max_size=60), st.data())
def test_lines_and_headings_of_any_span(text, data):
    start = data.draw(st.integers(0, len(text)))
    end = data.draw(st.integers(start, len(text)))
    source = locate(Source(1, "a", start, end, 1.0, text[start:end]), text)
    assert source.first_line == len(text[:start].split("\n"))
    assert source.last_line == len(text[:end].split("\n"))
    assert source.heading in text[:end] and "\n" not in source.heading


@pytest.mark.parametrize(
    ("phrase", "expected"),
    [
        ("# Harbour\n\nShips come in.", "Ships come in."),
        ("Ice\n---\n\nIt is cold.", "It is cold."),
        ("Row well.\nCome back.", "Row well. Come back."),
        ("# Harbour", "# Harbour"),
    ],
)
def test_an_excerpt_is_one_line_without_the_heading(phrase, expected):
    assert excerpt(located(HANDBOOK, phrase)) == expected


@given(st.text("ab \n東", max_size=60), st.integers(1, 30))
def test_an_excerpt_fits_its_width(text, width):
    line = excerpt(Source(1, "a", 0, len(text), 1.0, text), width)
    assert len(line) <= width and "\n" not in line
    assert " ".join(text.split()).startswith(line.removesuffix("…"))


THREE = Context(tuple(Source(n, "a.md", 0, 1, 1.0, "x") for n in (1, 2, 3)), tokens=0)


def with_known_citations(*pieces):
    text = KnownCitations(THREE)
    return "".join([*map(text.push, pieces), text.finish()])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("It is red [1]. It is blue [2, 3]. [1][2] ", None),
        ("It is red [4]. It is blue [2, 7].", "It is red. It is blue [2]."),
        ("It is red. [4]\n\n[5] [6]\n[7] It is blue.[0]", "It is red.\n\nIt is blue."),
        ("Hi:\n\n[4]\n\n[5]\n \n\n[6]\n\n", "Hi:\n\n"),
        ("[1]\n\n\n[2]\n \n[3]\n", None),
        ("  [12] It is [ 9;8 ] red", "It is red"),
        ("Take x[4], f(x[10]) or [12345], [a], [1.5], [] and [", None),
        ("Write `x = [7]` so:\n```python\nx = [7, 8]\n```\n[1]", None),
        (" \n [", None),
    ],
)
def test_marks_of_no_source_are_left_out(text, expected):
    for pieces in ((text,), tuple(text)):
        assert with_known_citations(*pieces) == (text if expected is None else expected)


@given(
    st.lists(
        st.sampled_from(["[", "]", "1", "7", ", ", ";", " ", "\n", "```", "`", "a", "[1]", "[7]", "[1, 7]"]),
        max_size=14,
    ),
    st.lists(st.integers(0, 40), max_size=5),
)
def test_the_text_with_known_citations_does_not_depend_on_its_pieces(parts, cuts):
    text = "".join(parts)
    cuts = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    whole = with_known_citations(text)
    assert with_known_citations(*(text[a:b] for a, b in pairwise(cuts))) == whole
    assert set(cited(text, THREE)) <= set(cited(whole, THREE))
