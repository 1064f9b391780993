"""Checksums find every changed byte, at sizes on both sides of every piece's end."""

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from rag.runtime.checksums import (
    PIECE,
    CheckedFile,
    Damaged,
    append_checksum,
    memory_map,
    piece_checksums,
    read_verified,
    verify_file,
)
from tests.trials import tries

SIZES = [0, 1, PIECE - 1, PIECE, PIECE + 1, 2 * PIECE, 3 * PIECE + 5]
TRAILER = 32


def content_of(size: int) -> bytes:
    return np.random.default_rng(size).integers(0, 256, size, dtype=np.uint8).tobytes()


def flipped(content: bytes, position: int, change: int) -> bytes:
    return content[:position] + bytes([content[position] ^ change]) + content[position + 1 :]


def sealed(path, content: bytes) -> bytes:
    with path.open("wb") as file:
        file.write(content)
        append_checksum(file)
    return path.read_bytes()


@pytest.mark.parametrize("size", SIZES)
def test_a_whole_file_passes(tmp_path, size):
    path = tmp_path / "file"
    path.write_bytes(content_of(size))
    file = CheckedFile(path, size, piece_checksums(path))
    file.check()
    assert bytes(file.content) == content_of(size)
    whole = sealed(path, content_of(size))
    assert whole[:-TRAILER] == read_verified(path) == content_of(size)
    verify_file(path)


@tries(suite=200, long=5000)
@given(data=st.data(), size=st.sampled_from(SIZES[1:]), change=st.integers(1, 255))
def test_a_changed_byte_fails_in_its_piece_alone(tmp_path_factory, data, size, change):
    path = tmp_path_factory.getbasetemp() / "flipped"
    path.write_bytes(content_of(size))
    sums = piece_checksums(path)
    ends = [0, size - 1, *(at for piece in range(PIECE, size, PIECE) for at in (piece - 1, piece))]
    position = data.draw(st.one_of(st.sampled_from(ends), st.integers(0, size - 1)))
    start = data.draw(st.one_of(st.sampled_from(ends), st.integers(0, size)))
    stop = data.draw(st.one_of(st.sampled_from(ends), st.integers(start, size)))
    path.write_bytes(flipped(path.read_bytes(), position, change))
    file = CheckedFile(path, size, sums)
    touches = start < stop and start // PIECE <= position // PIECE <= (stop - 1) // PIECE
    for _ in range(2):  # a piece that failed is not remembered as one that passed
        if touches:
            with pytest.raises(Damaged, match="has changed since it was written"):
                file.check(start, stop)
        else:
            file.check(start, stop)


def test_other_sizes_and_missing_files(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(content_of(PIECE + 1))
    sums = piece_checksums(path)
    with pytest.raises(ValueError, match="65536 bytes have 1 checksums, not 2"):
        CheckedFile(path, PIECE, sums)
    for content in (b"", content_of(PIECE), content_of(PIECE + 2)):
        path.write_bytes(content)
        with pytest.raises(Damaged, match=f"file has {len(content)} bytes instead of 65537"):
            CheckedFile(path, PIECE + 1, sums)
    path.unlink()
    with pytest.raises(Damaged, match="file is missing"):
        CheckedFile(path, PIECE + 1, sums)


@tries(suite=200, long=5000)
@given(data=st.data(), size=st.sampled_from(SIZES), change=st.integers(1, 255))
@example(data=None, size=0, change=1)
def test_a_file_that_is_not_as_it_was_written(tmp_path_factory, data, size, change):
    path = tmp_path_factory.getbasetemp() / "sealed"
    whole = sealed(path, content_of(size))
    positions = st.one_of(st.integers(0, len(whole) - 1), st.integers(size, len(whole) - 1))
    position = len(whole) - 1 if data is None else data.draw(positions)
    for damaged in (
        flipped(whole, position, change),
        whole[:position],
        whole + whole[position:],
        whole[position + 1 :],
    ):
        path.write_bytes(damaged)
        for read in (verify_file, read_verified):
            with pytest.raises(Damaged, match=r"sealed (is cut short|has changed since it was written)"):
                read(path)
    with pytest.raises(FileNotFoundError):
        verify_file(path.with_name("nowhere"))


def test_numpy_ignores_the_trailer(tmp_path):
    path, array = tmp_path / "array.npy", np.arange(1000, dtype=np.float32).reshape(10, 100)
    with path.open("wb") as file:
        np.save(file, array)
        append_checksum(file)
    verify_file(path)
    np.testing.assert_array_equal(np.load(path, mmap_mode="r"), array)


def test_a_map_is_closed_behind_the_block(tmp_path):
    path = tmp_path / "file"
    path.write_bytes(b"abc")
    with memory_map(path) as content:
        assert bytes(content) == b"abc"
    with pytest.raises(ValueError, match="released memoryview"):
        content[0]
