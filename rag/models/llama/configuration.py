"""Read the architecture of Llama-family checkpoints from a Hugging Face config.json or from GGUF metadata."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from pydantic import Field

from rag.models.configuration import (  # fmt: skip
    FACTORS,
    Configuration,
    Epsilon,
    Factor,
    Heads,
    Layers,
    Positions,
    Rows,
    Theta,
    Width,
    head_size,
    validate,
)
from rag.models.llama.model import LlamaConfig
from rag.models.tensor_files import gguf_name
from rag.ops.rope import llama3_factors
from rag.types import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # model_type in config.json, general.architecture in GGUF
_DEFAULT_THETA = 10000.0


class LlamaConfigJson(Configuration):
    """config.json."""

    vocab_size: Rows
    hidden_size: Width
    intermediate_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    num_key_value_heads: Heads | None = None
    head_dim: Heads | None = None
    max_position_embeddings: Positions
    rms_norm_eps: Epsilon
    rope_theta: Theta | None = None
    rope_scaling: dict[str, Any] | None = None
    rope_parameters: dict[str, Any] | None = None
    tie_word_embeddings: bool = False
    attention_bias: bool | None = False
    hidden_act: str = "silu"
    use_sliding_window: bool | None = None


class RopeScaling(Configuration):
    """`rope_scaling` of config.json, or since transformers 5 `rope_parameters`, which holds theta as well."""

    rope_type: str | None = None
    type: str | None = None
    rope_theta: Theta | None = None


class LinearScaling(Configuration):
    """RopeScaling of type "linear"."""

    factor: Factor


class Llama3Scaling(Configuration):
    """RopeScaling of type "llama3"."""

    factor: Factor
    low_freq_factor: Factor
    high_freq_factor: Factor
    original_max_position_embeddings: Positions


class LlamaGgufMetadata(Configuration):
    """GGUF metadata, by their keys without the architecture."""

    tokens: list[Any] = Field(alias="tokenizer.ggml.tokens", min_length=1, max_length=1 << 24)
    width: Width = Field(alias="embedding_length")
    ffn: Width = Field(alias="feed_forward_length")
    layers: Layers = Field(alias="block_count")
    heads: Heads = Field(alias="attention.head_count")
    kv_heads: Heads | None = Field(None, alias="attention.head_count_kv")
    head_dim: Heads | None = Field(None, alias="attention.key_length")
    positions: Positions = Field(alias="context_length")
    epsilon: Epsilon = Field(alias="attention.layer_norm_rms_epsilon")
    theta: Theta = Field(_DEFAULT_THETA, alias="rope.freq_base")
    rotated: Heads | None = Field(None, alias="rope.dimension_count")
    scaling: str = Field(
        "linear", alias="rope.scaling.type"
    )  # llama.cpp's default, if there is only a factor
    factor: float | None = Field(None, alias="rope.scaling.factor")
    old_factor: float | None = Field(None, alias="rope.scale_linear")


def config_from_huggingface(values: Mapping[str, Any], source: str) -> LlamaConfig:
    """Return the architecture that a config.json describes. Raises UserError if this model does not cover it."""
    architecture = values.get("model_type")
    _check_architecture(architecture, source)
    stated = validate(LlamaConfigJson, values, source)
    if stated.hidden_act != "silu":
        raise UserError(
            f"{source} has the activation {stated.hidden_act!r:.80}; only silu is known, take another checkpoint"
        )
    if stated.use_sliding_window:
        raise UserError(f"{source} attends in a sliding window, which is not known; take another checkpoint")
    heads = stated.num_attention_heads
    head_dim = head_size(stated.head_dim, stated.hidden_size, heads, source)
    scaling = stated.rope_scaling or stated.rope_parameters or {}
    theta = stated.rope_theta or validate(RopeScaling, scaling, source).rope_theta or _DEFAULT_THETA
    config = LlamaConfig(
        vocab_size=stated.vocab_size,
        hidden_size=stated.hidden_size,
        intermediate_size=stated.intermediate_size,
        num_hidden_layers=stated.num_hidden_layers,
        num_attention_heads=heads,
        num_key_value_heads=stated.num_key_value_heads or heads,
        head_dim=head_dim,
        max_position_embeddings=stated.max_position_embeddings,
        rms_norm_eps=stated.rms_norm_eps,
        rope_theta=theta,
        rope_factors=_huggingface_rope_factors(scaling, head_dim, theta, source),
        tie_word_embeddings=stated.tie_word_embeddings,
        qkv_bias=architecture == "qwen2" or bool(stated.attention_bias),
        qk_norm=architecture == "qwen3",
    )
    return _check_sizes(config, source)


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LlamaConfig:
    """Return the architecture that GGUF metadata describe. Raises UserError if this model does not cover it."""
    architecture, source = metadata.get("general.architecture"), gguf_name(metadata)
    _check_architecture(architecture, source)
    values = {key.removeprefix(f"{architecture}."): value for key, value in metadata.items()}
    stated = validate(LlamaGgufMetadata, values, source)
    head_dim = head_size(stated.head_dim, stated.width, stated.heads, source)
    config = LlamaConfig(
        vocab_size=len(stated.tokens),
        hidden_size=stated.width,
        intermediate_size=stated.ffn,
        num_hidden_layers=stated.layers,
        num_attention_heads=stated.heads,
        num_key_value_heads=stated.kv_heads or stated.heads,
        head_dim=head_dim,
        max_position_embeddings=stated.positions,
        rms_norm_eps=stated.epsilon,
        rope_theta=stated.theta,
        rope_factors=_gguf_rope_factors(stated, tensors.get("rope_freqs.weight"), head_dim, source),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )
    return _check_sizes(config, source)


def _check_architecture(architecture: object, source: str) -> None:
    if architecture not in ARCHITECTURES:
        raise UserError(
            f"{source} is of architecture {architecture!r:.80}, which the generator does not know; "
            f"take a checkpoint of {', '.join(ARCHITECTURES)}"
        )


def _huggingface_rope_factors(
    scaling: Mapping[str, Any], head_dim: int, theta: float, source: str
) -> tuple[float, ...] | None:
    """Return the divisors of the rotary frequencies. Raises UserError for an unknown type of scaling."""
    stated, part = validate(RopeScaling, scaling, source), f"{source}, in its rope_scaling,"
    kind = stated.rope_type or stated.type or "default"
    match kind:
        case "default":
            return None
        case "linear":
            return (float(validate(LinearScaling, scaling, part).factor),) * (head_dim // 2)
        case "llama3":
            values = validate(Llama3Scaling, scaling, part)
            if values.low_freq_factor >= values.high_freq_factor:
                raise UserError(
                    f"{part} has low_freq_factor above high_freq_factor; its configuration is damaged, fetch it again"
                )
            with np.errstate(all="ignore"):
                return llama3_factors(head_dim, theta, values.model_dump())
    raise UserError(
        f"{source} scales its rotary positions by {kind!r:.80}; only linear and llama3 scaling can be loaded"
    )


def _gguf_rope_factors(
    stated: LlamaGgufMetadata, tensor: np.ndarray | None, head_dim: int, source: str
) -> tuple[float, ...] | None:
    """Return Llama 3's divisors, which are a tensor, times the linear factor, as llama.cpp applies them."""
    if (rotated := stated.rotated or head_dim) != head_dim:
        raise UserError(
            f"{source} rotates {rotated} of its heads' {head_dim} dimensions; only whole heads are known, "
            "take another checkpoint"
        )
    if stated.scaling not in ("none", "linear"):
        raise UserError(
            f"{source} scales its rotary positions by {stated.scaling!r:.80}; only linear scaling and rope_freqs can "
            "be loaded, take another checkpoint"
        )
    factor = stated.old_factor if stated.factor is None else stated.factor
    if stated.scaling == "none" or not factor:  # for llama.cpp a factor of 0 is no scaling
        factor = 1.0
    if tensor is None and factor == 1.0:
        return None
    each = np.ones(head_dim // 2) if tensor is None else np.asarray(tensor, np.float64).reshape(-1)
    return tuple((each * factor).tolist())


def _check_sizes(config: LlamaConfig, source: str) -> LlamaConfig:
    """Return the configuration. Raises UserError if its sizes do not fit together."""
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
    if not all(low <= factor <= high for factor in config.rope_factors):  # false for NaN
        raise UserError(
            f"{source} has rotary factors that are not from {low} to {high}; the checkpoint is damaged, fetch it again"
        )
    return config
