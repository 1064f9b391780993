"""Questions as a dataset's files tell them: answers, whether there is one, and evidence found in the documents.

Evidence is a list of {"document", "quote"}, the quote standing in the document's text once, or of {"document",
"start", "end"}, characters of that text; with all four they must agree.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rag.ingest.clean import clean
from rag.runtime.records import parse_json, reason
from rag.types import UserError

_NAMED = 5  # faults spelled out in a message before "and N more"


@dataclass(frozen=True, slots=True)
class Evidence:
    """The characters of a document's text, from `start` to before `end`, that hold what a query asks for."""

    document: str
    start: int
    end: int


@dataclass(frozen=True, slots=True)
class Question:
    """A query as its file tells it."""

    id: str
    text: str
    answers: tuple[str, ...] = ()
    answerable: bool = True
    evidence: tuple[Evidence, ...] = ()


def read_questions(
    file: Path, documents: Mapping[str, str], strict: bool, problems: list[str]
) -> list[Question]:
    """The queries of a JSON lines file, with evidence located in `documents`, id -> text."""
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
    """The spans that `items` name, each once; what is not in its document is told in `faults` instead.

    An item has a "document" and a "quote", a "start" and an "end", or all four, which then must agree.
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
    """Start and end in the text, or what is wrong with them."""
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
    """A value in a sentence; what is neither text nor a number goes by its type."""
    plain = value is None or isinstance(value, str | int | float)
    return _short(str(value)) if plain else f"a {type(value).__name__}"


def _short(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 60 else text[:57] + "..."


def leave_out(faults: Sequence[str], what: str, strict: bool, problems: list[str]) -> None:
    """Raise UserError for faults when `strict`; else list them: "<what> <fault>, <fault> and 3 more"."""
    if faults and strict:
        raise UserError(f"{what} {named(faults)}: remove this or load with dataset.strict=false.")
    if faults:
        problems.append(f"{what} {named(faults)}, which is left out.")


# --- files


def json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line from 1, row) of a JSON lines file whose rows have a unique, non-empty "_id" and a "text"."""
    seen: dict[str, int] = {}
    for line, content in lines_of(file):
        row = valid_json(content, f"{file}, line {line}")
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("_id", "text")):
            raise UserError(f'{file}, line {line} has no strings "_id" and "text": correct it.')
        if not row["_id"].strip():
            raise UserError(f'{file}, line {line} has an empty "_id": give it one.')
        if (first := seen.setdefault(row["_id"], line)) != line:
            raise UserError(f'{file}, line {line} repeats the id "{row["_id"]}" of line {first}: remove one.')
        yield line, row


def valid_json(text: str, where: str) -> Any:
    """The value of a JSON text. UserError, with the place, when it is none."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({reason(error)}): correct it.") from error


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, content) of the lines of a text file that are not blank. UserError when it is not UTF-8."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            yield from ((n, line.rstrip("\n")) for n, line in enumerate(stream, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 ({error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def named(ids: Sequence[str]) -> str:
    """The first few of them, and how many more there are."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more
