"""Datasets of plain text files and questions whose evidence is spans of characters, to compare chunkers by.

Questions are JSON lines as in the layout of BEIR, or the CSV of Chroma's chunking evaluation (Smith and Troynikov
2024): columns question, references (a JSON list of {"content", "start_index", "end_index"}) and corpus_id, the name of
the file without its ending; their ids are row numbers from 0.
"""

import csv
import io
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import REMEDY, DatasetRow, leave_out, read_text
from rag.evaluate.datasets.questions import EvidenceRow, Question, locate, read_questions
from rag.runtime.options import Count, Filled, Seed
from rag.runtime.records import fitted_record, parse_json
from rag.types import Document, UserError


class ChromaReference(DatasetRow):
    """A span of evidence."""

    content: str
    start_index: int
    end_index: int


class ChromaQuestion(DatasetRow):
    """A row of the CSV of Chroma's chunking evaluation."""

    question: str
    references: Annotated[list[ChromaReference], BeforeValidator(parse_json)]
    corpus_id: str


def load_spans(
    path: Filled | Path,
    questions: Filled = "questions_df.csv",
    documents: Filled = "corpora",
    *,
    strict: bool = True,
    limit: Count | None = None,
    seed: Seed = 0,
) -> Dataset:
    """Load a folder of text files and questions. The documents that hold evidence are relevant, grade 1.

    The documents are UTF-8 text and are not cleaned, so that positions fit; other files are left out.

    Args:
        path: The folder.
        questions: A file in `path`: .csv, or JSON lines.
        documents: A folder in `path`; "." for `path` itself.
        strict: Whether evidence that is not in its document is an error; otherwise it is left out.
        limit: How many questions to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: for a malformed file and, when `strict`, for evidence that is not there.
    """
    path = Path(path).expanduser()
    file, folder = path / questions, path / documents
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} of documents: give dataset.path and dataset.documents.")
    problems: list[str] = []
    found = (_plain(name, folder, problems) for name in _files(folder) if folder / name != file)
    corpus = [document for document in found if document]
    texts = {document.id: document.text for document in corpus}
    read = _read_chroma if file.suffix.lower() == ".csv" else read_questions
    asked = read(file, texts, strict, problems)
    judgements = [
        Judgement(f'query "{question.id}"', question.id, document, 1)
        for question in asked
        for document in dict.fromkeys(span.document for span in question.evidence)
    ]
    name = path.resolve().name
    dataset = assemble(name, corpus, asked, judgements, str(file), str(folder), strict, problems)
    return dataset.sample(limit, seed)


def _files(folder: Path) -> list[str]:
    """Return the paths of all files below a folder, with /, sorted, without hidden ones."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _plain(name: str, folder: Path, problems: list[str]) -> Document | None:
    try:
        return Document(id=name, path=name, text=read_text(folder / name), title=Path(name).stem)
    except UserError as error:
        problems.append(f"{folder / name} is left out: {error}")
        return None


def _read_chroma(file: Path, documents: dict[str, str], strict: bool, problems: list[str]) -> list[Question]:
    faults: list[str] = []
    questions = []
    for number, row in enumerate(_csv_rows(file)):
        name = row.corpus_id if row.corpus_id in documents else f"{row.corpus_id}.md"
        spans = [
            EvidenceRow(document=name, quote=span.content, start=span.start_index, end=span.end_index)
            for span in row.references
        ]
        evidence = locate(spans, documents, f"question {number}", faults)
        questions.append(Question(str(number), row.question, evidence=evidence))
    leave_out(faults, f"{file} gives evidence that is not there:", strict, problems)
    return questions


def _csv_rows(file: Path) -> Iterator[ChromaQuestion]:
    reader = csv.DictReader(io.StringIO(read_text(file).removeprefix("\ufeff"), newline=""), strict=True)
    try:
        for row in reader:
            filled = {
                name: text for name, text in row.items() if isinstance(text, str)
            }  # no columns too many or few
            yield fitted_record(f"{file}, line {reader.line_num}", filled, ChromaQuestion, REMEDY)
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num} is not valid CSV ({error}): {REMEDY}.") from error
