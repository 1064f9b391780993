"""Read every chunk of an index once, so that answering with generator.kv_reuse=chunk reads only the question.

python scripts/prefill.py index.path=.demo/index
python scripts/generate.py index.path=.demo/index generator.kv_reuse=chunk question="..."

What is kept depends on the model, its dtype, and what the prompt's template puts before the passages. What is there
already stays: after a kill the same command goes on. Passages that a context joins are read when they are first shown.
The size is printed before anything is computed, and above `limit_gb` nothing is, unless force=true.
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from annotated_types import Gt, Le
from launch import launch
from settings import IndexFolder, Part, Shared, build

from rag.types import Hit, Message, UserError

if TYPE_CHECKING:
    from rag.context import ContextOptions
    from rag.generate import Generator
    from rag.generate.kv.chunk import ChunkKVStore
    from rag.index.store import Index
    from rag.prompt import PromptTemplate

_TOGETHER = 256  # chunks between two looks at what is missing
_GB = 10**9
Gigabytes = Annotated[float, Gt(0), Le(1e6)]


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """conf/prefill.yaml."""

    index: IndexFolder
    context: Part
    prompt: Part
    generator: Part
    limit_gb: Gigabytes
    force: bool


def main(config) -> None:
    from terminal import progress_bars

    from rag.generate.local import LocalGenerator
    from rag.index.store import Index

    index = Index.open(Path(config.index.path).expanduser())
    if config.generator.get("kv_reuse") in ("none", "prefix"):
        config.generator.kv_reuse = "chunk"  # blend reads the same files
    generator, template, context = (build(config[name]) for name in ("generator", "prompt", "context"))
    if not isinstance(generator, LocalGenerator):
        raise UserError("Only our own engine keeps passages: set generator=local.")
    batches = [range(at, min(at + _TOGETHER, len(index))) for at in range(0, len(index), _TOGETHER)]
    unread: dict[Path, int] = {}
    begin, computed, entries = time.perf_counter(), 0, {}
    with progress_bars() as update:
        for rows in batches:
            unread |= generator.chunks.unread(prompts(index, rows, template, context, generator))
            update("count", rows.stop, len(index))
    require_room(unread, generator.chunks.store, config.limit_gb, config.force)
    with progress_bars() as update:
        for rows in batches:
            done = generator.chunks.fill(prompts(index, rows, template, context, generator))
            computed += done.computed
            entries |= done.sizes
            update("read", rows.stop, len(index))
    tokens, nbytes = (sum(column) for column in zip(*entries.values(), strict=True))
    print(
        f"{len(entries)} texts of {len(index)} chunks ({computed} read anew), {tokens} tokens, {nbytes / 1e6:.1f} MB "
        f"in {time.perf_counter() - begin:.1f} s -> {generator.chunks.store.folder}"
    )


def require_room(unread: Mapping[Path, int], store: ChunkKVStore, limit_gb: float, force: bool) -> None:
    """Print how many bytes the files of so many tokens will take. Raises UserError above the limit, without `force`."""
    tokens, nbytes = sum(unread.values()), sum(unread.values()) * store.token_bytes
    print(
        f"{len(unread)} texts of {tokens} tokens to read, at {store.token_bytes / 1e3:.1f} kB a token: "
        f"about {nbytes / 1e6:.1f} MB -> {store.folder}",
        flush=True,
    )
    if nbytes > limit_gb * _GB and not force:
        raise UserError(
            f"That is {nbytes / _GB:.2g} GB, more than limit_gb={limit_gb:g}: add force=true to write it all the same, "
            "or generator.kv_dtype=int8 for half of it."
        )


def prompts(
    index: Index, rows: range, template: PromptTemplate, options: ContextOptions, generator: Generator
) -> Iterator[list[Message]]:
    """A prompt for each of these chunks, shown alone."""
    from rag.context import build_context
    from rag.prompt import render, render_passage

    for chunk in index.chunks(rows):
        context = build_context(
            [Hit(chunk, 1.0)],
            index.document_text,
            replace(options, min_score=None),
            generator.count,
            lambda source: render_passage(template, source) + template.separator,
        )
        yield render(template, "", context)


if __name__ == "__main__":
    launch(main, "prefill", Settings)
