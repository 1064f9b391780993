"""JSON read back by a schema, and YAML: what was written by an earlier run, another program, or a hand.

A schema is a pydantic model. JSON is read as its standard has it: no NaN, no Infinity, no name twice in one object.
What does not fit is told in one sentence: the file, the place in it, and what to do.
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

_SHOWN = 200  # characters of another program's reason
_HALF = re.compile(r"\\u[dD][89a-fA-F]")  # the escape of one half of a character, which may stand alone


class Record(BaseModel):
    """A JSON object of known fields: types are not converted, and a field that is not declared is an error.

    A number is finite: JSON spells infinity too, as 1e999.
    """

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False)


class OpenRecord(Record):
    """A JSON object of which some fields are known; others are kept as they are."""

    model_config = ConfigDict(extra="allow")


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text. Raises ValueError, with the reason, for anything else, nesting too deep included."""
    try:
        value = json.loads(text, parse_constant=_no_number, object_pairs_hook=_without_repetition)
        if _HALF.search(text if isinstance(text, str) else text.decode(errors="replace")):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except UnicodeEncodeError as error:
        raise ValueError("it holds one half of a character that takes two") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error


class _Yaml(yaml.SafeLoader):
    """YAML as our configurations are written: names are text and stand once; no aliases and no tags."""

    def compose_node(self, parent, index):
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or event.tag is not None:
            raise ValueError("it has an alias or a tag")
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        fields = super().construct_mapping(node, deep)
        if len(fields) < len(node.value) or not all(isinstance(name, str) for name in fields):
            raise ValueError("a name stands twice in one mapping, or is no text")
        return fields


def parse_yaml(text: str) -> Any:
    """The value of a YAML text without aliases, tags and repeated names. Raises ValueError for anything else."""
    try:
        return yaml.load(text, _Yaml)  # a SafeLoader
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
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
        return parsed_json(path, path.read_text(encoding="utf-8"), remedy)
    except (FileNotFoundError, NotADirectoryError):
        raise
    except OSError as error:
        raise UserError(f"Cannot read {path} ({error.strerror}): {remedy}.") from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not JSON ({error}): {remedy}.") from error


def parsed_json(name: object, text: str | bytes, remedy: str) -> Mapping[str, Any]:
    """The JSON object that a text is. Raises UserError, which begins with `name`, where it is none."""
    try:
        value = parse_json(text)
    except ValueError as error:  # UnicodeDecodeError among them
        raise UserError(f"{name} is not JSON ({reason(error)}): {remedy}.") from error
    if not isinstance(value, dict):
        raise UserError(f"{name} holds no JSON object: {remedy}.")
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
        case "value_error":
            return f"{place}: {first['ctx']['error']}"
    return f"{place or 'it'}: {first['msg'][:1].lower()}{first['msg'][1:]}"


def stays_inside(name: str) -> bool:
    """Whether the path of a file that is named in another one lies below that one's folder."""
    place = PurePosixPath(name)
    return not place.is_absolute() and ".." not in place.parts and "\0" not in name


def _no_number(constant: str) -> None:
    raise ValueError(f"{constant} is no number")


def _without_repetition(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    fields = dict(pairs)
    if len(fields) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"{twice!r} stands twice in one object")
    return fields
