"""Load a folder: walk it, load each file that has a loader, and report why the others are skipped."""

import os
import stat
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from rag.ingest.clean import NONCHARACTERS, clean
from rag.ingest.load import LOADERS
from rag.ingest.load.encoding import UnreadableFile
from rag.runtime.options import Count, check_fields
from rag.types import Document, UserError

# File systems that generate their files when these are read: some block, some never end.
_SPECIAL = ("/proc", "/sys")
_INVISIBLE = frozenset(("Cc", "Cf", "Cs", "Zl", "Zp"))  # Unicode categories: controls, directions, line ends
_MB = 1_000_000  # bytes


@dataclass(frozen=True)
class LoadOptions:
    """Options that choose which files of a folder are loaded."""

    follow_links: bool = False  # also links that lead out of the folder
    max_file_mb: Count = 50  # larger files are skipped; 1 MB is 1,000,000 bytes

    def __post_init__(self) -> None:
        check_fields(self)


@dataclass(frozen=True, slots=True)
class Skipped:
    """A file or folder that gave no document."""

    path: str  # as Document.path
    reason: str  # follows the path in a message: "guide.pdf: unsupported type .pdf"


def load_folder(path: str | Path, options: LoadOptions = LoadOptions()) -> Iterator[Document | Skipped]:
    """Yield a Document, or a Skipped with its reason, for each file under `path`, in order of name.

    Hidden files and folders are ignored. Links within the folder are followed, but no folder is loaded twice.
    `Document.id` and `.path` are the path relative to the folder, with `/`, so that they do not depend on the machine;
    invisible characters, undecodable bytes and backslashes in it are escaped as in Python, so that no two files get
    the same path. The text is cleaned (rag.ingest.clean).

    Args:
        path: a folder or one file.
        options: which files are loaded.

    Raises:
        UserError: `path` does not exist. It is raised at the call, before the first item is asked for.
    """
    name = os.fspath(path)
    root = Path(os.path.expanduser(name))
    if not name or not os.path.exists(root):
        raise UserError(f"There is no file or folder at {name!r}: give the path of the documents to read.")
    return _load_all(root, options)


def _load_all(root: Path, options: LoadOptions) -> Iterator[Document | Skipped]:
    """Walk depth first with an explicit stack: a chain of folders may be deeper than Python's recursion limit."""
    corpus = Path(os.path.realpath(root))
    seen: set[tuple[int, int]] = set()  # (device, inode) of the folders that were listed
    pending = [root]
    while pending:
        path = pending.pop()
        try:
            if path != root and path.is_symlink() and (reason := _why_not_followed(path, corpus, options)):
                yield Skipped(_document_path(path, root), reason)
                continue
            status = path.stat()
            folder = (status.st_dev, status.st_ino)
            if not stat.S_ISDIR(status.st_mode):
                yield _load_file(path, _document_path(path, root), stat.S_ISREG(status.st_mode), options)
            elif folder in seen:
                yield Skipped(
                    _document_path(path, root), "a link to a folder that is read under another name"
                )
            else:
                seen.add(folder)
                names = sorted(os.listdir(path), reverse=True)
                pending += [path / name for name in names if not name.startswith(".")]
        except OSError as error:
            yield Skipped(_document_path(path, root), f"cannot be read ({error.strerror or error})")


def _why_not_followed(link: Path, corpus: Path, options: LoadOptions) -> str:
    """Return the reason why a link is not followed, or "" if it is."""
    target = Path(os.path.realpath(link))
    if target.is_relative_to(corpus):
        return ""
    if not options.follow_links:
        return "a link that leads out of the corpus: corpus.follow_links=true follows it"
    return "a link into a special file system" if any(map(target.is_relative_to, _SPECIAL)) else ""


def _document_path(path: Path, root: Path) -> str:
    """Return the path relative to the corpus, escaped; for a corpus of one file, the file's name."""
    return _escaped(path.name if path == root else path.relative_to(root).as_posix())


def _escaped(name: str) -> str:
    """Escape invisible characters as Python does, and the backslash too, so that two names stay different."""
    return "".join(
        c.encode("unicode_escape").decode()
        if c == "\\" or unicodedata.category(c) in _INVISIBLE or ord(c) in NONCHARACTERS
        else c
        for c in name
    )


def _load_file(path: Path, name: str, regular: bool, options: LoadOptions) -> Document | Skipped:
    suffix = path.suffix.lower()
    if not regular:
        return Skipped(name, "not a regular file")  # opening a device may have an effect
    if suffix not in LOADERS:
        return Skipped(
            name, f"unsupported type {_escaped(suffix)}" if suffix else "unsupported: no file extension"
        )
    try:
        text, title = LOADERS[suffix](_read(path, options.max_file_mb))
    except UnreadableFile as error:
        return Skipped(name, str(error))
    text = clean(text)
    if not text.strip():
        return Skipped(name, "no text in it")
    title = " ".join(clean(title).split())[:200]
    return Document(id=name, path=name, text=text, title=title or Path(name).stem)


def _read(path: Path, max_mb: int) -> bytes:
    """Return the bytes of a regular file, as many as it has when it is opened, without ever blocking.

    Raises UnreadableFile when the file is too large, or is no longer a regular file.
    """
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | os.O_NONBLOCK)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise UnreadableFile("not a regular file")
        if status.st_size > max_mb * _MB:
            raise UnreadableFile(
                f"{status.st_size:,} bytes, more than corpus.max_file_mb={max_mb} allows: divide it, or raise that"
            )
        return file.read(status.st_size) or b""  # None where reading would block
