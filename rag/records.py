"""JSON read back by a schema: what was written by an earlier run, another program, or a hand.

A schema is a pydantic model. JSON is read as its standard has it: no NaN, no Infinity, no name twice in one object.
What does not fit is told in one sentence: the file, the place in it, and what to do.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

from pydantic import BaseModel, ConfigDict, ValidationError

from rag.types import UserError

R = TypeVar("R", bound="Record")

_SHOWN = 200  # characters of another program's reason


class Record(BaseModel):
    """A JSON object of known fields: types are not converted, and a field that is not declared is an error."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class OpenRecord(Record):
    """A JSON object of which some fields are known; others are kept as they are."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason, for anything else, nesting too deep included."""
    try:
        return json.loads(text, parse_constant=_no_number, object_pairs_hook=_without_repetition)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_record(path: Path, schema: type[R], remedy: str) -> R:
    """The record in a JSON file.

    `remedy` says what to do, and ends the sentence. Raises FileNotFoundError and NotADirectoryError where there is no
    such file, UserError for one that cannot be read or does not fit the schema.
    """
    return fitted_record(path, read_json(path, remedy), schema, remedy)


def fitted_record(name: object, value: Any, schema: type[R], remedy: str) -> R:
    """The record that a parsed value is. Raises UserError, which begins with `name`, where it does not fit."""
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{name} is not as it should be ({misfit(error)}): {remedy}.") from error


def read_json(path: Path, remedy: str) -> Mapping[str, Any]:
    """The JSON object in a file; errors as in `read_record`."""
    try:
        value = parse_json(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): {remedy}.") from error
    except ValueError as error:  # UnicodeDecodeError among them
        raise UserError(f"{path} is not JSON ({reason(error)}): {remedy}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object: {remedy}.")
    return value


def reason(error: BaseException) -> str:
    """What another program says of its failure, to stand in a sentence: one line of printable characters, cut short."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(error)[: 4 * _SHOWN]).split())
    return words[:_SHOWN].rstrip(" .") or type(error).__name__


def misfit(error: ValidationError) -> str:
    """The first place that does not fit a schema, and why, in words."""
    first = error.errors(include_url=False)[0]
    place = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "missing":
            return f"it has no {place!r}"
        case "extra_forbidden":
            return f"it has {place!r}, which is unknown"
    return f"{place or 'it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return fields
