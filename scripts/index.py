"""What an index holds, and whether it is still what was written.

python scripts/index.py index.path=.demo/index
python scripts/index.py index.path=.demo/index action=verify
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch import launch
from settings import IndexFolder, Shared

if TYPE_CHECKING:
    from rag.index.store import Index


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """conf/index.yaml."""

    index: IndexFolder
    action: Literal["info", "verify"]


def main(config) -> None:
    from rag.index.store import Index

    index = Index.open(Path(config.index.path).expanduser())
    for line in info(index):
        print(line)
    if config.action == "verify":
        begin = time.perf_counter()
        index.check()
        seconds = time.perf_counter() - begin
        print(f"all {len(index.manifest.files)} files are as they were written ({seconds:.2f} s)")


def info(index: Index) -> list[str]:
    """What an index holds, and what made it, a line each."""
    manifest = index.manifest
    made_by = manifest.embedder.spec.get("uri", manifest.embedder.spec.get("kind"))
    return [
        f"{manifest.documents} documents, {manifest.chunks} chunks, {index.nbytes / 1e6:.1f} MB in {index.path}",
        f"vectors of {manifest.dim} numbers by {made_by}",
        *(f"{name} {value}" for name, value in manifest.settings.items()),
        f"postings: {'none' if (lexical := index.lexical) is None else lexical.analyzer}",
        f"generation {manifest.generation}, written {manifest.environment.get('date', 'at an unknown time')}",
    ]


if __name__ == "__main__":
    launch(main, "index", Settings)
