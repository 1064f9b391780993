"""What checkpoints say of their architecture, by a schema: types and ranges, and which sizes go with which.

The ranges are far beyond the models that there are, and keep out what could not be computed with.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le
from pydantic import ConfigDict, ValidationError

from rag.runtime.records import Record, misfit
from rag.types import UserError

C = TypeVar("C", bound="Configuration")

Rows = Annotated[int, Ge(1), Le(1 << 24)]  # of an embedding
Width = Annotated[int, Ge(1), Le(1 << 20)]
Layers = Annotated[int, Ge(1), Le(1024)]
Heads = Annotated[int, Ge(1), Le(1 << 12)]
Positions = Annotated[int, Ge(1), Le(1 << 31)]
Epsilon = Annotated[float, Ge(1e-20), Le(1)]  # 0 divides a row of zeros by zero
Theta = Annotated[float, Ge(1), Le(1e12)]
FACTORS = (1e-3, 1e6)  # of rotary frequencies, least and most
Factor = Annotated[float, Ge(FACTORS[0]), Le(FACTORS[1])]


class Configuration(Record):
    """A part of a configuration; settings that it does not declare are of no matter."""

    model_config = ConfigDict(extra="ignore")


def configured(schema: type[C], values: Mapping[str, Any], source: str) -> C:
    """The settings that a configuration declares. Raises UserError for one that is missing or no such value."""
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
    """Dimensions of a head: what is stated, or the heads' share of the width. Raises UserError for no whole share."""
    if stated is None and width % heads:
        raise UserError(
            f"{source} divides a width of {width} among {heads} heads; its configuration is damaged, fetch it again"
        )
    return stated or width // heads
