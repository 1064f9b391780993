"""Normalise extracted text; this happens before any character span is computed."""

import functools
import re
import unicodedata

_NEWLINES = re.compile("\r\n|[\r\v\f\x85\u2028\u2029]")
_BLANK_RUN = re.compile("\n{3,}")

# Removed: C0 and C1 controls except tab and newline, soft hyphens, and byte order marks inside the text.
# Not removed: zero-width joiners (emoji, Persian, Indic scripts) and direction marks, because they carry meaning.
_TABLE: dict[int, str | None] = {
    code: None for code in (*range(0x20), *range(0x7F, 0xA0), 0xAD, 0xFEFF) if chr(code) not in "\t\n"
}
_TABLE |= {0xA0: " ", 0x202F: " "}  # no-break spaces

# Not allowed in text for interchange: lone surrogates, which are not UTF-8, and the 66 noncharacters.
NONCHARACTERS = (
    *range(0xFDD0, 0xFDF0),
    *(plane << 16 | low for plane in range(17) for low in (0xFFFE, 0xFFFF)),
)
_TABLE |= dict.fromkeys((*range(0xD800, 0xE000), *NONCHARACTERS), "\N{REPLACEMENT CHARACTER}")


def clean(text: str) -> str:
    """Return `text` in Unicode form NFC (Unicode annex 15), with plain newlines and spaces.

    - All kinds of line ends become a newline, and no-break spaces become spaces.
    - Control characters, soft hyphens and byte order marks are removed.
    - Lone surrogates and noncharacters become U+FFFD.
    - Of more than 30 combining marks in a row only the first 30 stay.
    - White space at line ends is removed, several blank lines become one, and blank lines at both ends are removed.

    `clean(clean(text)) == clean(text)`, and the result can always be encoded as UTF-8. Time and memory are linear in
    the length of `text`.
    """
    text = _NEWLINES.sub("\n", text).translate(_TABLE)
    if not text.isascii():
        text = _limited(unicodedata.normalize("NFC", _limited(text)))  # twice: a few marks become two
    text = "\n".join(line.rstrip() for line in text.split("\n"))
    return _BLANK_RUN.sub("\n\n", text).strip("\n")


def _limited(text: str) -> str:
    """Return the text with at most 30 combining marks in a row.

    Of 31 marks in a row, every 15th character of the text has two that are neighbours: this is the quick first test.
    """
    two, long_run = _runs()
    return long_run.sub(r"\1", text) if two.search(text[::15]) else text


@functools.cache
def _runs() -> tuple[re.Pattern[str], re.Pattern[str]]:
    """Return patterns of 2 and of more than 30 combining marks in a row.

    Normalising a run of marks of different classes takes time quadratic in its length. No language writes more than 30
    (Unicode annex 15, Stream-Safe Text Format). No combining mark is above plane 1.
    """
    marks = "".join(chr(code) for code in range(0x300, 0x20000) if unicodedata.combining(chr(code)))
    return re.compile(f"[{marks}]{{2}}"), re.compile(f"([{marks}]{{30}})[{marks}]+")
