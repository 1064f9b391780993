"""Loaders: functions from the bytes of a file to its text and title, by the suffix of the file's name.

A new format is one file with such a function, and one row of LOADERS. A loader raises UnreadableFile
(rag.ingest.load.encoding) with the reason why it cannot load a file; that file is then skipped.
"""

from collections.abc import Callable

from rag.ingest.load.html import load_html
from rag.ingest.load.markdown import load_markdown
from rag.ingest.load.text import load_text

Loader = Callable[[bytes], tuple[str, str]]  # returns (text, title); the title is "" where the file has none

LOADERS: dict[str, Loader] = {
    ".txt": load_text,
    ".text": load_text,
    ".md": load_markdown,
    ".markdown": load_markdown,
    ".html": load_html,
    ".htm": load_html,
    ".xhtml": load_html,
}
