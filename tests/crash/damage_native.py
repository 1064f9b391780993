"""Damage the native library in the cache, then load and call it in a new process.

Its results are those of the undamaged library, or it is not used.
"""

import random
import shutil
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np

from rag.runtime.cache.folder import cache_root
from tests.crash import campaign
from tests.crash.campaign import Trial
from tests.crash.damage import damage, linked, verdict
from tests.crash.trap import forked
from tests.crash.workloads import enter


def _call(home: Path) -> bytes | None:
    """Return a product with int8 weights, or None if there is no native library."""
    from rag import native  # it starts JAX, which the process that forks must not do

    enter(home)
    if not native.available():
        return None
    draw = np.random.default_rng(0)
    values = draw.integers(-127, 128, (96, 64)).astype(np.int8)
    scale, x = draw.random(96, np.float32), draw.random((5, 64), np.float32)
    return np.asarray(native.linear(x, values, scale)).tobytes()


def _used(home: Path) -> str | None:
    """Return the file name of the library that `_call` uses."""
    from rag.native import build

    enter(home)
    return path.name if (path := build.library()) else None


def trials(first: int, count: int, folder: Path) -> Iterator[Trial]:
    home = folder / "home"
    if (
        built := cache_root() / "native"
    ).exists():  # copied from the machine's own cache, because building is slow
        shutil.copytree(built, home / "cache" / "native")
    wanted, used = (forked(partial(call, home)).result for call in (_call, _used))
    for number in range(first, count if wanted is not None else first):
        trial_folder = folder / f"trial {number}"
        linked(home, trial_folder)
        done, damaged = damage(random.Random(f"native {number}"), [trial_folder / "cache" / "native" / used])
        campaign.begin(number, done)
        ended = forked(partial(_call, trial_folder))
        if ended.signal:
            yield Trial(number, "hang" if ended.hung else "crash", done, f"signal {ended.signal}")
        elif ended.result is None and ended.error is None:
            yield Trial(number, "refused", done, "XLA does its work")
        else:
            yield Trial(number, *verdict([wanted], [ended.error or ended.result], damaged, done))
        shutil.rmtree(trial_folder)


if __name__ == "__main__":
    campaign.main(trials)
