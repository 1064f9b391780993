"""Text of HTML pages; time and memory stay linear for hostile pages."""

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.ingest.clean import clean
from rag.ingest.load.encoding import UnreadableFile
from rag.ingest.load.html import html_text


def text_of(html: str) -> str:
    return clean(html_text(html)[0])


def test_a_page_keeps_headings_lists_and_tables_readable():
    page = """<!DOCTYPE html><html><head><title>T</title><style>p{}</style></head><body>
      <nav><ul><li><a href="/">Home</a></li></ul></nav>
      <h1>Water  <em>heaters</em></h1>
      <p>A tank holds
         hot&nbsp;water.<br>Second line.</p>
      <ul><li><p>one</p></li><li>two <b>bold</b><ol><li>inner</li><li>next</li></ol></li><li></li></ul>
      <table><caption>Sizes</caption><thead><tr><th>Litres</th><th>People</th></tr></thead>
        <tr><td><p>50</p></td><td></td><td>one</td></tr><tr><td></td><td>two</td></tr></table>
      <pre>  x = 1
    y</pre>
      <script>var a = "</p>";</script><p hidden>no</p><p aria-hidden="true">no</p>After<!-- no -->wards.
      <dl><dt>term</dt><dd>meaning</dd></dl></body></html>"""
    assert text_of(page) == "\n".join(
        [
            "# Water heaters", "",
            "A tank holds hot water.", "Second line.", "",
            "- one", "- two bold", "  1. inner", "  2. next", "",
            "Sizes", "Litres | People", "50 |  | one", " | two", "",
            "  x = 1", "    y", "",
            "Afterwards.", "",
            "term", "meaning",
        ]
    )  # fmt: skip


@pytest.mark.parametrize(
    "page, text",
    [
        ("plain text", "plain text"),
        ("<p>a<p>b<li>c", "a\n\nb\n\n- c"),
        ("<p>a</p></body></html><p>after the end</p>", "a\n\nafter the end"),
        ("<?xml version='1.0' encoding='latin-1'?><html><body><p>café</p></body></html>", "café"),
        ("<b>a</b> <i>b</i><u>c</u>", "a bc"),
        ("a<br><br><br>b", "a\n\nb"),
        ("<h2></h2><p>no empty heading</p>", "no empty heading"),
        ("<ol><li>a</li></ol><ol><li>b</li></ol>", "1. a\n\n1. b"),
        ("x &amp; y &lt;z&gt; &#x1F916; &nosuch;", "x & y <z> 🤖 &nosuch;"),
        ("<p>&#xD800;&#0;</p>", "\ufffd\ufffd"),
        (
            "<table><tr><td>a<table><tr><td>b</td><td>c</td></tr></table></td><td>d</td></tr></table>",
            "a\n\nb | c | d",
        ),
        ("<p>مرحبا <b>بالعالم</b></p>", "مرحبا بالعالم"),
        ("", ""),
        ("<!-- only a comment -->", ""),
        ("<noscript>x</noscript><template>y</template><svg><text>z</text></svg>", ""),
    ],
)
def test_html_corners(page, text):
    assert text_of(page) == text


def test_nesting_up_to_the_parsers_limit_is_read_and_beyond_it_named():
    assert text_of("<div>" * 1500 + "deep" + "</div>" * 1500) == "deep"
    with pytest.raises(UnreadableFile, match=r"nested more than 2,048 deep: save its text as a \.txt file"):
        html_text("<div>" * 5000 + "deep")


def test_deep_lists_are_not_most_of_the_text():
    """Unlimited indentation of two spaces a level would make gigabytes of a megabyte."""
    page = "<ul>" * 1000 + "<li>a" * 2000
    assert len(text_of(page)) < 50 * 2000
    page = ("<ul><li>" * 500 + "a" + "</li></ul>" * 500) * 4
    assert len(text_of(page)) < 3 * len(page)


@pytest.mark.parametrize(
    "page",
    [
        "<" * 50_000,
        "&" * 50_000,
        "<!--" * 250_000,
        "<a " + "x=1 " * 250_000,
        "<b " + " ".join(f"x{i}=1" for i in range(100_000)),
        "<table><tr>" + "<td>" * 5_000,
        "<ol" * 2_000_001,
        "<a b='" + "c" * 1_000_000,
        "<p>" + "<!-- open" + "x" * 1_000_000,
        "<script>" * 20_000,
        "</p>" * 5_000,
        "<table>" * 20_000,
        "<a>" * 5_000,
        "<![CDATA[" * 100_000,
        "&#x41;" * 20_000,
        "<?xml " * 20_000,
        "<!DOCTYPE r ["
        + "".join(f'<!ENTITY e{i + 1} "{f"&e{i};" * 10}">' for i in range(9))
        + "]><p>&e9;</p>",
    ],
    ids=lambda page: page[:12],
)
def test_odd_pages_end(page):
    begin = time.monotonic()
    try:
        text, _ = html_text(page)
    except UnreadableFile:
        text = ""
    assert len(text) <= 2 * len(page)
    assert time.monotonic() - begin < 30  # each takes about a second


@pytest.mark.parametrize(
    "unit", ["<p>a", "<li>", "<td>x", "<ul>", "a ", "<b>", "&", "<", "<br>", "<h1></h1>", "</body>"]
)
def test_large_pages_are_linear(unit):
    try:
        text, _ = html_text(unit * 8_000)
    except UnreadableFile:
        assert unit in ("<li>", "<td>x", "<ul>", "<b>"), "only what nests may be too deep"
    else:
        assert len(text) <= 32_000


@given(st.text(st.sampled_from("<>/ap'\"=!-& \n\t;#x0bliuotrdh1é🤖\u05d0"), max_size=80))
def test_no_markup_is_fatal(page):
    text, title = html_text(page)
    assert text.encode("utf-8") is not None and isinstance(title, str)


@pytest.mark.parametrize("tag", ["nav", "button", "select", "video", "svg", "object", "canvas", "audio"])
def test_an_element_that_never_ends_does_not_hide_the_rest_of_the_page(tag):
    assert html_text(f"<p>Intro.</p><{tag} a=b>Menu<p>The rest.")[0].split() == [
        "Intro.",
        "Menu",
        "The",
        "rest.",
    ]
    closed = f"<p>Intro.</p><{tag.upper()}>Menu</{tag}><p>The rest."
    assert html_text(closed)[0].split() == ["Intro.", "The", "rest."]
    assert html_text("<svg/><p>Shown.<svg>x</svg>")[0] == "Shown."
