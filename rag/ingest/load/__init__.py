"""Files to documents: walk a folder, read what can be read, and say of the rest why not."""

import os
import re
import stat
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.ingest.clean import NONCHARACTERS, clean
from rag.ingest.load.encoding import UnreadableFile, decode
from rag.ingest.load.html import HtmlError, html_text
from rag.ingest.load.markdown import _first_heading, _markdown
from rag.runtime.options import Count, check_fields
from rag.types import Document, UserError

READABLE = ".txt, .text, .md, .markdown, .html, .htm, .xhtml"  # what _extractor knows, for messages
_DECLARED = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)

_SPECIAL = ("/proc", "/sys")  # whose files are made as they are read: some wait, some never end
_NOT_SHOWN = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # Unicode categories: controls, directions, line ends
_MB = 1_000_000  # bytes


@dataclass(frozen=True)
class LoadOptions:
    """What of a folder is read."""

    follow_links: bool = False  # those that lead out of the folder
    max_file_mb: Count = 50  # larger files are skipped; 1 MB is 1,000,000 bytes

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file, or a folder, that gave no document."""

    path: str  # as Document.path
    reason: str  # to be read after the path: "guide.pdf: unsupported type .pdf"


def load_folder(
    path: str | Path, *, extensions: Sequence[str] | None = None, options: LoadOptions = LoadOptions()
) -> Iterator[Document | Skipped]:
    """Yield a Document, or a Skipped with its reason, for each file under `path`, in order of name.

    `path` is a folder or one file. Hidden files and folders are passed over; links within the folder are
    followed, but no folder is read twice. With `extensions` (such as ["md", "html"]) all other files are passed
    over in silence. `Document.id` and `.path` are the path relative to the folder, with `/`, so that they do
    not depend on the machine; characters that do not show, undecodable bytes and backslashes in it are escaped
    as in Python, so that no two files have the same. The text is cleaned (rag.ingest.clean). Raises UserError at
    the call when `path` is missing or an extension is one that cannot be read.
    """
    name = os.fspath(path)
    root = Path(os.path.expanduser(name))
    if not name or not os.path.exists(root):
        raise UserError(f"There is no file or folder at {name!r}: give the path of the documents to read.")
    wanted = None if extensions is None else frozenset("." + e.lower().lstrip(".") for e in extensions)
    for suffix in sorted(wanted or ()):
        if _extractor(suffix) is None:
            raise UserError(f"Files of type {suffix} cannot be read: choose extensions from {READABLE}.")
    return _load_all(root, wanted, options)


def _load_all(
    root: Path, wanted: frozenset[str] | None, options: LoadOptions
) -> Iterator[Document | Skipped]:
    """Depth first over an explicit stack: a folder chain may be deeper than Python's recursion limit."""
    corpus = Path(os.path.realpath(root))
    seen: set[tuple[int, int]] = set()
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            if path != root and path.is_symlink() and (reason := _astray(path, corpus, options)):
                yield Skipped(_shown(path, root), reason)
                continue
            status = path.stat()
            folder = (status.st_dev, status.st_ino) if stat.S_ISDIR(status.st_mode) else None
            if folder is None:
                if wanted is None or path.suffix.lower() in wanted:
                    yield _load_file(path, _shown(path, root), stat.S_ISREG(status.st_mode), options)
            elif folder in seen:
                yield Skipped(_shown(path, root), "a link to a folder that is read under another name")
            else:
                seen.add(folder)
                names = sorted(os.listdir(path), reverse=True)
                pending += [path / name for name in names if not name.startswith(".")]
        except OSError as error:
            yield Skipped(_shown(path, root), f"cannot be read ({error.strerror or error})")


def _astray(link: Path, corpus: Path, options: LoadOptions) -> str:
    """Why a link is not followed; "" where it is."""
    target = Path(os.path.realpath(link))
    if target.is_relative_to(corpus):
        return ""
    if not options.follow_links:
        return "a link that leads out of the corpus: corpus.follow_links=true follows it"
    return "a link into a special file system" if any(map(target.is_relative_to, _SPECIAL)) else ""


def _shown(path: Path, root: Path) -> str:
    return _escaped(path.name if path == root else path.relative_to(root).as_posix())


def _escaped(name: str) -> str:
    """The name with what does not show, and the backslash, escaped as in Python: other names are shown otherwise."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c == "\\" or unicodedata.category(c) in _NOT_SHOWN or ord(c) in NONCHARACTERS
        else c
        for c in name
    )


def _load_file(path: Path, name: str, regular: bool, options: LoadOptions) -> Document | Skipped:
    suffix = path.suffix.lower()
    extract = _extractor(suffix)
    if not regular:
        return Skipped(name, "not a regular file")  # opening a device may do something
    if extract is None:
        kind = f"unsupported type {_escaped(suffix)}" if suffix else "unsupported: no file extension"
        return Skipped(name, kind)
    try:
        text, title = extract(_read(path, options.max_file_mb))
    except (UnreadableFile, HtmlError) as error:
        return Skipped(name, str(error))
    text = clean(text)
    if not text.strip():
        return Skipped(name, "no text in it")
    title = " ".join(clean(title).split())[:200]
    return Document(id=name, path=name, text=text, title=title or Path(name).stem)


def _read(path: Path, max_mb: int) -> bytes:
    """What a regular file holds when it is opened; never waits, and never reads past the size it has then.

    Raises a reason to skip the file when it is too large, or no longer a regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("not a regular file")
        if status.st_size > max_mb * _MB:
            raise UnreadableFile(
                f"{status.st_size:,} bytes, more than corpus.max_file_mb={max_mb} allows: divide it, or raise that"
            )
        return file.read(status.st_size) or b""  # None where it would wait


def _extractor(suffix: str) -> Callable[[bytes], tuple[str, str]] | None:
    """The function from a file's bytes to its text and title ("" for none), or None for an unknown type."""
    match suffix:
        case ".txt" | ".text":
            return lambda data: (decode(data), "")
        case ".md" | ".markdown":
            return _markdown
        case ".html" | ".htm" | ".xhtml":
            return _html
        case _:
            return None


def _html(data: bytes) -> tuple[str, str]:
    declared = _DECLARED.search(data[:4096])
    text, title = html_text(decode(data, declared[1].decode("ascii", "replace") if declared else ""))
    return text, title or _first_heading(text)
