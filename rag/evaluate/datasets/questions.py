"""Questions of a dataset: gold answers, whether there is an answer, and evidence that is located in the documents.

Evidence is a list of {"document", "quote"}, where the quote occurs in the document's text once, or of {"document",
"start", "end"}, characters of that text; with all four they must agree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import model_validator

from rag.evaluate.datasets.files import DatasetRow, NotBlank, TextRow, json_rows, leave_out
from rag.ingest.clean import clean
from rag.types import UserError


@dataclass(frozen=True, slots=True)
class Evidence:
    """A span of a document's text, from `start` to before `end` in characters, that answers a query."""

    document: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Question:
    """A query as it is in a file."""

    id: str
    text: str
    answers: tuple[str, ...] = ()
    answerable: bool = True
    evidence: tuple[Evidence, ...] = ()


class EvidenceRow(DatasetRow):
    """A span of a document as it is in a file: by its text, its position, or both, which then must agree."""

    document: str
    quote: str | None = None
    start: int | None = None
    end: int | None = None


class QuestionRow(TextRow):
    """A line of queries.jsonl; the fields beside the text may also be below "metadata"."""

    text: NotBlank
    answers: list[NotBlank] | None = None
    answerable: bool = True
    evidence: list[EvidenceRow] | None = None

    @model_validator(mode="before")
    @classmethod
    def _with_metadata(cls, fields: dict[str, Any]) -> dict[str, Any]:
        metadata = fields.get("metadata")
        return metadata | fields if isinstance(metadata, dict) else fields


def read_questions(
    file: Path, documents: Mapping[str, str], strict: bool, problems: list[str]
) -> list[Question]:
    """Read the queries of a JSON lines file, and locate their evidence.

    Args:
        file: The JSON lines file.
        documents: Document id -> text.
        strict: Whether evidence that is not in its document is an error.
        problems: Gets a sentence about such evidence otherwise.

    Raises:
        UserError: for a malformed row and, when `strict`, for evidence that is not in its document.
    """
    faults: list[str] = []
    questions = []
    for line, row in json_rows(file, QuestionRow):
        if row.evidence and not row.answerable:
            raise UserError(
                f'{file}, line {line}: query "{row.id}" is flagged unanswerable but has evidence: drop one.'
            )
        evidence = locate(row.evidence or (), documents, f'line {line}, query "{row.id}"', faults)
        questions.append(Question(row.id, row.text, tuple(row.answers or ()), row.answerable, evidence))
    leave_out(faults, f"{file} gives evidence that is not there:", strict, problems)
    return questions


def locate(
    items: Iterable[EvidenceRow], documents: Mapping[str, str], where: str, faults: list[str]
) -> tuple[Evidence, ...]:
    """Return the spans that `items` describe, each once.

    Args:
        items: The evidence of one question.
        documents: Id -> text.
        where: Names the question in a fault.
        faults: Gets a text for each item that is not in its document.
    """
    found: dict[Evidence, None] = {}
    for item in items:
        span = _span(item, documents.get(item.document))
        if isinstance(span, str):
            faults.append(f"{span} ({where})")
        else:
            found[Evidence(item.document, *span)] = None
    return tuple(found)


def _span(item: EvidenceRow, text: str | None) -> tuple[int, int] | str:
    """Return start and end in the text, or else the fault."""
    document, quote, start, end = f'document "{_short(item.document)}"', item.quote, item.start, item.end
    if text is None:
        return f"the unknown {document}"
    if quote is not None and not quote.strip():
        return f"an empty quote of {document}"
    if start is None and end is None and quote is not None:
        return _found_once(quote, text) or f'"{_short(quote)}", which does not occur once in {document}'
    if start is None or end is None or not 0 <= start < end <= len(text):
        return (
            f"the span {_short(str(start))} to {_short(str(end))} of the {len(text)} characters of {document}"
        )
    if quote is not None and text[start:end] != quote:
        return f'"{_short(quote)}", which is not the text from {start} to {end} of {document}'
    return start, end


def _found_once(quote: str, text: str) -> tuple[int, int] | None:
    """Return the span of the only occurrence of a quote: documents from files are cleaned, a quote may not be."""
    for wanted in dict.fromkeys((quote, clean(quote))):
        start = text.find(wanted)
        if wanted and start >= 0:
            return None if text.find(wanted, start + 1) >= 0 else (start, start + len(wanted))
    return None


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
