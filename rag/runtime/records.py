"""Read JSON files by a schema, and YAML; earlier runs, other programs or people may have written them.

A schema is a pydantic model. JSON is parsed strictly by its standard: no NaN, no Infinity, no repeated name in objects.
Errors are one sentence: the file, the position in it, and what to do.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from rag.types import UserError

R = TypeVar("R", bound="Record")

_SHOWN = 200  # characters of another program's error message
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of a surrogate, which may be unpaired


class Record(BaseModel):
    """A JSON object of known fields: types are not converted, and an unknown field is an error.

    Numbers must be finite: in JSON, 1e999 is infinity.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, defer_build=True)


class OpenRecord(Record):
    """A JSON object that may have unknown fields, which are stored unchecked."""

    model_config = ConfigDict(extra="allow")


def parse_json(text: str | bytes) -> Any:
    """Return the value of a JSON text. Raises ValueError with the reason if it is not JSON or is nested too deeply."""
    try:
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_without_repetition)
        if _SURROGATE.search(text if isinstance(text, str) else text.decode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError("it holds one half of a character that takes two") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


class _Yaml(yaml.SafeLoader):
    """A loader of simple YAML: names are strings and occur once in a mapping; no aliases and no tags."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise ValueError("it has an alias or a tag")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        fields = super().construct_mapping(node, deep)
        if len(fields) < len(node.value) or not all(isinstance(name, str) for name in fields):
            raise ValueError("a name occurs twice in one mapping, or is no text")
        return fields


def parse_yaml(text: str) -> Any:
    """Return the value of a YAML text. Raises ValueError if it is not YAML, or has aliases, tags or repeated names."""
    try:
        return yaml.load(text, _Yaml)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


def read_record(path: Path, schema: type[R], remedy: str) -> R:
    """Return the record in a JSON file.

    Args:
        path: the file.
        schema: the class of the record.
        remedy: what the user should do about an error; it is the end of the error message.

    Raises:
        FileNotFoundError, NotADirectoryError: there is no such file.
        UserError: the file cannot be read or does not fit the schema.
    """
    return fitted_record(path, read_json(path, remedy), schema, remedy)


def fitted_record(name: object, value: Any, schema: type[R], remedy: str) -> R:
    """Return a parsed value as a record.

    Args:
        name: of the file or text, with which the error message begins.
        value: what JSON or YAML held.
        schema: the class of the record.
        remedy: what the user should do about an error; the end of the error message.

    Raises:
        UserError: the value does not fit the schema.
    """
    try:
        return schema.model_validate(value)
    except ValidationError as error:
        raise UserError(f"{name} is not as it should be ({misfit(error)}): {remedy}.") from error


def read_json(path: Path, remedy: str) -> Mapping[str, Any]:
    """Return the JSON object in a file. Raises as `read_record` does."""
    try:
        return parsed_json(path, path.read_text(encoding="utf-8"), remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): {remedy}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}.") from error


def parsed_json(name: object, text: str | bytes, remedy: str) -> Mapping[str, Any]:
    """Return the JSON object in a text. Raises UserError, which begins with `name`, if the text is something else."""
    try:
        value = parse_json(text)
    except ValueError as error:  # includes UnicodeDecodeError
        raise UserError(f"{name} is not JSON ({reason(error)}): {remedy}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds no JSON object: {remedy}.")
    return value


def reason(error: BaseException) -> str:
    """Return another program's error message as a part of a sentence: one printable line, at most 200 characters."""
    words = " ".join("".join(c if c.isprintable() else " " for c in str(error)[: 4 * _SHOWN]).split())
    return words[:_SHOWN].rstrip(" .") or type(error).__name__


def misfit(error: ValidationError) -> str:
    """Return the first position that does not fit a schema, and why, as a part of a sentence."""
    first = error.errors(include_url=False)[0]
    position = ".".join(map(str, first["loc"]))
    match first["type"]:
        case "missing":
            return f"it has no {position!r}"
        case "extra_forbidden":
            return f"it has {position!r}, which is unknown"
        case "value_error":
            return f"{position}: {first['ctx']['error']}"
        case "model_type":
            return f"{position or 'it'}: input should be a JSON object"
    return f"{position or 'it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def stays_inside(name: str) -> bool:
    """Return whether a relative path, which another file contains, stays below that file's folder."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and "\0" not in name


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields: dict[str, Any] = {}
    for name, value in pairs:
        if name in fields:
            raise ValueError(f"{name!r} occurs twice in one object")
        fields[name] = value
    return fields
