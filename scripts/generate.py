"""Answer a question with a streamed, cited answer; without a question, start an interactive session.

python scripts/generate.py index.path=.demo/index question="Why was Halden Island closed in 2023?"
python scripts/generate.py index.path=.demo/index question="..." output=json | python -m json.tool
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from annotated_types import DocInfo
from answers import as_json, ask, show
from launch import launch
from session import converse
from settings import IndexFolder, build
from system import SystemSettings, build_method

from rag.runtime.options import Count, Question
from rag.types import UserError


@dataclass(frozen=True, kw_only=True)
class GenerateSettings(SystemSettings):
    """The settings of conf/generate.yaml."""

    index: IndexFolder
    k: Count
    question: Annotated[
        Question | None, DocInfo("a question that is not empty; leave it out for an interactive session")
    ]
    output: Literal["text", "json"]
    dataset: Mapping[str, object] | None = None  # of a method that draws a sample of queries: not used here


def main(config) -> None:
    """Answer the question, or start a session."""
    if config.question is None and config.output == "json":
        raise UserError('output=json answers one question: give it as question="..."')
    if config.question is None and sys.stdin is None:
        raise UserError('Stdin is closed, so nobody can ask: give question="..."')
    from rag.index.store import Index
    from rag.pipeline import Reader
    from rag.retrieve.collection import Collection
    from rag.retrieve.search import Search

    index = Index.open(Path(config.index.path).expanduser())
    stages = (build(config[name]) for name in ("generator", "prompt", "context", "sampling", "answer"))
    reader = Reader(*stages)
    collection = Collection(index, index.restore(build(config.embedder)), lambda: reader.generator)
    search = Search(collection, build_method(config), config.k)
    if config.question is None:
        converse(search, reader)
    elif config.output == "json":
        print(as_json(ask(config.question, search, reader, echo=False), reader.generator))
    else:
        show(ask(config.question, search, reader), reader)


if __name__ == "__main__":
    launch(main, "generate", GenerateSettings)
