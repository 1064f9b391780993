"""Round array sizes up: the one place that does so.

XLA compiles a program for every combination of array sizes, which takes from milliseconds to seconds. Arrays are
therefore padded to a few sizes. Powers of two give the fewest programs and waste up to half of an array; multiples
give more programs and waste less.
"""

from typing import Any

_CACHE_STEP = 512  # slots: a KV cache of at least so many has a multiple of them


def next_power_of_two(n: int, least: int = 1) -> int:
    """Return the least power of two that is not below n, or `least` if that is larger."""
    return max(least, 1 << max(n - 1, 0).bit_length())


def previous_power_of_two(n: int) -> int:
    """Return the greatest power of two that is not above n >= 1.

    For the number of rows in a batch: full batches then need no padding rows.
    """
    return 1 << (n.bit_length() - 1)


def power_of_two_near_sqrt(n: int) -> int:
    """Return a power of two within a factor of 2 of the square root of n; 1 for n = 0.

    For the group size of a two-level search: it balances the number of groups and the number of members to look at.
    """
    return 1 << (n.bit_length() // 2)


def ceil_div(n: Any, divisor: int) -> Any:
    """Return n / divisor rounded up, for an int or an array of integers."""
    return -(-n // divisor)


def round_up(n: int, multiple: int) -> int:
    """Return the least multiple of `multiple` that is not below n."""
    return ceil_div(n, multiple) * multiple


def round_up_text(length: int, longest: int) -> int:
    """Return the padded length of texts to embed or score, no more than `longest`.

    Multiples of 16 up to 128 tokens, of 32 up to 256, of 64 beyond: texts of like lengths share a batch.
    """
    return min(round_up(length, 16 if length <= 128 else 32 if length <= 256 else 64), longest)


def round_up_prompt(length: int) -> int:
    """Return the padded length of prompts: multiples of 64 up to 512 tokens, of 128 up to 2,048, then of 512."""
    step = 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, round_up(length, step))


def round_up_suffix(count: int) -> int:
    """Return the padded number of tokens to prefill after a cached prefix.

    Powers of two from 8 to 64, then as `round_up_prompt`: a suffix is often a few tokens long.
    """
    return next_power_of_two(count, least=8) if count <= 64 else round_up_prompt(count)


def round_up_cache(tokens: int) -> int:
    """Return the capacity of a KV cache in slots for so many tokens a row.

    Powers of two from 128 to 512, then multiples of 512: every decode step is compiled for the capacity.
    """
    return next_power_of_two(tokens, least=128) if tokens <= _CACHE_STEP else round_up(tokens, _CACHE_STEP)
