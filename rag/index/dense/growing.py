"""Arrays on the device that grow along one axis: the room doubles, so that appending hardly ever compiles.

C capacity (room along the growing axis), n new entries
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Num

LEAST = 4  # the smallest bucket: below 4 rows int8 and bfloat16 products fall off their fast path


def _round_up(count: int, least: int = LEAST) -> int:
    """The power of two, at least `least`, that holds `count`: so many sizes share few programs."""
    return max(least, 1 << (count - 1).bit_length())


class Growing:
    """An array of which the first `live` entries along `axis` count; the others are room, of any value."""

    def __init__(self, values: Array, axis: int = 0):
        self.values, self.axis, self.live = values, axis, values.shape[axis]
        self._ours = False  # the first array may share the caller's memory: it is never written to

    def append(self, new: Num[np.ndarray, "..."]) -> None:
        """Write `new` behind the live entries. Full room doubles; otherwise nothing is copied or compiled."""
        count = new.shape[self.axis]
        widths = [(0, 0)] * new.ndim
        widths[self.axis] = (0, _round_up(count) - count)
        padded = np.pad(new, widths)  # written too: a later addition overwrites it
        needed = self.live + padded.shape[self.axis]
        if not self._ours or needed > self.values.shape[self.axis]:
            self.values = _grown(self.values, max(needed, 2 * self.live), self.axis)
            self._ours = True
        self.values = _append(self.values, padded, np.int32(self.live), self.axis)
        self.live += count


@partial(jax.jit, static_argnames=("capacity", "axis"))
def _grown(values: Num[Array, "..."], capacity: int, axis: int) -> Num[Array, "..."]:
    widths = [(0, 0)] * values.ndim
    widths[axis] = (0, capacity - values.shape[axis])
    return jnp.pad(values, widths)


@partial(jax.jit, static_argnames="axis", donate_argnames="buffer")
def _append(
    buffer: Num[Array, "..."], new: Num[Array, "..."], live: Int[Array, ""], axis: int
) -> Num[Array, "..."]:
    """Write in place (the buffer is donated: undonated, all of it would be copied)."""
    return jax.lax.dynamic_update_slice_in_dim(buffer, new, live, axis)
