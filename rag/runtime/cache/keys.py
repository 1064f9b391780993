"""Cache keys: SHA-256 of a canonical encoding of plain values and dataclasses."""

import dataclasses
import hashlib
import math
import struct


def content_key(*parts: object) -> str:
    """Return the SHA-256 (64 hex digits) of a canonical, typed encoding of the parts.

    The parts may be None, bool, int, float, str, bytes, lists and tuples (which count as equal), dicts (in any order)
    and dataclasses (by the class's name and the fields), nested at will. 1, 1.0, "1" and True all differ, as do -0.0
    and 0.0.

    Raises:
        TypeError: a part is of another type. A path or an array must first be turned into a value that identifies it.
    """
    return hashlib.sha256(_encode(parts)).hexdigest()


def _encode(value: object) -> bytes:
    """Encode a value as tag, payload length, payload: two different values never share an encoding."""
    tag, payload = _tagged(value)
    return tag + struct.pack(">Q", len(payload)) + payload


def _tagged(value: object) -> tuple[bytes, bytes]:
    match value:
        case None:
            return b"n", b""
        case bool():  # before int: True is an int
            return b"b", b"1" if value else b"0"
        case int():
            return b"i", str(int(value)).encode()
        case float():  # all NaNs are encoded as one
            return b"f", struct.pack(">d", math.nan if math.isnan(value) else value)
        case str():
            return b"s", str(value).encode("utf-8", "surrogatepass")
        case bytes():
            return b"y", value
        case list() | tuple():
            return b"l", b"".join(_encode(item) for item in value)
        case dict():
            return b"d", b"".join(sorted(_encode(key) + _encode(item) for key, item in value.items()))
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        kind = type(value)
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return b"c", _encode(f"{kind.__module__}.{kind.__qualname__}") + _encode(fields)
    raise TypeError(f"content_key takes plain values and dataclasses, not {type(value).__name__}")
