"""Show what an index contains, verify its files, or audit an approximate vector search on it.

python scripts/index.py index.path=.demo/index
python scripts/index.py index.path=.demo/index action=verify
python scripts/index.py index.path=.demo/index action=audit vector_index=binary vector_index.recall=0.95
"""

from __future__ import annotations  # the types below are imported in main: a typo should not wait for JAX

import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from launch import launch
from settings import IndexFolder, Part, Shared, build

from rag.runtime.options import Count, Seed

if TYPE_CHECKING:
    from rag.index.dense import VectorSearch
    from rag.index.store import Index


@dataclass(frozen=True)
class AuditOptions:
    """The queries of an audit."""

    k: Count
    queries: Count
    seed: Seed


@dataclass(frozen=True, kw_only=True)
class IndexSettings(Shared):
    """The settings of conf/index.yaml."""

    index: IndexFolder
    action: Literal["info", "verify", "audit"]
    vector_index: Part
    audit: AuditOptions


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
    if config.action == "audit":
        options = AuditOptions(config.audit.k, config.audit.queries, config.audit.seed)
        print(audited(index, build(config.vector_index), options))


def audited(index: Index, search: VectorSearch, options: AuditOptions) -> str:
    """Return the recall of a vector search against exact search, on queries mixed of two vectors of the index."""
    from rag.index.dense.audit import audit, mixed_queries, sample_pairs
    from rag.index.dense.exact import DenseIndex
    from rag.types import UserError

    if len(index) < 3:
        raise UserError(
            f"The index at {index.path} has {len(index)} chunks, and an audit needs 3, since a query is made of two "
            "and searched among the others: ingest more documents."
        )
    exact = DenseIndex(index.vectors)
    pairs = sample_pairs(len(index), options.queries, options.seed)
    found = audit(search.build(index.vectors), exact, mixed_queries(exact, pairs), options.k, sources=pairs)
    return (
        f"recall@{found.k} of {search}: {found.recall:.4f}, at least {found.at_least:.4f} with 95% confidence "
        f"({found.queries} queries, each mixed of two vectors, searched among the others)"
    )


def info(index: Index) -> list[str]:
    """Return what an index holds, and what made it, a line each."""
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
    launch(main, "index", IndexSettings)
