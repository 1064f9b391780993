"""The one place that rounds array sizes up, so that few programs are compiled."""


def next_power_of_two(n: int) -> int:
    """The least power of two that is not below n."""
    return 1 << (n - 1).bit_length()


def round_up_text(length: int, longest: int) -> int:
    """The next multiple of 16 up to 128 tokens, of 32 up to 256, of 64 beyond, but no more than `longest`."""
    grain = 16 if length <= 128 else 32 if length <= 256 else 64
    return min(-(-length // grain) * grain, longest)


def round_up_prompt(length: int) -> int:
    """The padded length for `length` tokens: steps of 64 to 512, of 128 to 2,048, then of 512."""
    step = 64 if length <= 512 else 128 if length <= 2048 else 512
    return max(step, -(-length // step) * step)


def round_up_suffix(count: int) -> int:
    """The padded number of tokens read behind a cache: powers of two to 64, then as `bucket`."""
    return max(8, 1 << (count - 1).bit_length()) if count <= 64 else round_up_prompt(count)


CAPACITY = 512  # for the same reason the cache has a multiple of so many slots, or below it a power of two


def round_up_cache(tokens: int) -> int:
    """The cache's capacity for that many tokens a row."""
    if tokens <= CAPACITY:
        return max(128, 1 << (tokens - 1).bit_length())
    return -(-tokens // CAPACITY) * CAPACITY
