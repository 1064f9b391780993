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

from rag.models import checkpoint
from rag.models.checkpoint import Rule
from rag.models.llama import Llama, LlamaConfig, abstract
from rag.models.tokenizer import DEFAULT_DATE, Tokenizer
from rag.ops.rope import llama3_factors
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
    table = gguf_table(config, metadata["general.architecture"])
    _write(
        checkpoint.fill(abstract(config), tensors, table, str(path)), Tokenizer.from_gguf(metadata), folder
    )


def _convert_huggingface(path: Path, folder: Path) -> None:
    config = config_from_huggingface(checkpoint.read_config(path), str(path))
    tensors = {
        name: np.asarray(array, np.float32) for name, array in checkpoint.read_safetensors(path).items()
    }
    model = checkpoint.fill(abstract(config), tensors, huggingface_table(config), str(path))
    _write(model, Tokenizer.from_folder(path), folder)


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


def config_from_huggingface(values: Mapping[str, Any], source: str) -> LlamaConfig:
    """The architecture that a config.json describes; UserError for a family that is not this one."""
    values = checkpoint.Values(values, source)
    kind = values.get("model_type")
    _check_architecture(kind, source)
    if (activation := values.get("hidden_act", "silu")) != "silu":
        raise UserError(
            f"{source} has the activation {activation!r}; only silu is known, take another checkpoint"
        )
    if values.get("use_sliding_window"):
        raise UserError(f"{source} attends in a sliding window, which is not known; take another checkpoint")
    heads, width = values["num_attention_heads"], values["hidden_size"]
    head_dim = values.get("head_dim") or width // heads
    # transformers 5 moved theta into the scaling record
    scaling = values.get("rope_scaling") or values.get("rope_parameters") or {}
    theta = values.get("rope_theta") or scaling.get("rope_theta", 10000.0)
    return LlamaConfig(
        vocab_size=values["vocab_size"],
        hidden_size=width,
        intermediate_size=values["intermediate_size"],
        num_hidden_layers=values["num_hidden_layers"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("num_key_value_heads") or heads,
        head_dim=head_dim,
        max_position_embeddings=values["max_position_embeddings"],
        rms_norm_eps=values["rms_norm_eps"],
        rope_theta=theta,
        rope_factors=_rope_factors(scaling, head_dim, theta, source),
        tie_word_embeddings=values.get("tie_word_embeddings", False),
        qkv_bias=kind == "qwen2" or values.get("attention_bias", False),
        qk_norm=kind == "qwen3",
    )


def _rope_factors(
    scaling: Mapping[str, Any], head_dim: int, theta: float, source: str
) -> tuple[float, ...] | None:
    kind = scaling.get("rope_type", scaling.get("type", "default"))
    scaling = checkpoint.Values(scaling, f"{source}, in its rope_scaling,")
    if kind == "default":
        return None
    if kind == "linear":
        return (float(scaling["factor"]),) * (head_dim // 2)
    if kind == "llama3":
        return llama3_factors(head_dim, theta, scaling)
    raise UserError(
        f"{source} scales its rotary positions by {kind!r}; only linear and llama3 scaling can be loaded"
    )


def config_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> LlamaConfig:
    """The architecture that a GGUF file's metadata describes; UserError for a family that is not this one."""
    kind, source = metadata.get("general.architecture"), metadata.get("general.name", "the GGUF file")
    _check_architecture(kind, source)
    values = checkpoint.Values(
        {key.removeprefix(f"{kind}."): value for key, value in metadata.items()}, source
    )
    heads, width = values["attention.head_count"], values["embedding_length"]
    head_dim = values.get("attention.key_length", width // heads)
    return LlamaConfig(
        vocab_size=len(values["tokenizer.ggml.tokens"]),
        hidden_size=width,
        intermediate_size=values["feed_forward_length"],
        num_hidden_layers=values["block_count"],
        num_attention_heads=heads,
        num_key_value_heads=values.get("attention.head_count_kv", heads),
        head_dim=head_dim,
        max_position_embeddings=values["context_length"],
        rms_norm_eps=values["attention.layer_norm_rms_epsilon"],
        rope_theta=values.get("rope.freq_base", 10000.0),
        rope_factors=_gguf_rope_factors(values, tensors.get("rope_freqs.weight"), head_dim, source),
        tie_word_embeddings="output.weight" not in tensors,
        qkv_bias="blk.0.attn_q.bias" in tensors,
        qk_norm="blk.0.attn_q_norm.weight" in tensors,
    )


def _gguf_rope_factors(
    values: Mapping[str, Any], tensor: np.ndarray | None, head_dim: int, source: str
) -> tuple[float, ...] | None:
    """Llama 3's factors, which are a tensor, times the linear factor, as llama.cpp applies them."""
    if (turned := values.get("rope.dimension_count", head_dim)) != head_dim:
        raise UserError(
            f"{source} rotates {turned} of its heads' {head_dim} dimensions; only whole heads are known, "
            "take another checkpoint"
        )
    kind = values.get("rope.scaling.type", "linear")  # llama.cpp's default, of files that say a factor alone
    if kind not in ("none", "linear"):
        raise UserError(
            f"{source} scales its rotary positions by {kind!r}; only linear scaling and rope_freqs can be "
            "loaded, take another checkpoint"
        )
    factor = values.get("rope.scaling.factor", values.get("rope.scale_linear", 0.0))
    if kind == "none" or factor == 0.0:  # 0 is how llama.cpp says: not scaled
        factor = 1.0
    if tensor is None and factor == 1.0:
        return None
    each = np.ones(head_dim // 2) if tensor is None else np.asarray(tensor, np.float64)
    return tuple((each * factor).tolist())


def _check_architecture(kind: str | None, source: str) -> None:
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{source} is of architecture {kind!r}, which the generator does not know; "
            f"take a checkpoint of {', '.join(ARCHITECTURES)}"
        )
