"""Decode the bytes of text files: by byte order mark, as UTF-8, as declared, or by a guess."""

import codecs
import re

# A longer mark comes before the shorter mark that is its beginning.
_BYTE_ORDER_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
# With all encodings allowed, charset-normalizer takes a short Latin-1 text for cp1006 or UTF-16. So only these are
# allowed, and of two that it finds equally likely, the one that comes first here is chosen.
_LEGACY_ENCODINGS = (
    "cp1252 cp1250 cp1251 cp1253 cp1254 cp1255 cp1256 koi8_r "
    "cp932 euc_jp gb18030 big5 euc_kr mac_roman".split()
)
# The encodings that a web page may declare (WHATWG Encoding), by their names in Python; UTF-16 stands for UTF-8 there.
_DECLARABLE = frozenset(
    "utf-8 ascii cp866 cp874 cp1250 cp1251 cp1252 cp1253 cp1254 cp1255 cp1256 cp1257 cp1258 koi8-r koi8-u "
    "mac-roman mac-cyrillic gbk gb2312 gb18030 big5 big5hkscs euc_jp iso2022_jp shift_jis cp932 euc_kr cp949".split()
) | {f"iso8859-{part}" for part in range(1, 17)}
_SAMPLE = 1 << 16  # bytes that an encoding is guessed from: guessing takes far longer than decoding


class UnreadableFile(Exception):
    """A file cannot be loaded. The message is the reason, and a Skipped shows it after the file's path."""


def decode(data: bytes, declared: str = "") -> str:
    """Decode a text file by its byte order mark, else as UTF-8, else as `declared`, else by a guess.

    UTF-8 is tried before the declared encoding, because text in another encoding is hardly ever valid UTF-8.

    Raises:
        UnreadableFile: the file is binary, or its encoding cannot be guessed.
    """
    for mark, encoding in _BYTE_ORDER_MARKS:
        if data.startswith(mark):
            return _decode_as(data[len(mark) :], encoding)
    if b"\0" in data:
        raise UnreadableFile("binary data, or UTF-16 without a byte order mark: save it as UTF-8")
    for encoding in ("utf-8", *_declared(declared)):
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


def _declared(name: str) -> list[str]:
    """Return a declared encoding, if it is one that a page may declare: Python knows others, as unicode_escape."""
    try:
        return [name] if codecs.lookup(name).name in _DECLARABLE else []
    except LookupError:
        return []


def _guessed(data: bytes) -> list[str]:
    """Return the encodings that `data`, which is not UTF-8, may be in, the likeliest first.

    The guess for long data is made from a sample around the first byte that is not ASCII. The sample may end within a
    character, which has at most four bytes, so it is also tried without its last one to three bytes.
    """
    import charset_normalizer  # here: most files need no guess, and an answer loads none

    non_ascii = re.search(rb"[\x80-\xff]", data)
    begin = max(0, non_ascii.start() - _SAMPLE // 2) if non_ascii and len(data) > _SAMPLE else 0
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
        # Web pages that declare Latin-1 or ASCII are in cp1252 (WHATWG Encoding).
        return data.decode("cp1252" if name in ("iso8859-1", "ascii") else name)
    except (LookupError, UnicodeError, ValueError) as error:
        raise UnreadableFile(f"not valid {encoding}") from error
