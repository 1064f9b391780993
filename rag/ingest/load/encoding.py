"""Bytes to text: byte order mark, UTF-8, the declared encoding, or a guess."""

import codecs
import re

import charset_normalizer

# A longer mark stands before the one that it begins with.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# Left to itself charset-normalizer takes a short Latin-1 text for cp1006 or UTF-16. So: these only, and where
# it holds two for equally likely, the one that comes first here.
_LEGACY_ENCODINGS = (
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r "
    "cp932 euc_jp gb18030 big5 euc_kr mac_roman".split()
)
_SAMPLE = 1 << 16  # bytes that an encoding is guessed from: the guess takes far longer than decoding


class UnreadableFile(Exception):
    """Why a file gives no document."""


def decode(data: bytes, declared: str = "") -> str:
    """Decode a file of text: by its byte order mark, else as UTF-8, else as `declared`, else by a guess.

    UTF-8 goes before what a page declares, because text in another encoding is hardly ever valid UTF-8 by
    chance. Raises a reason to skip the file when it is binary or its encoding cannot be told.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode_as(data[len(mark) :], encoding)
    if b"\0" in data:
        raise UnreadableFile("binary data, or UTF-16 without a byte order mark: save it as UTF-8")
    for encoding in ("utf-8", declared):
        try:
            return _decode_as(data, encoding)
        except UnreadableFile:
            continue
    for encoding in _guessed(data):
        try:
            return data.decode(encoding)
        except UnicodeError:
            continue
    raise UnreadableFile("binary data, or text in an encoding that cannot be told: save it as UTF-8")


def _guessed(data: bytes) -> list[str]:
    """The encodings that data, which is no UTF-8, may be in, the likeliest first.

    Of much data a sample from the first byte that is not ASCII. It may end within a character, of four bytes at most.
    """
    begin = re.search(rb"[\x80-\xff]", data).start()  # not None: ASCII is UTF-8
    begin = max(0, begin - _SAMPLE // 2) if len(data) > _SAMPLE else 0
    sample = data[begin : begin + _SAMPLE]
    cuts = range(4) if len(data) > _SAMPLE else (0,)
    rank = {name: position for position, name in enumerate(_LEGACY_ENCODINGS)}
    matches = [
        match
        for cut in cuts
        for match in charset_normalizer.from_bytes(
            sample[: len(sample) - cut], cp_isolation=_LEGACY_ENCODINGS
        )
    ]
    matches.sort(
        key=lambda m: (m.chaos, -m.coherence, min(rank.get(e, len(rank)) for e in m.could_be_from_charset))
    )
    return [match.encoding for match in matches]


def _decode_as(data: bytes, encoding: str) -> str:
    try:
        name = codecs.lookup(encoding).name
        # The web's rule (WHATWG Encoding): who declares Latin-1 or ASCII means cp1252.
        return data.decode("cp1252" if name in ("iso8859-1", "ascii") else name)
    except (LookupError, UnicodeError, ValueError) as error:
        raise UnreadableFile(f"not valid {encoding}") from error
