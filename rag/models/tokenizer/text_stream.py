"""Turn token ids into bytes, and these into text as soon as they are complete characters."""

import codecs
import re
from collections.abc import Callable, Mapping


def _byte_alphabet() -> Mapping[str, int]:
    """Return GPT-2's characters for bytes: printable ones stand for themselves, the rest for U+0100 and up."""
    plain = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(others)}


_BYTE_OF = _byte_alphabet()
_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")


def _byte_level_bytes(piece: str) -> bytes:
    try:
        return bytes([_BYTE_OF[character] for character in piece])
    except KeyError:  # a piece outside the alphabet stands for itself
        return piece.encode()


def _sentencepiece_bytes(piece: str) -> bytes:
    if found := _BYTE_TOKEN.fullmatch(piece):
        return bytes([int(found[1], 16)])
    return piece.replace("\u2581", " ").encode()


# From a token's text in the vocabulary to its bytes, for the kinds of tokenizer that can stream text.
PIECE_BYTES: Mapping[str, Callable[[str], bytes]] = {
    "byte_level": _byte_level_bytes,
    "sentencepiece": _sentencepiece_bytes,
}


class TextStream:
    """Incremental detokenization: returns text as soon as it is certain, never part of a character, in linear time.

    The texts of `push` and `finish`, joined, are `Tokenizer.decode` of the ids.
    """

    def __init__(self, token_bytes: Callable[[int], bytes], *, strip_space: bool):
        """Begin a text.

        Args:
            token_bytes: returns the bytes of a token id.
            strip_space: whether a space at the beginning of the text is removed.
        """
        self._token_bytes, self._strip = token_bytes, strip_space
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token_id: int) -> str:
        """Return the characters that this token completes."""
        return self._strip_first(self._decoder.decode(self._token_bytes(token_id)))

    def finish(self) -> str:
        """Return the rest: U+FFFD for a character that is not complete."""
        return self._strip_first(self._decoder.decode(b"", final=True))

    def _strip_first(self, text: str) -> str:
        if self._strip and text:
            self._strip = False
            return text.removeprefix(" ")
        return text
