"""Show or clean the cache: everything in it is computed again when it is needed, or fetched, as weights are.

python scripts/cache.py
python scripts/cache.py action=clean kind=converted older_than_days=30
"""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Literal

from annotated_types import Ge, Le
from launch import launch
from settings import Shared

from rag.runtime.cache import eviction
from rag.runtime.cache.eviction import KINDS, Entry
from rag.runtime.cache.folder import cache_root, write_errors
from rag.runtime.files import discard

_DAY_S = 86_400
Days = Annotated[float, Ge(0), Le(1e5)]


@dataclass(frozen=True, kw_only=True)
class CacheSettings(Shared):
    """The settings of conf/cache.yaml."""

    action: Literal["info", "clean"]
    kind: Literal[KINDS] | None
    older_than_days: Days | None


def main(config) -> None:
    kinds = [config.kind] if config.kind else KINDS
    if config.action == "clean" and not config.kind:
        kinds = [kind for kind in kinds if kind != eviction.WEIGHTS]
    youngest = time.time() - (config.older_than_days or 0) * _DAY_S
    entries = [entry for entry in eviction.entries(kinds) if entry.used <= youngest]
    if config.action == "info":
        show(entries)
        print(
            f"{_size(entries)} of at most {eviction.size_limit() / 1e9:g} GB (RAG_CACHE_GB) in {cache_root()}"
        )
        return
    with write_errors():
        for entry in entries:
            discard(entry.path)
    plural = "y" if len(entries) == 1 else "ies"
    print(f"removed {len(entries)} entr{plural}, {_size(entries)}, from {cache_root()}")


def show(entries: Sequence[Entry]) -> None:
    """Print a line for each kind of entry."""
    from rich.console import Console
    from rich.table import Table

    table = Table("kind")
    for heading in ("entries", "size", "last use"):
        table.add_column(heading, justify="right")
    for kind in dict.fromkeys(entry.kind for entry in entries):
        some = [entry for entry in entries if entry.kind == kind]
        last = time.strftime("%Y-%m-%d %H:%M", time.localtime(max(entry.used for entry in some)))
        table.add_row(kind, str(len(some)), _size(some), last)
    Console().print(table)


def _size(entries: Sequence[Entry]) -> str:
    return f"{sum(entry.nbytes for entry in entries) / 1e6:,.1f} MB"


if __name__ == "__main__":
    launch(main, "cache", CacheSettings)
