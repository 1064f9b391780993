"""What checkpoints say of their architecture, by a schema: types and ranges, and which sizes go with which.

The ranges are far beyond the models that there are, and keep out what could not be computed with.
"""

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

import numpy as np
from annotated_types import Ge, Le
from pydantic import ConfigDict, ValidationError

from rag.models.llama import LlamaConfig
from rag.ops.rope import llama3_factors
from rag.records import Record, misfit
from rag.types import UserError

C = TypeVar("C", bound="Configuration")

Rows = Annotated[int, Ge(1), Le(1 << 24)]  # of an embedding
Width = Annotated[int, Ge(1), Le(1 << 20)]
Layers = Annotated[int, Ge(1), Le(1024)]
Heads = Annotated[int, Ge(1), Le(1 << 12)]
Positions = Annotated[int, Ge(1), Le(1 << 31)]
Epsilon = Annotated[float, Ge(1e-20), Le(1)]  # 0 divides a row of zeros by zero
Theta = Annotated[float, Ge(1), Le(1e12)]
Factor = Annotated[float, Ge(1e-3), Le(1e6)]

_FACTORS = (1e-3, 1e6)


class Configuration(Record):
    """A part of a configuration; settings that it does not declare are of no matter."""

    model_config = ConfigDict(strict=True, extra="ignore", frozen=True, allow_inf_nan=False)


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
            f"{source} divides a width of {width} among {heads} heads; its configuration is damaged"
        )
    return stated or width // heads


def check_decoder(config: LlamaConfig, source: str) -> LlamaConfig:
    """The configuration, if its sizes go together. Raises UserError."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{source} divides {heads} heads among {groups} key and value heads; its configuration is damaged"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{source} has heads of {config.head_dim} dimensions, which cannot be rotated in pairs"
        )
    if config.rope_factors is None:
        return config
    low, high = _FACTORS
    if len(config.rope_factors) != config.head_dim // 2:
        raise UserError(
            f"{source} has {len(config.rope_factors)} rotary factors for heads of {config.head_dim} dimensions; the "
            "checkpoint is damaged"
        )
    if not all(low <= factor <= high for factor in config.rope_factors):  # NaN is not
        raise UserError(
            f"{source} has rotary factors that are not from {low} to {high}; the checkpoint is damaged"
        )
    return config


class Scaling(Configuration):
    """How rotary positions are scaled: `rope_scaling`, or since transformers 5 `rope_parameters`."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None


class _Linear(Configuration):
    factor: Factor


class _Llama3(Configuration):
    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Positions


def rope_factors(
    scaling: Mapping[str, Any], head_dim: int, theta: float, source: str
) -> tuple[float, ...] | None:
    """What the rotary frequencies are divided by, or None. Raises UserError for an unknown kind of scaling."""
    stated, place = configured(Scaling, scaling, source), f"{source}, in its rope_scaling,"
    kind = stated.rope_type or stated.type or "default"
    match kind:
        case "default":
            return None
        case "linear":
            return (float(configured(_Linear, scaling, place).factor),) * (head_dim // 2)
        case "llama3":
            values = configured(_Llama3, scaling, place)
            if values.low_freq_factor >= values.high_freq_factor:
                raise UserError(
                    f"{place} has low_freq_factor above high_freq_factor; its configuration is damaged"
                )
            with np.errstate(all="ignore"):
                return llama3_factors(head_dim, theta, values.model_dump())
    raise UserError(
        f"{source} scales its rotary positions by {kind!r:.80}; only linear and llama3 scaling can be loaded"
    )
