"""What Llama-family checkpoints say of their rotary positions, and which of a decoder's sizes go together."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from rag.models.configuration import FACTORS, Configuration, Factor, Positions, Theta, configured
from rag.models.llama.model import LlamaConfig
from rag.ops.rope import llama3_factors
from rag.types import UserError


def check_decoder(config: LlamaConfig, source: str) -> LlamaConfig:
    """The configuration, if its sizes go together. Raises UserError."""
    heads, groups = config.num_attention_heads, config.num_key_value_heads
    if heads % groups:
        raise UserError(
            f"{source} divides {heads} heads among {groups} key and value heads; its configuration is "
            "damaged, fetch it again"
        )
    if config.head_dim % 2:
        raise UserError(
            f"{source} has heads of {config.head_dim} dimensions, which cannot be rotated in pairs; take "
            "another checkpoint"
        )
    if config.rope_factors is None:
        return config
    low, high = FACTORS
    if len(config.rope_factors) != config.head_dim // 2:
        raise UserError(
            f"{source} has {len(config.rope_factors)} rotary factors for heads of {config.head_dim} dimensions; the "
            "checkpoint is damaged, fetch it again"
        )
    if not all(low <= factor <= high for factor in config.rope_factors):  # NaN is not
        raise UserError(
            f"{source} has rotary factors that are not from {low} to {high}; the checkpoint is damaged, fetch it again"
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
                    f"{place} has low_freq_factor above high_freq_factor; its configuration is damaged, fetch it again"
                )
            with np.errstate(all="ignore"):
                return llama3_factors(head_dim, theta, values.model_dump())
    raise UserError(
        f"{source} scales its rotary positions by {kind!r:.80}; only linear and llama3 scaling can be loaded"
    )
