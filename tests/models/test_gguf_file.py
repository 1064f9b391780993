"""GGUF headers are read as the gguf library reads them, and damaged ones raise one sentence."""

import struct

import gguf
import numpy as np
import pytest
from gguf import GGUFReader
from hypothesis import given
from hypothesis import strategies as st

from rag.models import gguf_file, tensor_files
from rag.types import UserError
from tests.one_sentence import is_one_sentence
from tests.trials import tries

U32, STRING, ARRAY = 4, 8, 9


def text(value: bytes) -> bytes:
    return struct.pack("<Q", len(value)) + value


def header(tensors: int, *entries: bytes, version: int = 3, count: int | None = None) -> bytes:
    return (
        b"GGUF"
        + struct.pack("<IQQ", version, tensors, len(entries) if count is None else count)
        + b"".join(entries)
    )


def entry(key: bytes, kind: int, value: bytes) -> bytes:
    return text(key) + struct.pack("<I", kind) + value


def tensor(name: bytes, shape: tuple[int, ...], kind: int = 0, offset: int = 0) -> bytes:
    return text(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, kind, offset)


def array(kind: int, count: int, items: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + items


ENTRY = entry(b"a", U32, struct.pack("<I", 1))
DAMAGED = {
    "it does not begin with GGUF": b"GGUE" + header(0)[4:],
    "its version is 99": header(0, version=99),
    "its version is 50331648": header(0, version=3 << 24),  # of the other byte order
    "it has 1,152,921,504,606,846,976 tensors": header(2**60),
    "it has 18,446,744,073,709,551,615 entries": header(0, count=2**64 - 1),
    "it has 3 entries": header(0, count=3),
    "it ends inside a key": header(0, struct.pack("<Q", 2**63) + b"a" * 30),
    "a key is not UTF-8, after byte 32": header(0, entry(b"\xff\xfe", U32, b"\0" * 4)),
    "the key 'a' occurs twice": header(0, ENTRY, ENTRY),
    "the value of 'a' is of the unknown type 77": header(0, entry(b"a", 77, b"\0" * 8)),
    "a text of 'a' is not UTF-8": header(0, entry(b"a", ARRAY, array(STRING, 1, text(b"\xc3\x28")))),
    "the array 'a' has 1,152,921,504,606,846,976 items": header(0, entry(b"a", ARRAY, array(0, 2**60))),
    "it ends inside the value of 'a'": header(0, entry(b"a", ARRAY, array(0, 4_000_000))),
    "the array 'a' is one of arrays": header(0, entry(b"a", ARRAY, array(ARRAY, 1) * 50)),
    "general.alignment is 0": header(0, entry(b"general.alignment", U32, b"\0" * 4)),
    "general.alignment is 'x'": header(0, entry(b"general.alignment", STRING, text(b"x"))),
    "has 4,294,967,295 dimensions": header(1) + text(b"t") + b"\xff" * 40,
    "has the shape (0, 4)": header(1) + tensor(b"t", (4, 0)) + b"\0" * 64,
    "of type Q8_0 has the shape (4, 33)": header(1) + tensor(b"t", (33, 4), 8) + b"\0" * 999,
    "is of the unknown type 4": header(1) + tensor(b"t", (4,), 4) + b"\0" * 64,  # Q4_2, which is no more
    "whose shape is (4294967296, 4294967296)": header(1) + tensor(b"t", (2**32, 2**32)) + b"\0" * 64,
    "it ends inside the tensor 't'": header(1) + tensor(b"t", (4,), 0, 2**63) + b"\0" * 64,
    "the tensor 't' occurs twice": header(2) + tensor(b"t", (4,)) * 2 + b"\0" * 64,
    "cannot mmap an empty file": b"",
}  # fmt: skip


@pytest.mark.parametrize("message", DAMAGED)
def test_damaged_headers_are_errors(tmp_path, message):
    path = tmp_path / "model.gguf"
    path.write_bytes(DAMAGED[message])
    with pytest.raises(UserError) as caught:
        gguf_file.read(path)
    assert message in str(caught.value)
    assert is_one_sentence(str(caught.value))


VALUES = st.one_of(
    st.integers(0, 2**32 - 1), st.floats(width=32, allow_nan=False), st.booleans(), st.text(min_size=1, max_size=9),
    st.lists(st.text(max_size=5), min_size=1, max_size=5), st.lists(st.integers(-9, 9), min_size=1, max_size=5),
)  # fmt: skip
KEYS = st.text("abc.", min_size=1, max_size=8)


@tries(25, 1000)
@given(
    st.dictionaries(KEYS, VALUES, max_size=5),
    st.integers(1, 4),
    st.sampled_from(["F32", "F16", "Q8_0", "Q4_1"]),
)
def test_what_the_library_writes_is_read_as_it_reads_it(tmp_path_factory, values, rows, kind):
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    add = {int: writer.add_uint32, float: writer.add_float32, bool: writer.add_bool, str: writer.add_string}
    for key, value in values.items():
        add.get(type(value), writer.add_array)(key, value)
    numbers = np.random.default_rng(rows).normal(size=(rows, 64)).astype(np.float32)
    raw = gguf.GGMLQuantizationType[kind]
    writer.add_tensor("first", np.arange(3, dtype=np.float32))
    writer.add_tensor("second", gguf.quantize(numbers, raw), raw_dtype=raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    theirs = GGUFReader(path)
    metadata, tensors = tensor_files.read_gguf(path)
    fields = {name: field.contents() for name, field in theirs.fields.items() if not name.startswith("GGUF.")}
    assert metadata == fields
    assert list(tensors) == [tensor.name for tensor in theirs.tensors]
    for tensor in theirs.tensors:
        np.testing.assert_array_equal(tensors[tensor.name], gguf.dequantize(tensor.data, tensor.tensor_type))


@pytest.mark.weights
def test_the_default_generator_is_read_as_the_library_reads_it(generator_weights):
    theirs = GGUFReader(generator_weights)
    metadata, tensors = tensor_files.read_gguf(generator_weights)
    assert metadata == {k: f.contents() for k, f in theirs.fields.items() if not k.startswith("GGUF.")}
    assert len(tensors) == len(theirs.tensors)
    last = theirs.tensors[-1]
    np.testing.assert_array_equal(tensors[last.name], gguf.dequantize(last.data, last.tensor_type))
