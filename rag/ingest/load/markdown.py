"""Markdown files: the source is the text, and the first heading is the title."""

import re

from rag.ingest.clean import clean
from rag.ingest.load.encoding import decode

_FENCED_CODE = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(?:#{1,6}[ \t]+(\S[^\n]*)|(\S[^\n]*)\n={3,}$)", re.MULTILINE)


def load_markdown(data: bytes) -> tuple[str, str]:
    """Return the Markdown source of a file and its first heading."""
    text = decode(data)
    return text, first_heading(text)


def first_heading(text: str) -> str:
    """Return the first Markdown heading outside fenced code, or "" if there is none."""
    heading = _HEADING.search(_FENCED_CODE.sub("", clean(text)))
    return (heading[1] or heading[2]).rstrip("# \t") if heading else ""
