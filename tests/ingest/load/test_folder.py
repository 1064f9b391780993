"""Loading folders: which files give documents, with which paths and titles; no file in a folder is fatal."""

import os
import socket
import subprocess
import sys
import tempfile
import unicodedata
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.ingest.load.folder import LoadOptions, Skipped, load_folder
from rag.types import Document, UserError
from tests.tiny_collections import load_all, write_tree


def test_documents_come_in_the_order_of_their_names_with_paths_relative_to_the_folder(tmp_path):
    write_tree(tmp_path, b_txt="B", a__z_md="# Z", a__b__c_html="<p>C", c_TXT="upper", a_txt="A")
    assert [d.id for d in load_folder(tmp_path)] == ["a/b/c.html", "a/z.md", "a.txt", "b.txt", "c.TXT"]
    assert [d.path for d in load_folder(str(tmp_path))] == [d.id for d in load_folder(tmp_path)]


def test_one_file(tmp_path):
    write_tree(tmp_path, guide_md="# Guide\n\nText.")
    assert list(load_folder(tmp_path / "guide.md")) == [
        Document(id="guide.md", path="guide.md", text="# Guide\n\nText.", title="Guide")
    ]


def test_what_gives_no_document_is_reported_with_its_reason(tmp_path):
    write_tree(
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
    documents, reasons = load_all(tmp_path)
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
    write_tree(tmp_path, seen_txt="yes")
    for name in (".hidden.txt", ".git/config.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("no")
    assert load_all(tmp_path) == ({"seen.txt": next(load_folder(tmp_path / "seen.txt"))}, {})


@pytest.mark.parametrize("path", ["", "/no/such/folder", "nul\0byte"])
def test_a_missing_folder_is_an_error_at_once_that_names_it(path):
    with pytest.raises(UserError, match="There is no file or folder at"):
        load_folder(path)


def test_an_empty_folder_gives_nothing(tmp_path):
    assert list(load_folder(tmp_path)) == []


def test_links_within_the_corpus_are_followed_and_no_folder_is_read_twice(tmp_path):
    root = tmp_path / "root"
    write_tree(root, sub__a_txt="A", hidden_txt="H")
    (root / "b").symlink_to(root / "sub")
    (root / "copy.txt").symlink_to("hidden.txt")
    (tmp_path / "way").symlink_to(root)  # the corpus itself may be named by a link
    documents, reasons = load_all(tmp_path / "way")
    assert list(documents) == ["b/a.txt", "copy.txt", "hidden.txt"]
    assert reasons == {"sub": "a link to a folder that is read under another name"}


def test_links_that_leave_the_corpus_are_followed_only_if_asked(tmp_path):
    outside = tmp_path / "outside"
    write_tree(outside, shared_txt="S")
    root = tmp_path / "root"
    write_tree(root, sub__a_txt="A")
    (root / "sub" / "up").symlink_to(root)
    (root / "sub" / "self").symlink_to(root / "sub")
    (root / "linked").symlink_to(outside)
    (root / "ring.txt").symlink_to(root / "ring.txt")
    (root / "gone.txt").symlink_to(root / "nowhere")
    (root / "one.txt").symlink_to(outside / "shared.txt")
    (root / "sub" / "rooted").symlink_to("/")
    documents, reasons = load_all(root)
    assert list(documents) == ["sub/a.txt"]
    left = {
        name for name, reason in reasons.items() if reason.startswith("a link that leads out of the corpus")
    }
    assert left == {"linked", "one.txt", "sub/rooted"}
    assert "corpus.follow_links=true" in reasons["one.txt"]
    (root / "sub" / "rooted").unlink()
    documents, reasons = load_all(root, options=LoadOptions(follow_links=True))
    assert list(documents) == ["linked/shared.txt", "one.txt", "sub/a.txt"]
    assert reasons.keys() == {"sub/up", "sub/self", "ring.txt", "gone.txt"}
    assert reasons["sub/up"].startswith("a link to a folder")
    assert reasons["gone.txt"] == "cannot be read (No such file or directory)"


def test_a_pipe_is_reported_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.txt")
    assert load_all(tmp_path) == ({}, {"pipe.txt": "not a regular file"})


def test_special_files_never_hang_the_loader(tmp_path):
    """It runs in a process that can be killed."""
    root, outside = tmp_path / "root", tmp_path / "outside"
    write_tree(root, good_txt="good")
    outside.mkdir()
    os.mkfifo(outside / "pipe")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(outside / "s"))
        targets = {
            "kernel": "/proc/kmsg", "trace": "/proc/self/maps", "sys": "/sys", "proc": "/proc", "tty": "/dev/tty",
            "zero": "/dev/zero", "random": "/dev/urandom", "pipe": outside / "pipe", "socket": outside / "s",
        }  # fmt: skip
        for name, target in targets.items():
            (root / f"{name}.txt").symlink_to(target)
        code = (
            "import sys; from rag.ingest.load.folder import *\n"
            "for found in load_folder(sys.argv[1], options=LoadOptions(follow_links=sys.argv[2] == 'follow')):\n"
            "    print(found.path, getattr(found, 'reason', 'read'), sep=': ')"
        )
        for follow in ("follow", "stay"):
            command = [sys.executable, "-c", code, str(root), follow]
            done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=True)
            reasons = dict(line.split(": ", 1) for line in done.stdout.splitlines())
            assert reasons.pop("good.txt") == "read"
            assert reasons.keys() == {f"{name}.txt" for name in targets}
            if follow == "stay":
                assert all(reason.startswith("a link that leads out") for reason in reasons.values())
            else:
                assert {reasons[f"{name}.txt"] for name in ("kernel", "trace", "sys", "proc")} == {
                    "a link into a special file system"
                }
                assert {reasons[f"{name}.txt"] for name in ("zero", "random", "pipe", "socket")} == {
                    "not a regular file"
                }


def test_a_file_of_a_special_file_system_holds_nothing(tmp_path):
    """Its status is that of an empty regular file, and reading may block; here it is the corpus itself."""
    (tmp_path / "log.txt").symlink_to("/proc/self/maps")
    assert load_all(tmp_path / "log.txt") == ({}, {"log.txt": "no text in it"})


def test_a_file_that_becomes_a_pipe_before_it_is_opened(tmp_path, monkeypatch):
    write_tree(tmp_path, x_txt="text")
    real = os.open

    def swap(path, *rest):
        os.remove(path)
        os.mkfifo(path)
        return real(path, *rest)

    monkeypatch.setattr(os, "open", swap)
    assert load_all(tmp_path) == ({}, {"x.txt": "not a regular file"})


def test_a_file_that_grows_while_it_is_read_is_read_as_it_was(tmp_path, monkeypatch):
    write_tree(tmp_path, x_txt="before")
    real = os.fstat

    def grow(number):
        status = real(number)
        with (tmp_path / "x.txt").open("a") as file:
            file.write(" and after" * 1000)
        return status

    monkeypatch.setattr(os, "fstat", grow)
    assert load_all(tmp_path)[0]["x.txt"].text == "before"


def test_a_file_that_goes_before_it_is_read_is_reported(tmp_path):
    write_tree(tmp_path, a_txt="A", b_txt="B", c__d_txt="D")
    found = load_folder(tmp_path)
    assert next(found).id == "a.txt"
    (tmp_path / "b.txt").unlink()
    (tmp_path / "e.txt").write_text("too late")
    assert [item.path for item in found] == ["b.txt", "c/d.txt"]


def test_a_file_above_the_size_is_skipped_unread(tmp_path):
    write_tree(tmp_path, fits_txt="a" * 1_000_000, large_txt="a" * 1_000_001)
    with (tmp_path / "huge.txt").open("wb") as file:
        file.truncate(1 << 40)  # a terabyte of nothing
    documents, reasons = load_all(tmp_path, options=LoadOptions(max_file_mb=1))
    assert list(documents) == ["fits.txt"]
    assert reasons["large.txt"] == (
        "1,000,001 bytes, more than corpus.max_file_mb=1 allows: divide it, or raise that"
    )
    assert reasons["huge.txt"].startswith("1,099,511,627,776 bytes")


def test_an_unreadable_file_and_folder_are_reported(tmp_path, monkeypatch):
    write_tree(tmp_path, good_txt="G", secret_txt="S", locked__x_txt="X")

    def refuse(name, real):
        def call(path, *rest):
            if Path(path).name == name:
                raise PermissionError(13, "Permission denied")
            return real(path, *rest)

        return call

    monkeypatch.setattr(os, "open", refuse("secret.txt", os.open))
    monkeypatch.setattr(os, "listdir", refuse("locked", os.listdir))
    documents, reasons = load_all(tmp_path)
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
    write_tree(tmp_path, top_txt="T")
    documents, reasons = load_all(tmp_path)
    assert list(documents) == ["top.txt"]
    assert list(reasons.values()) == ["cannot be read (File name too long)"]


@pytest.mark.parametrize(
    "name, shown",
    [
        (b"caf\xc3\xa9 \xf0\x9f\xa4\x96 {context} [1].txt", "café 🤖 {context} [1].txt"),
        (b"bad\xff\xfe.txt", "bad\\udcff\\udcfe.txt"),
        (b"two\nlines\x1b[31m.txt", "two\\nlines\\x1b[31m.txt"),
        ("pay\u202efdp.txt".encode(), "pay\\u202efdp.txt"),
        ("a\u200b\u2028\ufdd0\U000e0041.txt".encode(), "a\\u200b\\u2028\\ufdd0\\U000e0041.txt"),
        (b"back\\slash.txt", "back\\\\slash.txt"),
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


NAMES = st.text("a\\\n\r\x1b\x01nxu01b2de\u202e\u200d\ufdd0\udcff\udc80", min_size=1, max_size=8)


@settings(max_examples=60)
@given(st.sets(NAMES, min_size=1, max_size=20))
def test_no_two_names_are_shown_alike_and_none_says_more_than_it_shows(names):
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            (Path(folder) / f"{name}.txt").write_text("text")
        documents, reasons = load_all(folder)
    assert (len(documents), reasons) == (len(names), {})
    for path in documents:
        assert {unicodedata.category(c) for c in path}.isdisjoint(("Cc", "Cf", "Cs", "Cn"))


def test_names_that_were_shown_alike(tmp_path):
    for name in (b"a\\n.txt", b"a\n.txt", b"\\udcff.txt", b"\xff.txt"):
        with open(os.path.join(os.fsencode(tmp_path), name), "wb") as file:
            file.write(b"text")
    assert load_all(tmp_path)[0].keys() == {"a\\\\n.txt", "a\\n.txt", "\\\\udcff.txt", "\\udcff.txt"}


def test_a_reason_shows_no_control_character(tmp_path):
    (tmp_path / "x.\x1b[31m\u202e\n").write_text("text")
    assert load_all(tmp_path)[1] == {"x.\\x1b[31m\\u202e\\n": "unsupported type .\\x1b[31m\\u202e\\n"}


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


# --- titles


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
    write_tree(tmp_path, a_txt="one\r\n\r\n\r\n\r\ntwo \u00ad \ncafe\u0301\n")
    assert next(load_folder(tmp_path)).text == "one\n\ntwo\ncaf\u00e9"
