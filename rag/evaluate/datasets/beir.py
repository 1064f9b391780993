"""Datasets in the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663), with additions.

    path/corpus.jsonl         {"_id", "title" (optional), "text"}, or path/documents/: a folder of files
    path/queries.jsonl        {"_id", "text"} and optionally "answers", "answerable", "evidence"
    path/qrels/<split>.tsv    query-id, corpus-id, score: integers; 0 or less means judged irrelevant

The additions are "answers", "answerable" and "evidence", at top level or under "metadata", and documents that may be
plain files. Evidence: see rag.evaluate.datasets.questions; a text begins with the title where there is one.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import TextRow, json_rows, lines_of
from rag.evaluate.datasets.questions import read_questions
from rag.ingest.load.folder import Skipped, load_folder
from rag.runtime.options import Count, Filled, Seed
from rag.types import Document, UserError

_HEADER = ["query-id", "corpus-id", "score"]


class DocumentRow(TextRow):
    """A line of corpus.jsonl."""

    title: str | None = None


def load_beir(
    path: Filled | Path,
    split: Filled = "test",
    *,
    strict: bool = True,
    limit: Count | None = None,
    seed: Seed = 0,
) -> Dataset:
    """Load and check the set in a folder.

    Args:
        path: The folder.
        split: Judgements are read from qrels/<split>.tsv.
        strict: Whether judgements of an unknown query or document, and evidence that is not in its document, are
            errors; otherwise they are left out and listed in `problems`. Some published sets have them.
        limit: How many queries to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: for a missing or malformed file, a duplicate id, an empty query, a judgement that contradicts
            another one or the "answerable" flag, and, when `strict`, for what is named there.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: give one with queries.jsonl and qrels/{split}.tsv.")
    problems: list[str] = []
    source, corpus = _corpus(path, problems)
    texts = {document.id: document.text for document in corpus}
    questions = read_questions(path / "queries.jsonl", texts, strict, problems)
    dataset = assemble(
        name=path.resolve().name,
        corpus=corpus,
        questions=questions,
        judgements=_judgements(path / "qrels" / f"{split}.tsv"),
        source=str(path / "qrels" / f"{split}.tsv"),
        corpus_source=str(source),
        strict=strict,
        problems=problems,
    )
    return dataset.sample(limit, seed)


def _corpus(path: Path, problems: list[str]) -> tuple[Path, tuple[Document, ...]]:
    source = path / "corpus.jsonl"
    if source.exists():
        return source, tuple(_document(row) for _, row in json_rows(source, DocumentRow))
    source = path / "documents"
    if not source.is_dir():
        raise UserError(f"The dataset {path} has neither corpus.jsonl nor documents/: add one of them.")
    loaded = list(load_folder(source))
    skipped = (item for item in loaded if isinstance(item, Skipped))
    problems.extend(f"{source / item.path} is left out: {item.reason}." for item in skipped)
    return source, tuple(item for item in loaded if isinstance(item, Document))


def _document(row: DocumentRow) -> Document:
    title = row.title or ""
    return Document(id=row.id, path=row.id, text=f"{title} {row.text}".strip(), title=title)


def _judgements(file: Path) -> Iterator[Judgement]:
    if not file.exists():
        found = ", ".join(sorted(other.stem for other in file.parent.glob("*.tsv"))) or "none"
        raise UserError(f"{file} is missing: add it, or choose a split that is there ({found}).")
    lines = lines_of(file)
    if next(lines, (1, ""))[1].split("\t") != _HEADER:
        raise UserError(f"{file} must begin with the line {' '.join(_HEADER)}, with tabs between: add it.")
    for line, content in lines:
        fields = content.split("\t")
        if len(fields) != 3 or not all(field.strip() for field in fields):
            raise UserError(f"{file}, line {line} is not query id, tab, document id, tab, score: correct it.")
        if not re.fullmatch(r"\s*[+-]?[0-9]{1,18}\s*", fields[2]):
            raise UserError(f'{file}, line {line}: score "{fields[2][:40]}" is not an integer: correct it.')
        yield Judgement(f"line {line}", fields[0], fields[1], int(fields[2]))
