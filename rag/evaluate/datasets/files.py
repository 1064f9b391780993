"""Files of datasets: JSON lines with a schema, and text; errors name the file and the line."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated, TypeVar

from pydantic import AfterValidator, ConfigDict, Field

from rag.runtime.records import Record, fitted_record, parsed_json
from rag.types import UserError

R = TypeVar("R", bound="TextRow")

REMEDY = "correct it"  # what the user should do about a malformed file
_NAMED = 5  # faults spelled out in a message before "and N more"


def not_blank(text: str) -> str:
    """Return a text that has a character other than white space; a validator for schemas."""
    if not text.strip():
        raise ValueError("it is empty")
    return text


NotBlank = Annotated[str, AfterValidator(not_blank)]


class DatasetRow(Record):
    """A JSON object of a dataset's file; fields that we do not use are ignored."""

    model_config = ConfigDict(extra="ignore")


class TextRow(DatasetRow):
    """A line of a JSON lines file: a document or a question."""

    id: NotBlank = Field(alias="_id")
    text: str


def json_rows(file: Path, schema: type[R]) -> Iterator[tuple[int, R]]:
    """Yield (line from 1, row) of a JSON lines file. Raise UserError for a row that is malformed or repeats an id."""
    seen: dict[str, int] = {}
    for line, content in lines_of(file):
        where = f"{file}, line {line}"
        row = fitted_record(where, parsed_json(where, content, REMEDY), schema, REMEDY)
        if (first := seen.setdefault(row.id, line)) != line:
            raise UserError(f'{where} repeats the id "{row.id}" of line {first}: remove one.')
        yield line, row


def lines_of(file: Path) -> Iterator[tuple[int, str]]:
    """Yield (number from 1, content) of the lines that are not blank. Raise UserError when the file is not UTF-8."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            yield from ((n, line.rstrip("\n")) for n, line in enumerate(stream, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 ({error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def named(ids: Sequence[str]) -> str:
    """Return the first few ids as text, and how many more there are."""
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more


def read_text(file: Path) -> str:
    """Return a file's text unchanged, with its line ends. Raise UserError where it is missing or not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 ({error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def check_unique(ids: Iterable[str], fault: str) -> None:
    """Raise UserError, which begins with `fault`, for ids that are repeated."""
    repeated = [f'"{id}"' for id, count in Counter(ids).items() for _ in range(count - 1)]
    if repeated:
        raise UserError(f"{fault} {named(repeated)}: remove the second.")


def check_ids(ids: Iterable[str], name: str) -> None:
    """Raise UserError for an id with U+0000, where trec_eval's strings end."""
    if bad := [repr(id) for id in ids if "\0" in id]:
        raise UserError(f"{name} has U+0000 in the id {named(bad)}: give it another id.")


def leave_out(faults: Sequence[str], what: str, strict: bool, problems: list[str]) -> None:
    """Raise UserError for faults when `strict`; otherwise add one sentence about them to the problems.

    Args:
        faults: Judgements or evidence that do not fit the documents.
        what: The first words of the sentence, before the faults.
        strict: Whether they are an error.
        problems: Gets the sentence: "<what> <fault>, <fault> and 3 more, which is left out."
    """
    if faults and strict:
        raise UserError(f"{what} {named(faults)}: remove this or load with dataset.strict=false.")
    if faults:
        problems.append(f"{what} {named(faults)}, which is left out.")
