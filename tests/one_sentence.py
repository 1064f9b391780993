"""Check error messages for users."""


def is_one_sentence(text: str) -> bool:
    """Return whether a text is one printable line of 21 to 899 characters, and no traceback."""
    return text.isprintable() and 20 < len(text) < 900 and "Traceback" not in text and text == text.strip()
