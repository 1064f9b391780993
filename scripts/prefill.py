"""Prefill every chunk of an index once, so that generator.kv_reuse=chunk prefills only the rest of a prompt.

python scripts/prefill.py index.path=.demo/index
python scripts/generate.py index.path=.demo/index generator.kv_reuse=chunk question="..."

The cached keys and values depend on the model, its dtype, and what the prompt's template puts before the passages.
Files that exist already are not computed again: after a kill the same command continues. Passages that a context joins
are prefilled when they are first shown. The size is printed before anything is computed; above `limit_gb` nothing is
computed, unless force=true.
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
    from rag.generate.kv.chunk_store import ChunkKVStore
    from rag.index.store import Index
    from rag.prompt import PromptTemplate

_BATCH = 256  # chunks that are checked, or prefilled, together
_GB = 10**9
Gigabytes = Annotated[float, Gt(0), Le(1e6)]


@dataclass(frozen=True, kw_only=True)
class PrefillSettings(Shared):
    """The settings of conf/prefill.yaml."""

    index: IndexFolder
    context: Part
    prompt: Part
    generator: Part
    limit_gb: Gigabytes
    force: bool


def main(config) -> None:
    from terminal import progress_bars

    from rag.generate.kv.chunk import ChunkPrefiller
    from rag.generate.local import LocalGenerator
    from rag.index.store import Index

    index = Index.open(Path(config.index.path).expanduser())
    if config.generator.get("kv_reuse") in ("none", "prefix"):
        config.generator.kv_reuse = "chunk"  # blend uses the same files
    generator, template, context = (build(config[name]) for name in ("generator", "prompt", "context"))
    if not isinstance(generator, LocalGenerator) or not isinstance(generator.prefiller, ChunkPrefiller):
        raise UserError("Only our own engine caches passages: set generator=local.")
    chunks = generator.prefiller.cache
    batches = [range(at, min(at + _BATCH, len(index))) for at in range(0, len(index), _BATCH)]
    missing: dict[Path, int] = {}
    begin, computed, entries = time.perf_counter(), 0, {}
    with progress_bars() as update:
        for rows in batches:
            missing |= chunks.missing(prompts(index, rows, template, context, generator))
            update("count", rows.stop, len(index))
    require_room(missing, chunks.store, config.limit_gb, config.force)
    with progress_bars() as update:
        for rows in batches:
            done = chunks.fill(prompts(index, rows, template, context, generator))
            computed += done.computed
            entries |= done.sizes
            update("prefill", rows.stop, len(index))
    tokens, nbytes = (sum(column) for column in zip(*entries.values(), strict=True))
    print(
        f"{len(entries)} texts of {len(index)} chunks ({computed} computed), {tokens} tokens, {nbytes / 1e6:.1f} MB "
        f"in {time.perf_counter() - begin:.1f} s -> {chunks.store.folder}"
    )


def require_room(missing: Mapping[Path, int], store: ChunkKVStore, limit_gb: float, force: bool) -> None:
    """Print the bytes that the missing files will take.

    Args:
        missing: File -> tokens of its text.
        store: The folder of the files, and the bytes of a token.
        limit_gb: The most that may be written without `force`.
        force: Whether more may be written.

    Raises:
        UserError: The files would take more than `limit_gb`, without `force`.
    """
    tokens, nbytes = sum(missing.values()), sum(missing.values()) * store.token_bytes
    print(
        f"{len(missing)} texts of {tokens} tokens to prefill, at {store.token_bytes / 1e3:.1f} kB a token: "
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
    """Yield a prompt for each of these chunks, with this chunk as its only passage.

    Args:
        index: The index.
        rows: The rows of the chunks.
        template: The prompt's template.
        options: How passages are made of chunks; no threshold is applied.
        generator: Counts tokens.
    """
    from rag.context import build_context
    from rag.prompt import render, render_passage

    for row, chunk in zip(rows, index.chunks(rows), strict=True):
        context = build_context(
            [Hit(chunk, 1.0, row)],
            index.document_text,
            replace(options, min_score=None),
            generator.count,
            lambda source: render_passage(template, source) + template.separator,
        )
        yield render(template, "", context)


if __name__ == "__main__":
    launch(main, "prefill", PrefillSettings)
