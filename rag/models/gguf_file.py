"""Read GGUF headers strictly: every count, length and offset is compared with the file's size first.

    magic "GGUF" | version, uint32 | number of tensors, uint64 | number of entries, uint64
    entry:  key, string | type, uint32 | value; an array is a type, a length, and its values
    tensor: name, string | dimensions, uint32 | each, uint64, the fastest first | type, uint32 | offset, uint64
    padding to general.alignment | the tensors' data, each at its offset from here

A string is its length, uint64, and its UTF-8 bytes. Source: github.com/ggml-org/ggml, docs/gguf.md. The reader of the
gguf library is not used, because it continues past the end of a file for as long as a damaged count says.
"""

import math
import mmap
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rag.runtime.records import reason
from rag.runtime.shapes import round_up
from rag.types import UserError

MAGIC = b"GGUF"
VERSIONS = (2, 3)

_MAX_ITEMS = 1 << 22  # of all arrays in the header: the largest vocabularies have a million tokens
_MAX_ENTRIES = 1 << 16
_MAX_TENSORS = 1 << 16
_MAX_DIMENSIONS = 4
_ALIGNMENT = 32  # bytes, unless the file says otherwise

_STRING, _ARRAY = 8, 9
_SCALARS = {  # numpy's dtypes by the numbers of types
    0: "<u1", 1: "<i1", 2: "<u2", 3: "<i2", 4: "<u4", 5: "<i4", 6: "<f4", 7: "?", 10: "<u8", 11: "<i8", 12: "<f8",
}  # fmt: skip


class _BadHeader(Exception):
    """The header does not follow the format; the message says where."""


@dataclass(frozen=True, slots=True)
class Tensor:
    """A tensor in the file."""

    name: str
    kind: Any  # gguf.GGMLQuantizationType
    shape: tuple[int, ...]  # of the numbers, the slowest dimension first
    data: np.ndarray  # of the bytes, uint8: as `shape`, with a row's bytes in the last dimension


def read(path: Path) -> tuple[dict[str, Any], Mapping[str, Tensor]]:
    """Memory-map a GGUF file and return (metadata as plain Python values, tensors by name).

    Raises:
        UserError: the file is not a GGUF file, or its header does not fit its size.
    """
    try:
        with path.open("rb") as file:
            content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        return _HeaderReader(content).read()
    except (OSError, ValueError, _BadHeader) as error:  # ValueError: an empty file
        raise UserError(f"cannot read {path} as GGUF ({reason(error)}); fetch the file again") from error


def is_gguf(path: Path) -> bool:
    """Whether the file begins with GGUF's magic number (the names of Ollama's files have no ending)."""
    if not path.is_file():
        return False
    with path.open("rb") as file:
        return file.read(len(MAGIC)) == MAGIC


class _HeaderReader:
    """Reads a header from its beginning to its end."""

    def __init__(self, content: mmap.mmap):
        self._content, self._at, self._items = content, 0, 0

    def read(self) -> tuple[dict[str, Any], dict[str, Tensor]]:
        if self._bytes(4, "the magic number") != MAGIC:
            raise _BadHeader("it does not begin with GGUF")
        if (version := self._number("<I", "the version")) not in VERSIONS:
            raise _BadHeader(f"its version is {version}, and {' and '.join(map(str, VERSIONS))} are known")
        tensors = self._count("<Q", "tensors", 24, _MAX_TENSORS)
        entries = self._count("<Q", "entries", 13, _MAX_ENTRIES)
        metadata: dict[str, Any] = {}
        for _ in range(entries):
            key = self._string("a key")
            if key in metadata:
                raise _BadHeader(f"the key {_short(key)} occurs twice")
            metadata[key] = self._value(key, self._number("<I", f"the type of {_short(key)}"))
        return metadata, self._tensors(tensors, self._alignment(metadata))

    def _alignment(self, metadata: Mapping[str, Any]) -> int:
        alignment = metadata.get("general.alignment", _ALIGNMENT)
        if type(alignment) is not int or not 0 < alignment <= 1 << 20 or alignment & (alignment - 1):
            raise _BadHeader(f"general.alignment is {_short(alignment)}, which is no power of two")
        return alignment

    def _bytes(self, count: int, what: str) -> bytes:
        self._require(count, what)
        self._at += count
        return self._content[self._at - count : self._at]

    def _require(self, count: int, what: str) -> None:
        if count > len(self._content) - self._at:
            raise _BadHeader(f"it ends inside {what}, after byte {self._at}")

    def _number(self, form: str, what: str) -> int:
        return struct.unpack(form, self._bytes(struct.calcsize(form), what))[0]

    def _count(self, form: str, what: str, least_bytes: int, most: int) -> int:
        """Return how many of something follow. Raises _BadHeader if the file has no room for so many."""
        count = self._number(form, f"the number of {what}")
        if count > most or count * least_bytes > len(self._content):
            raise _BadHeader(f"it says that it has {count:,} {what}")
        return count

    def _string(self, what: str) -> str:
        data = self._bytes(self._number("<Q", what), what)
        try:
            return data.decode("utf-8")
        except UnicodeDecodeError as error:
            raise _BadHeader(f"{what} is not UTF-8, after byte {self._at - len(data)}") from error

    def _value(self, key: str, kind: int) -> Any:
        if kind == _STRING:
            return self._string(f"the value of {_short(key)}")
        if kind == _ARRAY:
            return self._array(key)
        return self._scalars(key, kind, 1)[0]

    def _scalars(self, key: str, kind: int, count: int) -> list[Any]:
        if kind not in _SCALARS:
            raise _BadHeader(f"the value of {_short(key)} is of the unknown type {kind}")
        dtype = np.dtype(_SCALARS[kind])
        data = self._bytes(count * dtype.itemsize, f"the value of {_short(key)}")
        if dtype.kind == "b":
            return (np.frombuffer(data, np.uint8) != 0).tolist()
        return np.frombuffer(data, dtype).tolist()

    def _array(self, key: str) -> list[Any]:
        kind = self._number("<I", f"the type of {_short(key)}")
        count = self._number("<Q", f"the length of {_short(key)}")
        self._items += count
        if self._items > _MAX_ITEMS:
            raise _BadHeader(
                f"the array {_short(key)} has {count:,} items; {_MAX_ITEMS:,} are read of all arrays"
            )
        if kind == _ARRAY:
            raise _BadHeader(f"the array {_short(key)} is one of arrays")
        if kind != _STRING:
            return self._scalars(key, kind, count)
        self._require(8 * count, f"the value of {_short(key)}")
        what = f"a text of {_short(key)}"
        return [self._string(what) for _ in range(count)]

    def _tensors(self, count: int, alignment: int) -> dict[str, Tensor]:
        found = [self._tensor() for _ in range(count)]
        start = round_up(self._at, alignment)
        tensors: dict[str, Tensor] = {}
        for name, shape, kind, offset in found:
            if name in tensors:
                raise _BadHeader(f"the tensor {_short(name)} occurs twice")
            tensors[name] = self._placed(name, shape, kind, start + offset)
        return tensors

    def _tensor(self) -> tuple[str, tuple[int, ...], int, int]:
        name = self._string("a tensor's name")
        what = f"the description of the tensor {_short(name)}"
        dimensions = self._number("<I", what)
        if not 1 <= dimensions <= _MAX_DIMENSIONS:
            raise _BadHeader(f"the tensor {_short(name)} has {dimensions:,} dimensions")
        shape = tuple(self._number("<Q", what) for _ in range(dimensions))[::-1]
        return name, shape, self._number("<I", what), self._number("<Q", what)

    def _placed(self, name: str, shape: tuple[int, ...], number: int, start: int) -> Tensor:
        from gguf import GGML_QUANT_SIZES, GGMLQuantizationType  # here: the package is large

        try:
            kind = GGMLQuantizationType(number)
            block, size = GGML_QUANT_SIZES[kind]
        except (ValueError, KeyError) as error:
            raise _BadHeader(f"the tensor {_short(name)} is of the unknown type {number}") from error
        if 0 in shape or shape[-1] % block:
            raise _BadHeader(f"the tensor {_short(name)} of type {kind.name} has the shape {_short(shape)}")
        nbytes = math.prod(shape) // block * size
        if start + nbytes > len(self._content):
            raise _BadHeader(f"it ends inside the tensor {_short(name)}, whose shape is {_short(shape)}")
        data = np.frombuffer(self._content, np.uint8, nbytes, start)
        return Tensor(name, kind, shape, data.reshape(*shape[:-1], shape[-1] // block * size))


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}..."
