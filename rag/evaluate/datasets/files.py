"""Files of datasets: JSON, JSON lines and text, with an error that names the file and the line."""

from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rag.runtime.records import parse_json, reason
from rag.types import UserError

_NAMED = 5  # faults spelled out in a message before "and N more"


def json_rows(file: Path) -> Iterator[tuple[int, dict]]:
    """Yield (line from 1, row) of a JSON lines file whose rows have a unique, non-empty "_id" and a "text"."""
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
    """Return the value of a JSON text. Raise UserError, which begins with `where`, when it is not JSON."""
    try:
        return parse_json(text)
    except ValueError as error:
        raise UserError(f"{where} is not valid JSON ({reason(error)}): correct it.") from error


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
    """Raise UserError for faults when `strict`; else add one problem: "<what> <fault>, <fault> and 3 more"."""
    if faults and strict:
        raise UserError(f"{what} {named(faults)}: remove this or load with dataset.strict=false.")
    if faults:
        problems.append(f"{what} {named(faults)}, which is left out.")
