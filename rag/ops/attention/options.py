"""The options of attention that are static under jit."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class BlockSizes:
    """The sizes of a tile of scores: q query positions of every head in a group, against k keys.

    `pairs` is the number of pairs of batch row and kv head that are processed at once; None: all of them.
    """

    q: int = 128
    k: int = 128
    pairs: int | None = None


@dataclass(frozen=True, slots=True)
class AttentionOptions:
    """The static options of one call; every implementation takes them.

    With `causal` key j is visible only if j <= i, with `window` only if |i - j| < window, for the query at position
    i. With `from_start` query i is at position i in every row. `blocks` is for "flash"; None chooses by the
    shapes.
    """

    causal: bool
    window: int | None
    scale: float
    from_start: bool
    blocks: BlockSizes | None
