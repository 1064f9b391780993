"""Plain text files."""

from rag.ingest.load.encoding import decode


def load_text(data: bytes) -> tuple[str, str]:
    """Return the text of a plain text file, and no title."""
    return decode(data), ""
