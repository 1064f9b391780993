"""Llama-family checkpoints: which tensor goes where, and what the file says of the architecture.

Hugging Face folders (config.json, safetensors) and GGUF files; both end up as the same module, and both are kept
converted (rag.models.checkpoint.keep), so that the second start maps memory instead of dequantising.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from datetime import date as day
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from pydantic import Field

from rag.models import checkpoint
from rag.models.checkpoint import Rule
from rag.models.configuration import (  # fmt: skip
    Configuration,
    Epsilon,
    Heads,
    Layers,
    Positions,
    Rows,
    Theta,
    Width,
    configured,
    head_size,
)
from rag.models.llama.configuration import Scaling, check_decoder, rope_factors
from rag.models.llama.model import Llama, LlamaConfig, abstract
from rag.models.tokenizer.tokenizer import DEFAULT_DATE, Tokenizer
from rag.types import UserError

ARCHITECTURES = ("llama", "qwen2", "qwen3")  # model_type in config.json, general.architecture in GGUF

# (Hugging Face's name without "model.", llama.cpp's name), both with a .weight and some with a .bias
NAMES = (
    ("embed_tokens", "token_embd"),
    ("norm", "output_norm"),
    ("layers.{i}.input_layernorm", "blk.{i}.attn_norm"),
    ("layers.{i}.self_attn.q_proj", "blk.{i}.attn_q"),
    ("layers.{i}.self_attn.k_proj", "blk.{i}.attn_k"),
    ("layers.{i}.self_attn.v_proj", "blk.{i}.attn_v"),
    ("layers.{i}.self_attn.o_proj", "blk.{i}.attn_output"),
    ("layers.{i}.self_attn.q_norm", "blk.{i}.attn_q_norm"),
    ("layers.{i}.self_attn.k_norm", "blk.{i}.attn_k_norm"),
    ("layers.{i}.post_attention_layernorm", "blk.{i}.ffn_norm"),
    ("layers.{i}.mlp.gate_proj", "blk.{i}.ffn_gate"),
    ("layers.{i}.mlp.up_proj", "blk.{i}.ffn_up"),
    ("layers.{i}.mlp.down_proj", "blk.{i}.ffn_down"),
)


def load(path: Path, *, int8: bool = False, date: day = DEFAULT_DATE) -> tuple[Llama, Tokenizer]:
    """The decoder and tokenizer of a GGUF file or a Hugging Face folder, memory-mapped, float32 or int8.

    `date` is what the tokenizer tells a chat template that asks for today's. Raises UserError for another
    architecture and for tensors that do not fit.
    """
    if int8:
        folder = checkpoint.keep("llama int8", source_files(path), partial(_quantize, path))
        return checkpoint.load_module(_abstract(folder, int8=True), folder), Tokenizer.load(folder, date)
    convert = _convert_gguf if checkpoint.is_gguf(path) else _convert_huggingface
    folder = checkpoint.keep("llama", source_files(path), partial(convert, path))
    return checkpoint.load_module(_abstract(folder), folder), Tokenizer.load(folder, date)


def _abstract(folder: Path, *, int8: bool = False) -> Llama:
    """The shapes of a converted checkpoint."""
    values = json.loads((folder / "config.json").read_text())
    factors = values.pop("rope_factors")
    config = LlamaConfig(**values, rope_factors=tuple(factors) if factors else None)
    return _shapes(config, int8=int8)


def _shapes(config: LlamaConfig, *, int8: bool = False) -> Llama:
    """The shapes of a model, of which one layer is traced."""
    model = abstract(replace(config, num_hidden_layers=1), int8=int8)
    model.config, model.layers = config, checkpoint.copies(model.layers[0], config.num_hidden_layers)
    return model


def _quantize(path: Path, folder: Path) -> None:
    model, tokenizer = load(path)
    _write(checkpoint.quantized(model), tokenizer, folder)


def source_files(path: Path) -> list[Path]:
    """Every file that the answers depend on, in a fixed order; UserError if this is no checkpoint."""
    if checkpoint.is_gguf(path):
        return [path]
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a GGUF file nor a folder; name one, or a Hugging Face checkpoint folder"
        )
    return [*checkpoint.shards(path), *sorted(path.glob("*.json")), *sorted(path.glob("*.jinja"))]


def _convert_gguf(path: Path, folder: Path) -> None:
    metadata, tensors = checkpoint.read_gguf(path)
    config = config_from_gguf(metadata, tensors)
    checkpoint.check_layers(tensors, "blk.{i}.", config.num_hidden_layers, str(path))
    tokenizer = Tokenizer.from_gguf(metadata)
    checkpoint.check_vocabulary(tokenizer, config.vocab_size, str(path))
    table = gguf_table(config, metadata["general.architecture"])
    _write(checkpoint.fill(_shapes(config), tensors, table, str(path)), tokenizer, folder)


def _convert_huggingface(path: Path, folder: Path) -> None:
    config = config_from_huggingface(checkpoint.read_config(path), str(path))
    tensors = {
        name: np.asarray(array, np.float32) for name, array in checkpoint.read_safetensors(path).items()
    }
    checkpoint.check_layers(tensors, "model.layers.{i}.", config.num_hidden_layers, str(path))
    tokenizer = Tokenizer.from_folder(path)
    checkpoint.check_vocabulary(tokenizer, config.vocab_size, str(path))
    model = checkpoint.fill(_shapes(config), tensors, huggingface_table(config), str(path))
    _write(model, tokenizer, folder)


def _write(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    checkpoint.save_module(model, folder)
    (folder / "config.json").write_text(json.dumps(asdict(model.config), indent=1))
    tokenizer.save(folder)


def huggingface_table(config: LlamaConfig) -> Sequence[Rule]:
    """Names in a Hugging Face checkpoint -> paths in the module."""
    rules = [
        Rule(f"model.{name}.{kind}", f"{name}.{kind}") for name, _ in NAMES for kind in ("weight", "bias")
    ]
    # a tied checkpoint may still carry the copy
    rules.append(Rule("lm_head.weight", None if config.tie_word_embeddings else "lm_head.weight"))
    rules.append(Rule("model.layers.{i}.self_attn.rotary_emb.inv_freq", None))  # a buffer of old versions
    return rules


def gguf_table(config: LlamaConfig, architecture: str) -> Sequence[Rule]:
    """Names in a GGUF file -> paths in the module.

    llama.cpp's converter reorders the rows of Q and K for the `llama` architecture, to rotate adjacent pairs.
    """
    permuted = {}
    if architecture == "llama":
        permuted = {
            "blk.{i}.attn_q": partial(unpermute, heads=config.num_attention_heads),
            "blk.{i}.attn_k": partial(unpermute, heads=config.num_key_value_heads),
        }
    rules = [
        Rule(f"{gguf}.{kind}", f"{name}.{kind}", permuted.get(gguf))
        for name, gguf in NAMES
        for kind in ("weight", "bias")
    ]
    return [*rules, Rule("output.weight", "lm_head.weight"), Rule("rope_freqs.weight", None)]


def unpermute(weight: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a Q or K projection from llama.cpp's order (pairs adjacent) back to Hugging Face's (halves)."""
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)


class _HuggingFace(Configuration):
    """What a config.json says."""

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


def config_from_huggingface(values: Mapping[str, Any], source: str) -> LlamaConfig:
    """The architecture that a config.json describes; UserError for a family that is not this one."""
    kind = values.get("model_type")
    _check_architecture(kind, source)
    stated = configured(_HuggingFace, values, source)
    if stated.hidden_act != "silu":
        raise UserError(
            f"{source} has the activation {stated.hidden_act!r:.80}; only silu is known, take another checkpoint"
        )
    if stated.use_sliding_window:
        raise UserError(f"{source} attends in a sliding window, which is not known; take another checkpoint")
    heads = stated.num_attention_heads
    head_dim = head_size(stated.head_dim, stated.hidden_size, heads, source)
    # transformers 5 moved theta into the scaling record
    scaling = stated.rope_scaling or stated.rope_parameters or {}
    theta = stated.rope_theta or configured(Scaling, scaling, source).rope_theta or 10000.0
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
        rope_factors=rope_factors(scaling, head_dim, theta, source),
        tie_word_embeddings=stated.tie_word_embeddings,
        qkv_bias=kind == "qwen2" or bool(stated.attention_bias),
        qk_norm=kind == "qwen3",
    )
    return check_decoder(config, source)


class _Gguf(Configuration):
    """What a GGUF file's metadata say, by their keys without the architecture."""

    tokens: list[Any] = Field(alias="tokenizer.ggml.tokens", min_length=1, max_length=1 << 24)
    width: Width = Field(alias="embedding_length")
    ffn: Width = Field(alias="feed_forward_length")
    layers: Layers = Field(alias="block_count")
    heads: Heads = Field(alias="attention.head_count")
    kv_heads: Heads | None = Field(None, alias="attention.head_count_kv")
    head_dim: Heads | None = Field(None, alias="attention.key_length")
    positions: Positions = Field(alias="context_length")
    epsilon: Epsilon = Field(alias="attention.layer_norm_rms_epsilon")
    theta: Theta = Field(10000.0, alias="rope.freq_base")
    rotated: Heads | None = Field(None, alias="rope.dimension_count")
    scaling: str = Field(
        "linear", alias="rope.scaling.type"
    )  # llama.cpp's default, of files that say a factor alone
    factor: float | None = Field(None, alias="rope.scaling.factor")
    old_factor: float | None = Field(None, alias="rope.scale_linear")


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LlamaConfig:
    """The architecture that a GGUF file's metadata describes; UserError for a family that is not this one."""
    kind, source = metadata.get("general.architecture"), checkpoint.gguf_name(metadata)
    _check_architecture(kind, source)
    stated = configured(
        _Gguf, {key.removeprefix(f"{kind}."): value for key, value in metadata.items()}, source
    )
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
    return check_decoder(config, source)


def _gguf_rope_factors(
    stated: _Gguf, tensor: np.ndarray | None, head_dim: int, source: str
) -> tuple[float, ...] | None:
    """Llama 3's factors, which are a tensor, times the linear factor, as llama.cpp applies them."""
    if (rotated := stated.rotated or head_dim) != head_dim:
        raise UserError(
            f"{source} rotates {rotated} of its heads' {head_dim} dimensions; only whole heads are known, "
            "take another checkpoint"
        )
    kind = stated.scaling
    if kind not in ("none", "linear"):
        raise UserError(
            f"{source} scales its rotary positions by {kind!r:.80}; only linear scaling and rope_freqs can be "
            "loaded, take another checkpoint"
        )
    factor = stated.old_factor if stated.factor is None else stated.factor
    if kind == "none" or not factor:  # 0 is how llama.cpp says: not scaled
        factor = 1.0
    if tensor is None and factor == 1.0:
        return None
    each = np.ones(head_dim // 2) if tensor is None else np.asarray(tensor, np.float64).reshape(-1)
    return tuple((each * factor).tolist())


def _check_architecture(kind: object, source: str) -> None:
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{source} is of architecture {kind!r:.80}, which the generator does not know; "
            f"take a checkpoint of {', '.join(ARCHITECTURES)}"
        )
