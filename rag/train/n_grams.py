"""Hash all n-grams of words, to find those that texts share.

Letters: W words of all texts, n n-grams.
"""

import numpy as np
from jaxtyping import Int, UInt64

_BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that is the hash of an n-gram; an odd number


def n_grams(
    words: Int[np.ndarray, "W"], owners: Int[np.ndarray, "W"], size: int
) -> tuple[UInt64[np.ndarray, "n"], Int[np.ndarray, "n"]]:
    """Return the 64-bit hash of each n-gram, and the position of its first word.

    Args:
        words: The ids of the words of all texts, one text after another.
        owners: The number of the text that each word is in; no n-gram is in two texts.
        size: The words of an n-gram.
    """
    count = max(0, len(words) - size + 1)
    hashes = np.zeros(count, np.uint64)
    for i in range(size):  # Horner's scheme, modulo 2^64
        hashes = hashes * _BASE + words[i : i + count].astype(np.uint64) + np.uint64(1)
    starts = np.flatnonzero(owners[:count] == owners[len(words) - count :])
    return hashes[starts], starts
