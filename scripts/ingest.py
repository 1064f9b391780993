"""Ingest a folder of files into an index.

python scripts/ingest.py corpus.path=data/sample/documents index.path=.demo/index
python scripts/ingest.py corpus.path=MORE index.path=.demo/index index.add=true
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from launch import launch
from settings import IndexFolder, Part, Shared, build

from rag.runtime.options import Count, Filled

if TYPE_CHECKING:
    from rag.ingest.load.folder import Skipped
    from rag.pipeline import IngestReport


@dataclass(frozen=True)
class Corpus:
    """The files that are read, as rag.ingest.load.folder.LoadOptions says."""

    path: Filled
    follow_links: bool
    max_file_mb: Count
    list_skipped: bool


@dataclass(frozen=True)
class TargetIndex(IndexFolder):
    """The index to write, and whether documents are added to it."""

    add: bool


@dataclass(frozen=True, kw_only=True)
class IngestSettings(Shared):
    """The settings of conf/ingest.yaml."""

    corpus: Corpus
    index: TargetIndex
    embedder: Part
    chunker: Part
    analyzer: Part | None  # null: no postings


def main(config) -> None:
    from terminal import progress_bars

    from rag import pipeline
    from rag.ingest.load.folder import LoadOptions

    corpus, index = Path(config.corpus.path).expanduser(), Path(config.index.path).expanduser()
    stages = [build(config[name]) for name in ("chunker", "embedder")]
    stages.append(build(config.analyzer) if config.get("analyzer") else None)
    load = LoadOptions(config.corpus.follow_links, config.corpus.max_file_mb)
    with progress_bars() as update:
        report = pipeline.ingest(corpus, index, *stages, update, add=config.index.add, load=load)
    print(
        f"{report.documents} documents, {report.chunks} chunks ({report.embedded} newly embedded), "
        f"{report.tokens} tokens in {report.seconds:.1f} s -> {index}"
    )
    if config.index.add:
        print(changes(report))
    if report.skipped:
        hint = "" if config.corpus.list_skipped else "; corpus.list_skipped=true lists them"
        print(f"{summary(report.skipped)}{hint}")
    if config.corpus.list_skipped:
        for skipped in report.skipped:
            print(f"skipped {skipped.path}: {skipped.reason}")


def summary(skipped: Sequence[Skipped]) -> str:
    """Return how many files were skipped, by type or reason, as "49 skipped: 27 png, 19 rst, 3 no text in it"."""
    counts = Counter(_kind(item.reason) for item in skipped).most_common()
    return f"{len(skipped)} skipped: {', '.join(f'{count} {kind}' for kind, count in counts)}"


def _kind(reason: str) -> str:
    """Return the type of an unsupported file, or the reason in a few words."""
    if type_of := re.fullmatch(r"unsupported type \.(.+)", reason):
        return type_of[1]
    return (
        "too large"
        if "max_file_mb" in reason
        else re.split(r"[:,(]", reason.removeprefix("unsupported: "))[0].strip()
    )


def changes(report: IngestReport) -> str:
    """Return the line that reports what was added to the index."""
    if report.added == report.documents:
        return "there was no index to add to: this is a new one"
    same = report.documents - report.added - report.replaced
    documents = f"{report.added} documents added, {report.replaced} replaced, {same} as they were"
    return f"{documents}; postings {report.postings}"


if __name__ == "__main__":
    launch(main, "ingest", IngestSettings)
