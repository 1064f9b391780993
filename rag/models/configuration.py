"""Check the settings in a checkpoint's files by schemas: types, ranges, and which sizes fit together.

The ranges are far beyond those of existing models, and exclude values with which nothing could be computed.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from pydantic import ConfigDict, TypeAdapter, ValidationError

from rag.runtime.records import Record, misfit, parse_json, reason
from rag.types import UserError

C = TypeVar("C", bound="Configuration")
S = TypeVar("S")

Rows = Annotated[int, Ge(1), Le(1 << 24)]  # of an embedding
Width = Annotated[int, Ge(1), Le(1 << 20)]
Layers = Annotated[int, Ge(1), Le(1024)]
Heads = Annotated[int, Ge(1), Le(1 << 12)]
Positions = Annotated[int, Ge(1), Le(1 << 31)]
Epsilon = Annotated[float, Ge(1e-20), Le(1)]  # with 0 a row of zeros would be divided by zero
Theta = Annotated[float, Ge(1), Le(1e12)]
FACTORS = (1e-3, 1e6)  # the smallest and largest divisor of a rotary frequency
Factor = Annotated[float, Ge(FACTORS[0]), Le(FACTORS[1])]

_MAX_JSON_BYTES = 1 << 26


class Configuration(Record):
    """A schema of settings; settings that it does not declare are ignored."""

    model_config = ConfigDict(extra="ignore")


def validate(schema: type[C], values: Mapping[str, Any], source: str) -> C:
    """Return the settings that `schema` declares. Raises UserError if one is missing or has a wrong value."""
    try:
        return schema.model_validate(values)
    except ValidationError as error:
        if (first := error.errors(include_url=False)[0])["type"] == "missing":
            raise UserError(
                f"{source} lacks the setting {first['loc'][0]!r}; fetch its configuration again, or take another "
                "checkpoint"
            ) from error
        raise UserError(
            f"{source} has a configuration that is not as it should be ({misfit(error)}); fetch it again, or take "
            "another checkpoint"
        ) from error


def head_size(stated: int | None, width: int, heads: int, source: str) -> int:
    """Return the head dimension.

    Args:
        stated: the one in the configuration; None: the width is divided among the heads.
        width: of the model.
        heads: their number.
        source: the checkpoint's name in errors.

    Raises:
        UserError: the quotient is not whole.
    """
    if stated is None and width % heads:
        raise UserError(
            f"{source} divides a width of {width} among {heads} heads; its configuration is damaged, fetch it again"
        )
    return stated or width // heads


def write_settings(path: Path, settings: object) -> None:
    """Write a dataclass as a JSON object, for `read_settings`."""
    path.write_bytes(TypeAdapter(type(settings)).dump_json(settings, indent=1))


def read_settings(path: Path, schema: type[S]) -> S:
    """Return the dataclass in a file of `write_settings`. Raises UserError if it is missing or damaged."""
    try:
        return TypeAdapter(schema).validate_json(path.read_bytes(), strict=True)
    except OSError as error:
        raise UserError(f"{path.parent} lacks {path.name}; convert the checkpoint again") from error
    except ValidationError as error:
        raise UserError(f"{path} is damaged ({misfit(error)}); convert the checkpoint again") from error


def read_json(path: Path) -> dict[str, Any]:
    """Return the JSON object in a file, or {} if there is no file. Raises UserError for anything else."""
    if not path.is_file():
        return {}
    try:
        if path.stat().st_size > _MAX_JSON_BYTES:
            raise ValueError(f"it has more than {_MAX_JSON_BYTES:,} bytes")
        value = parse_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}); fetch the file again") from error
    except ValueError as error:  # such as UnicodeDecodeError
        raise UserError(f"{path} is not valid JSON ({reason(error)}); fetch the file again") from error
    if not isinstance(value, dict):
        raise UserError(f"{path} holds no JSON object; fetch the file again")
    return value
