"""Load Llama-family checkpoints: Hugging Face folders (config.json, safetensors) and GGUF files.

Both become the same module and are cached as converted files (rag.models.conversion_cache), so that later starts
memory-map the weights instead of dequantising them.
"""

from collections.abc import Mapping, Sequence
from datetime import date as day
from functools import partial
from pathlib import Path

import numpy as np

from rag.models import adapters, conversion_cache, tensor_files
from rag.models.checkpoint import Rule, check_layers, check_vocabulary, fill
from rag.models.configuration import read_settings, write_settings
from rag.models.gguf_file import is_gguf
from rag.models.layers import quantize_weights
from rag.models.llama.configuration import config_from_gguf, config_from_huggingface
from rag.models.llama.model import Llama, LlamaConfig, abstract
from rag.models.tokenizer import load_tokenizer, tokenizer_files
from rag.models.tokenizer.tokenizer import DEFAULT_DATE, Tokenizer
from rag.runtime.cache.keys import content_key
from rag.types import UserError

# (Hugging Face's name without "model.", llama.cpp's name); all have a .weight and some a .bias
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

_CONFIG_FILE = "config.json"


def load(
    path: Path, *, int8: bool = False, date: day = DEFAULT_DATE, adapter: Path | None = None
) -> tuple[Llama, Tokenizer]:
    """Load the decoder and tokenizer of a GGUF file or a Hugging Face folder.

    Args:
        path: the file or folder.
        int8: whether the weights are int8 with one scale a row (rag.ops.linear), or float32.
        date: given to chat templates that ask for today's date.
        adapter: the folder of an adapter (rag.models.adapters), which is merged before weights become int8.

    Returns:
        The model, with memory-mapped weights, and its tokenizer.

    Raises:
        UserError: the architecture is not known, tensors do not fit it, or the adapter is damaged or of other weights.
    """
    kind, convert = ("llama int8", partial(_quantize, path)) if int8 else ("llama", partial(_convert, path))
    if adapter:
        kind = f"{kind} with adapter {adapters.adapter_digest(adapter)}"
        convert = partial(_adapt, path, adapter, int8)
    folder = conversion_cache.converted_folder(kind, source_files(path), convert)
    model = conversion_cache.load_module(abstract(read_converted_config(folder), int8=int8), folder)
    return model, Tokenizer.load(folder, date)


def source_files(path: Path) -> list[Path]:
    """Return every file that answers depend on, in a fixed order. Raises UserError if this is not a checkpoint."""
    if is_gguf(path):
        return [path]
    if not path.is_dir():
        raise UserError(
            f"{path} is neither a GGUF file nor a folder; name one, or a Hugging Face checkpoint folder"
        )
    files = [*tensor_files.shards(path), *sorted(path.glob("*.json")), *tokenizer_files(path)]
    return list(dict.fromkeys(files))


def checkpoint_sha256(path: Path) -> str:
    """Return the SHA-256 by which an adapter names its base: of a GGUF file, or of a folder's file names and digests.

    Raises UserError if this is not a checkpoint.
    """
    digests = conversion_cache.file_digests(source_files(path))
    return digests[0][1] if len(digests) == 1 else content_key(digests)


def _convert(path: Path, folder: Path) -> None:
    """Write a checkpoint's weights, configuration and tokenizer into `folder`."""
    tensors: Mapping[str, np.ndarray]
    if is_gguf(path):
        metadata, tensors = tensor_files.read_gguf(path)
        config, layers = config_from_gguf(metadata, tensors), "blk.{i}."
        table = gguf_table(config, metadata["general.architecture"])
    else:
        config = config_from_huggingface(tensor_files.read_config(path), str(path))
        tensors, layers = tensor_files.read_safetensors(path), "model.layers.{i}."
        table = huggingface_table(config)
    check_layers(tensors, layers, config.num_hidden_layers, str(path))
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config.vocab_size, str(path))
    _write(fill(abstract(config), tensors, table, str(path)), tokenizer, folder)


def _quantize(path: Path, folder: Path) -> None:
    model, tokenizer = load(path)
    _write(quantize_weights(model), tokenizer, folder)


def _adapt(path: Path, adapter: Path, int8: bool, folder: Path) -> None:
    """Write a checkpoint's weights with those of an adapter added."""
    change = adapters.load_adapter(adapter)
    if change.base_sha256 not in (None, found := checkpoint_sha256(path)):
        raise UserError(
            f"{adapter} belongs to weights with SHA-256 {change.base_sha256}, and {path} has {found}; use the adapter "
            "with its own weights, or these weights without it"
        )
    model, tokenizer = load(path)
    merged = adapters.merge(model, change, str(adapter))
    _write(quantize_weights(merged) if int8 else merged, tokenizer, folder)


def _write(model: Llama, tokenizer: Tokenizer, folder: Path) -> None:
    conversion_cache.save_module(model, folder)
    write_settings(folder / _CONFIG_FILE, model.config)
    tokenizer.save(folder)


def read_converted_config(folder: Path) -> LlamaConfig:
    """Return the architecture of a converted checkpoint."""
    return read_settings(folder / _CONFIG_FILE, LlamaConfig)


def huggingface_table(config: LlamaConfig) -> Sequence[Rule]:
    """Return the table of names in a Hugging Face checkpoint -> paths in the module."""
    rules = [
        Rule(f"model.{name}.{kind}", f"{name}.{kind}") for name, _ in NAMES for kind in ("weight", "bias")
    ]
    # a checkpoint with tied embeddings may still hold the copy
    rules.append(Rule("lm_head.weight", None if config.tie_word_embeddings else "lm_head.weight"))
    rules.append(Rule("model.layers.{i}.self_attn.rotary_emb.inv_freq", None))  # a buffer of old versions
    return rules


def gguf_table(config: LlamaConfig, architecture: str) -> Sequence[Rule]:
    """Return the table of names in a GGUF file -> paths in the module.

    For the architecture `llama`, llama.cpp's converter reorders the rows of Q and K so that adjacent pairs are rotated.
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
    """Reorder the rows of a Q or K projection from llama.cpp's order (adjacent pairs) to Hugging Face's (halves)."""
    if weight.shape[0] % (2 * heads):
        return weight  # a wrong shape, which `fill` refuses
    pairs = weight.reshape(heads, weight.shape[0] // heads // 2, 2, *weight.shape[1:])
    return pairs.swapaxes(1, 2).reshape(weight.shape)
