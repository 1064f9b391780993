"""Markdown files: the text as it stands, and a title from the first heading."""

import re

from rag.ingest.clean import clean
from rag.ingest.load.encoding import decode

_FENCED = re.compile(r"^(```|~~~).*?^\1", re.MULTILINE | re.DOTALL)
_HEADING = re.compile(r"^(?:#{1,6}[ \t]+(\S[^\n]*)|(\S[^\n]*)\n={3,}$)", re.MULTILINE)


def _markdown(data: bytes) -> tuple[str, str]:
    text = decode(data)  # Markdown is readable as it stands
    return text, _first_heading(text)


def _first_heading(text: str) -> str:
    """The first Markdown heading outside fenced code, or ""."""
    heading = _HEADING.search(_FENCED.sub("", clean(text)))
    return (heading[1] or heading[2]).rstrip("# \t") if heading else ""
