"""What a message to a person may be."""


def is_one_sentence(text: str) -> bool:
    """Whether a text is one line that a terminal shows as it is, and not a page long."""
    return text.isprintable() and 20 < len(text) < 900 and "Traceback" not in text and text == text.strip()
