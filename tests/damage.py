"""Damage files in the ways in which files on a disk are damaged."""

from collections.abc import Callable
from pathlib import Path

from hypothesis import strategies as st


def flip(path: Path, at: int, bit: int = 0) -> None:
    """Flip one bit of byte `at`, counted modulo the file's size."""
    data = bytearray(path.read_bytes())
    data[at % len(data)] ^= 1 << bit
    path.write_bytes(data)


def cut(path: Path, at: int) -> None:
    """Truncate the file to `at` bytes, counted modulo its size."""
    data = path.read_bytes()
    path.write_bytes(data[: at % len(data)])


def drawn_damage(path: Path, data: st.DataObject) -> None:
    """Flip a bit of the file, truncate it, or append to it; the numbers that are drawn do not depend on the file."""
    way, at = data.draw(st.sampled_from(["flip", "cut", "add"])), data.draw(st.integers(-40, 10**6))
    match way:
        case "flip":
            flip(path, at, data.draw(st.integers(0, 7)))
        case "cut":
            cut(path, at)
        case "add":
            path.write_bytes(path.read_bytes() + data.draw(st.binary(min_size=1, max_size=40)))


# Some damages of each kind, by name, for loops over the files of a cache.
WAYS: dict[str, Callable[[Path], None]] = {
    "first byte": lambda path: flip(path, 0),
    "middle": lambda path: flip(path, path.stat().st_size // 2, 6),
    "last byte": lambda path: flip(path, -1, 7),
    "half": lambda path: cut(path, path.stat().st_size // 2),
    "empty": lambda path: path.write_bytes(b""),
    "gone": lambda path: path.unlink(),
}
