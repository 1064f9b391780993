"""Walking folders, telling encodings, and reading HTML, Markdown and plain text; nothing in a folder is
fatal."""

import os
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.ingest.html import HtmlError, html_text
from rag.ingest.load import Skipped, decode, load_folder
from rag.types import Document, UserError


def write(folder, **files):
    """Write files, named with `__` for `/` and `_` for the last dot."""
    for name, content in files.items():
        stem, _, suffix = name.rpartition("_")
        path = folder / f"{stem.replace('__', '/')}.{suffix}"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())


def load(path, **options):
    found = list(load_folder(path, **options))
    documents = {d.id: d for d in found if isinstance(d, Document)}
    reasons = {s.path: s.reason for s in found if isinstance(s, Skipped)}
    assert len(documents) + len(reasons) == len(found), "a name came twice"
    return documents, reasons


def text_of(html):
    from rag.ingest.clean import clean

    return clean(html_text(html)[0])


# --- the walk -----------------------------------------------------------------------------------------------


def test_documents_come_in_the_order_of_their_names_with_paths_relative_to_the_folder(tmp_path):
    write(tmp_path, b_txt="B", a__z_md="# Z", a__b__c_html="<p>C", c_TXT="upper", a_txt="A")
    assert [d.id for d in load_folder(tmp_path)] == ["a/b/c.html", "a/z.md", "a.txt", "b.txt", "c.TXT"]
    assert [d.path for d in load_folder(str(tmp_path))] == [d.id for d in load_folder(tmp_path)]


def test_one_file(tmp_path):
    write(tmp_path, guide_md="# Guide\n\nText.")
    assert list(load_folder(tmp_path / "guide.md")) == [
        Document(id="guide.md", path="guide.md", text="# Guide\n\nText.", title="Guide")
    ]


def test_what_gives_no_document_is_reported_with_its_reason(tmp_path):
    write(
        tmp_path,
        good_txt="good",
        empty_txt="",
        blank_md=" \n\t\r\n\ufeff",
        script_html="<script>alert(1)</script>",
        picture_png=b"\x89PNG",
        zero_txt=b"ab\x00cd",
        noise_txt=bytes(range(128, 256)) * 3 + b"\x81\x8d\x90\x9d\xff\xfe" * 40,
        cut_txt=b"\xff\xfe\x00",
    )
    (tmp_path / "Makefile").write_text("all:")
    documents, reasons = load(tmp_path)
    assert list(documents) == ["good.txt"]
    assert reasons.keys() == {
        "empty.txt", "blank.md", "script.html", "picture.png", "zero.txt", "noise.txt", "cut.txt", "Makefile",
    }  # fmt: skip
    assert reasons["empty.txt"] == reasons["blank.md"] == reasons["script.html"] == "no text in it"
    assert reasons["picture.png"] == "unsupported type .png"
    assert "no file extension" in reasons["Makefile"]
    assert "binary" in reasons["zero.txt"] and "binary" in reasons["noise.txt"]
    assert "utf-16" in reasons["cut.txt"]


def test_hidden_files_and_folders_are_passed_over(tmp_path):
    write(tmp_path, seen_txt="yes")
    for name in (".hidden.txt", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no")
    assert load(tmp_path) == ({"seen.txt": next(load_folder(tmp_path / "seen.txt"))}, {})


def test_extensions_choose_files_and_the_rest_is_passed_over(tmp_path):
    write(tmp_path, a_txt="A", b_md="B", c_pdf="C", d_HTML="<p>D")
    documents, reasons = load(tmp_path, extensions=["md", ".html"])
    assert list(documents) == ["b.md", "d.HTML"] and not reasons


@pytest.mark.parametrize("extensions", [["exe"], ["md", ""]])
def test_an_extension_that_cannot_be_read_is_an_error_at_once(tmp_path, extensions):
    with pytest.raises(UserError, match=r"choose extensions from .*\.md"):
        load_folder(tmp_path, extensions=extensions)


@pytest.mark.parametrize("path", ["", "/no/such/folder", "nul\0byte"])
def test_a_missing_folder_is_an_error_at_once_that_names_it(path):
    with pytest.raises(UserError, match="There is no file or folder at"):
        load_folder(path)


def test_an_empty_folder_gives_nothing(tmp_path):
    assert list(load_folder(tmp_path)) == []


def test_links_are_followed_and_no_folder_is_read_twice(tmp_path):
    outside = tmp_path / "outside"
    write(outside, shared_txt="S")
    root = tmp_path / "root"
    write(root, sub__a_txt="A")
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "self").symlink_to(root / "sub")
    (root / "linked").symlink_to(outside)
    (root / "ring.txt").symlink_to(root / "ring.txt")
    (root / "gone.txt").symlink_to(root / "nowhere")
    documents, reasons = load(root)
    assert list(documents) == ["linked/shared.txt", "sub/a.txt"]
    assert reasons.keys() == {"sub/up", "sub/self", "ring.txt", "gone.txt"}
    assert reasons["sub/up"].startswith("a link to a folder")
    assert reasons["gone.txt"] == "cannot be read (No such file or directory)"


def test_a_pipe_is_reported_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert load(tmp_path) == ({}, {"pipe.txt": "not a regular file"})


def test_an_unreadable_file_and_folder_are_reported(tmp_path, monkeypatch):
    write(tmp_path, good_txt="G", secret_txt="S", locked__x_txt="X")
    read, listdir = Path.read_bytes, os.listdir

    def refuse(name, real):
        def call(path):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied")
            return real(path)

        return call

    monkeypatch.setattr(Path, "read_bytes", refuse("secret.txt", read))
    monkeypatch.setattr(os, "listdir", refuse("locked", listdir))
    documents, reasons = load(tmp_path)
    assert list(documents) == ["good.txt"]
    assert reasons == dict.fromkeys(["secret.txt", "locked"], "cannot be read (Permission denied)")


def test_a_folder_chain_longer_than_any_path_that_the_system_opens(tmp_path):
    here = os.open(tmp_path, os.O_RDONLY)
    for _ in range(30):
        os.mkdir("d" * 200, dir_fd=here)
        below = os.open("d" * 200, os.O_RDONLY, dir_fd=here)
        os.close(here)
        here = below
    os.close(here)
    write(tmp_path, top_txt="T")
    documents, reasons = load(tmp_path)
    assert list(documents) == ["top.txt"]
    assert list(reasons.values()) == ["cannot be read (File name too long)"]


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"caf\xc3\xa9 \xf0\x9f\xa4\x96 {context} [1].txt", "café 🤖 {context} [1].txt"),
        (b"bad\xff\xfe.txt", "bad\\udcff\\udcfe.txt"),
        (b"two\nlines\x1b[31m.txt", "two\\nlines\\x1b[31m.txt"),
        (b"-rf.txt", "-rf.txt"),
        (b"%s.txt", "%s.txt"),
        ("\u05e9\u05dc\u05d5\u05dd.txt".encode(), "\u05e9\u05dc\u05d5\u05dd.txt"),
    ],
)
def test_odd_names(tmp_path, name, shown):
    with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
        file.write(b"text")
    (document,) = load_folder(tmp_path)
    assert document.id == document.path == shown
    assert document.title == shown.removesuffix(".txt")
    assert document.path.encode("utf-8")


@settings(max_examples=60)
@given(st.sampled_from(["txt", "md", "html"]), st.binary(max_size=300))
def test_no_bytes_are_fatal(suffix, data):
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / f"x.{suffix}").write_bytes(data)
        (found,) = load_folder(folder)
        assert isinstance(found, Document | Skipped)
        if isinstance(found, Document):
            assert found.text.strip() and found.title and found.text.encode("utf-8")
        else:
            assert found.reason


# --- encodings ----------------------------------------------------------------------------------------------


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


def test_a_page_may_declare_its_encoding(tmp_path):
    page = '<meta http-equiv="Content-Type" content="text/html; charset={}"><p>{}</p>'
    write(
        tmp_path,
        hebrew_html=page.format("windows-1255", "שלום עולם").encode("cp1255"),
        latin_html=page.format("iso-8859-1", "“naïve”").encode("cp1252"),  # what browsers make of that label
        wrong_html=page.format("iso-8859-1", "naïve 東京").encode(
            "utf-8"
        ),  # the bytes are believed, not the label
        unknown_html=page.format("x-no-such-code", "naïve café").encode("cp1252"),
        codec_html=page.format("base64", "naïve café").encode("cp1252"),
    )
    documents, _ = load(tmp_path)
    assert {d.id: d.text for d in documents.values()} == {
        "codec.html": "naïve café",
        "hebrew.html": "שלום עולם",
        "latin.html": "“naïve”",
        "unknown.html": "naïve café",
        "wrong.html": "naïve 東京",
    }


# --- titles -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, content, title",
    [
        ("a.html", "<title> The \n Title </title><h1>Heading</h1>", "The Title"),
        ("a.html", "<title></title><p>x</p><h2>Head<b>ing</b></h2>", "Heading"),
        ("a.html", "<svg><title>icon</title></svg><p>text", "a"),
        ("a.md", "intro\n\n## Second level ##\n\n# First", "Second level"),
        ("a.md", "```\n# not a heading\n```\n# Heading", "Heading"),
        ("a.md", "Underlined\n==========\ntext", "Underlined"),
        ("a.md", "---\ndate: 2020\n---\ntext", "a"),
        ("a.md", "#hashtag only", "a"),
        ("two.parts.txt", "# txt has no headings", "two.parts"),
        ("a.md", "# " + "long " * 100, ("long " * 40)),
    ],
)
def test_titles(tmp_path, name, content, title):
    (tmp_path / name).write_text(content)
    (document,) = load_folder(tmp_path)
    assert document.title == title


def test_the_text_is_cleaned(tmp_path):
    write(tmp_path, a_txt="one\r\n\r\n\r\n\r\ntwo \u00ad \ncafe\u0301\n")
    assert next(load_folder(tmp_path)).text == "one\n\ntwo\ncaf\u00e9"


# --- HTML ---------------------------------------------------------------------------------------------------


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
    with pytest.raises(HtmlError, match="depth"):
        html_text("<div>" * 5000 + "deep")


@pytest.mark.parametrize(
    "unit", ["<p>a", "<li>", "<td>x", "<ul>", "a ", "<b>", "&", "<", "<br>", "<h1></h1>", "</body>"]
)
def test_large_pages_are_linear(unit):
    try:
        text, _ = html_text(unit * 20_000)
    except HtmlError:
        assert unit in ("<li>", "<td>x", "<ul>", "<b>"), "only what nests may be too deep"
    else:
        assert len(text) <= 80_000


@given(st.text(st.sampled_from("<>/ap'\"=!-& \n\t;#x0bliuotrdh1é🤖\u05d0"), max_size=80))
def test_no_markup_is_fatal(page):
    text, title = html_text(page)
    assert text.encode("utf-8") is not None and isinstance(title, str)
