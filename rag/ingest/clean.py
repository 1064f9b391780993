"""One normal form for extracted text, fixed before any character span is taken."""

import re
import unicodedata

_NEWLINES = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_BLANK_RUN = re.compile("\n{3,}")

# Dropped: C0 and C1 controls but tab and newline, soft hyphens, and byte order marks inside the text.
# Kept: zero-width joiners (emoji, Persian, Indic scripts) and direction marks, because they carry meaning.
_TABLE: dict[int, str | None] = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0xFEFF) if chr(code) not in "\t\n"
}
_TABLE |= {0xA0: " ", 0x202F: " "}  # no-break spaces
_TABLE |= dict.fromkeys(range(0xD800, 0xE000), "\N{REPLACEMENT CHARACTER}")  # lone surrogates: not UTF-8


def clean(text: str) -> str:
    """Return `text` in Unicode form NFC (Unicode annex 15), with plain newlines and spaces.

    Line ends become a newline, no-break spaces become spaces, control characters, soft hyphens and byte order
    marks go, lone surrogates become U+FFFD, lines lose their trailing white space, two or more blank lines
    become one, and blank lines at either end go. `clean(clean(text)) == clean(text)`, and the result can
    always be encoded as UTF-8. Time and memory are linear in the length of `text`.
    """
    text = _NEWLINES.sub("\n", text).translate(_TABLE)
    text = unicodedata.normalize("NFC", text)
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_RUN.sub("\n\n", text).strip("\n")
