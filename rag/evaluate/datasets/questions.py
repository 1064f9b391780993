"""Questions of a dataset: gold answers, whether there is an answer, and evidence that is located in the documents.

Evidence is a list of {"document", "quote"}, where the quote occurs in the document's text once, or of {"document",
"start", "end"}, characters of that text; with all four they must agree.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

from rag.evaluate.datasets.files import json_rows, leave_out
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


def read_questions(
    file: Path, documents: Mapping[str, str], strict: bool, problems: list[str]
) -> list[Question]:
    """Read the queries of a JSON lines file, and locate their evidence in `documents` (id -> text).

    Evidence that is not there is an error when `strict`, otherwise one more of the `problems`.
    """
    faults: list[str] = []
    questions = [_question(file, line, row, documents, faults) for line, row in json_rows(file)]
    leave_out(faults, f"{file} gives evidence that is not there:", strict, problems)
    return questions


def _question(
    file: Path, line: int, row: Mapping, documents: Mapping[str, str], faults: list[str]
) -> Question:
    where = f"{file}, line {line}"
    if not row["text"].strip():
        raise UserError(f'{where}: the query "{row["_id"]}" is empty: write it or remove it.')
    metadata = row.get("metadata") or {}
    fields = {**metadata, **row} if isinstance(metadata, dict) else row
    answers, answerable = fields.get("answers") or [], fields.get("answerable", True)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f'{where}: "answers" must be a list of strings: correct it.')
    if not all(answer.strip() for answer in answers):
        raise UserError(f'{where}: an answer of the query "{row["_id"]}" is empty: write it or remove it.')
    if not isinstance(answerable, bool):
        raise UserError(f'{where}: "answerable" must be true or false: correct it.')
    items = fields.get("evidence") or []
    if not isinstance(items, list) or not all(isinstance(item, dict) for item in items):
        raise UserError(f'{where}: "evidence" must be a list of objects with "document": correct it.')
    if items and not answerable:
        raise UserError(f'{where}: query "{row["_id"]}" is flagged unanswerable but has evidence: drop one.')
    evidence = locate(items, documents, f'line {line}, query "{row["_id"]}"', faults)
    return Question(row["_id"], row["text"], tuple(answers), answerable, evidence)


def locate(
    items: Iterable[Mapping], documents: Mapping[str, str], where: str, faults: list[str]
) -> tuple[Evidence, ...]:
    """Return the spans that `items` describe, each once; a span that is not in its document is added to `faults`.

    Args:
        items: Each has a "document" and a "quote", a "start" and an "end", or all four, which then must agree.
        documents: Id -> text.
        where: Names the question in a fault.
        faults: Gets a text for each item that is wrong.
    """
    found: dict[Evidence, None] = {}
    for item in items:
        name = item.get("document")
        span = _span(item, documents.get(name) if isinstance(name, str) else None)
        if isinstance(span, str):
            faults.append(f"{span} ({where})")
        else:
            found[Evidence(item["document"], *span)] = None
    return tuple(found)


def _span(item: Mapping, text: str | None) -> tuple[int, int] | str:
    """Return start and end in the text, or else the fault."""
    document, quote = f'document "{_brief(item.get("document"))}"', item.get("quote")
    start, end = item.get("start"), item.get("end")
    if text is None:
        return f"the unknown {document}"
    if quote is not None and not (isinstance(quote, str) and quote.strip()):
        return f"an empty quote of {document}"
    if start is None and end is None and quote is not None:
        return _found_once(quote, text) or f'"{_short(quote)}", which does not occur once in {document}'
    if type(start) is not int or type(end) is not int or not 0 <= start < end <= len(text):
        return f"the span {_brief(start)} to {_brief(end)} of the {len(text)} characters of {document}"
    if quote is not None and text[start:end] != quote:
        return f'"{_short(quote)}", which is not what stands at {start} to {end} of {document}'
    return start, end


def _found_once(quote: str, text: str) -> tuple[int, int] | None:
    for wanted in dict.fromkeys(
        (quote, clean(quote))
    ):  # documents from files are cleaned, a quote may not be
        start = text.find(wanted)
        if wanted and start >= 0:
            return None if text.find(wanted, start + 1) >= 0 else (start, start + len(wanted))
    return None


def _brief(value: object) -> str:
    """Return a value as words of a sentence; what is neither text nor a number is named by its type."""
    plain = value is None or isinstance(value, str | int | float)
    return _short(str(value)) if plain else f"a {type(value).__name__}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."
