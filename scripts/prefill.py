"""Read every chunk of an index once, so that answering with generator.kv_reuse=chunk reads only the question.

python scripts/prefill.py index.path=.demo/index
python scripts/generate.py index.path=.demo/index generator.kv_reuse=chunk question="..."

What is kept depends on the model, its dtype, and what the prompt's template puts before the passages. What is there
already stays: after a kill the same command goes on. Passages that a context joins are read when they are first shown.
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from launch import launch
from settings import IndexFolder, Part, Shared, build

from rag.types import Hit, Message, UserError

if TYPE_CHECKING:
    from rag.context import ContextOptions
    from rag.generate import Generator
    from rag.index.store import Index
    from rag.prompt import PromptTemplate

_TOGETHER = 256  # chunks between two looks at what is missing


@dataclass(frozen=True, kw_only=True)
class Settings(Shared):
    """conf/prefill.yaml."""

    index: IndexFolder
    context: Part
    prompt: Part
    generator: Part


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
    begin, computed, entries = time.perf_counter(), 0, {}
    with progress_bars() as update:
        for start in range(0, len(index), _TOGETHER):
            rows = range(start, min(start + _TOGETHER, len(index)))
            done = generator.chunks.fill(prompts(index, rows, template, context, generator))
            computed += done.computed
            entries |= done.sizes
            update("read", rows.stop, len(index))
    tokens, nbytes = (sum(column) for column in zip(*entries.values(), strict=True))
    print(
        f"{len(entries)} texts of {len(index)} chunks ({computed} read anew), {tokens} tokens, {nbytes / 1e6:.1f} MB "
        f"in {time.perf_counter() - begin:.1f} s -> {generator.chunks.store.folder}"
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
