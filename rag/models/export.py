"""Write a decoder, with its adapter merged, as a Hugging Face folder or as a GGUF file that other programs run too.

The names of tensors and the order of their rows come from the tables that load checkpoints. The configuration and the
tokenizer are those of the source: copied to a target of the same kind, converted for the other kind.
"""

import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag.models import tensor_files
from rag.models.checkpoint import Rule, dotted
from rag.models.gguf_file import is_gguf
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama.configuration import LlamaGgufMetadata
from rag.models.llama.model import Llama, LlamaConfig
from rag.models.tokenizer import tokenizer_files
from rag.models.tokenizer.export import gguf_metadata, huggingface_files
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.ops.rope import llama3_factors
from rag.runtime.cache.folder import write_errors
from rag.runtime.files import atomic_file, atomic_folder
from rag.runtime.records import reason
from rag.types import UserError

Format = Literal["huggingface", "gguf"]
Dtype = Literal["float32", "float16", "bfloat16", "q8_0"]

# dtype -> gguf's names of the type of a tensor, and of the type of most tensors of a file
_GGUF_TYPES = {
    "float32": ("F32", "ALL_F32"),
    "float16": ("F16", "MOSTLY_F16"),
    "bfloat16": ("BF16", "MOSTLY_BF16"),
    "q8_0": ("Q8_0", "MOSTLY_Q8_0"),
}
_INDEX = "model.safetensors.index.json"
# Llama 3.1 to 3.3 differ only in the factor.
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}


def export(
    source: Path,
    target: Path,
    *,
    format: Format = "huggingface",
    dtype: Dtype = "float32",
    adapter: Path | None = None,
    overwrite: bool = False,
) -> None:
    """Write a checkpoint as a folder or file that appears whole or not at all.

    Args:
        source: a GGUF file or a Hugging Face folder.
        target: the folder, or the GGUF file.
        format: of the target.
        dtype: of its weights. In a GGUF file vectors stay float32, and with q8_0 (blocks of 32 int8 values with a
            float16 scale) also the matrices whose rows such blocks do not divide.
        adapter: the folder of an adapter that is merged into the weights.
        overwrite: whether an existing target is replaced, if it is of this format.

    Raises:
        UserError: the source cannot be loaded or expressed in the format, or the target cannot be written.
    """
    if format == "huggingface" and dtype == "q8_0":
        raise UserError("only GGUF files have dtype=q8_0; set format=gguf, or float32, float16 or bfloat16")
    _check_target(target, format, overwrite)
    model, tokenizer = llama_checkpoint.load(source, adapter=adapter)
    with write_errors(target):
        if format == "huggingface":
            with atomic_folder(target, replace=overwrite) as folder:
                write_huggingface(source, model, tokenizer, folder, dtype)
        else:
            with atomic_file(target) as file:
                _write_gguf(source, model, tokenizer, Path(file.name), dtype)


def _check_target(target: Path, format: Format, overwrite: bool) -> None:
    """Raise UserError if something exists at the target, except a checkpoint of this format that may be replaced."""
    if not os.path.lexists(target):
        return
    if not overwrite:
        raise UserError(f"{target} exists already: choose another output.path, or add output.overwrite=true.")
    if not (is_gguf(target) if format == "gguf" else (target / "config.json").is_file()):
        kind = "GGUF file" if format == "gguf" else "Hugging Face checkpoint folder"
        raise UserError(
            f"{target} exists and is no {kind}, so it is not replaced: choose another output.path."
        )


def write_huggingface(source: Path, model: Llama, tokenizer: Tokenizer, folder: Path, dtype: str) -> None:
    """Write a model into a folder, with the settings of the checkpoint that it was loaded from.

    Args:
        source: the checkpoint.
        model: its weights, as they are or changed.
        tokenizer: its tokenizer.
        folder: an existing one.
        dtype: of the weights in the file.

    Raises:
        UserError: the source cannot be expressed in this format.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import save_file

    if is_gguf(source):
        settings = _huggingface_settings(model.config, str(source))
        for name, content in huggingface_files(tokenizer).items():
            (folder / name).write_text(content, encoding="utf-8")
    else:
        settings = tensor_files.read_config(source)
        settings.pop("dtype", None)  # the name of torch_dtype since transformers 5, which knows both
        for file in tokenizer_files(source):
            if file.name != _INDEX:
                shutil.copyfile(file, folder / file.name)
    text = json.dumps(settings | {"torch_dtype": dtype}, indent=2)
    (folder / "config.json").write_text(text, encoding="utf-8")
    tensors = tensors_by_name(model, llama_checkpoint.huggingface_table(model.config))
    weights = {name: array.astype(jnp.dtype(dtype), copy=False) for name, array in tensors.items()}
    try:
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    except SafetensorError as error:
        raise OSError(reason(error)) from error


def _write_gguf(source: Path, model: Llama, tokenizer: Tokenizer, path: Path, dtype: str) -> None:
    import gguf

    metadata: dict[str, Any]
    if is_gguf(source):
        metadata, stored = tensor_files.read_gguf(source)
        rope_freqs = stored.get("rope_freqs.weight")
    else:
        metadata, rope_freqs = _gguf_settings(model.config, str(source))
        metadata["general.name"] = source.resolve().name
        metadata |= gguf_metadata(tokenizer, model.config.vocab_size, str(source))
    architecture = metadata["general.architecture"]
    tensors = tensors_by_name(model, llama_checkpoint.gguf_table(model.config, architecture))
    if rope_freqs is not None:
        tensors["rope_freqs.weight"] = rope_freqs
    type_name, file_type = _GGUF_TYPES[dtype]
    writer = gguf.GGUFWriter(path, architecture)
    try:
        writer.add_file_type(gguf.LlamaFileType[file_type])
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        for key, value in metadata.items():
            _add_entry(writer, key, value)
        for name, array in tensors.items():
            kind = gguf.GGMLQuantizationType[type_name]
            if array.ndim == 1 or array.shape[1] % gguf.GGML_QUANT_SIZES[kind][0]:
                kind = gguf.GGMLQuantizationType.F32
            writer.add_tensor(name, gguf.quantize(array, kind), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
    finally:
        writer.close()


def _add_entry(writer: Any, key: str, value: Any) -> None:
    """Add an entry of GGUF metadata under the type that llama.cpp expects; those of the source file are left out."""
    import gguf

    own = {"general.architecture", "general.file_type", "general.quantization_version", "general.alignment"}
    if key in own or value == []:
        return
    kind = gguf.GGUFValueType.get_type(value)
    if type(value) is int:
        kind = gguf.GGUFValueType.UINT32 if 0 <= value < 1 << 32 else gguf.GGUFValueType.INT64
    writer.add_key_value(key, value, kind)


def tensors_by_name(model: Llama, table: Sequence[Rule]) -> dict[str, np.ndarray]:
    """Return the model's weights by their names in a file: the inverse of `rag.models.checkpoint.fill`."""
    rules = {rule.path: rule for rule in table}
    tensors = {}
    for path, leaf in nnx.to_flat_state(nnx.state(model)):
        layer = "".join(str(part) for part in path if isinstance(part, int))
        rule = rules[dotted("{i}" if isinstance(part, int) else part for part in path)]
        array = np.asarray(leaf.get_value())
        if rule.transform:  # it reorders rows: their numbers show from where each comes
            reordered = np.empty_like(array)
            reordered[rule.transform(np.arange(len(array)))] = array
            array = reordered
        tensors[rule.name.replace("{i}", layer)] = array
    return tensors


def _architecture(config: LlamaConfig, source: str) -> str:
    """Return the architecture's name in both formats. Raises UserError if none is like this one."""
    match config.qkv_bias, config.qk_norm:
        case False, False:
            return "llama"
        case True, False:
            return "qwen2"
        case False, True:
            return "qwen3"
    raise UserError(
        f"{source} has biases and norms of queries and keys, and no architecture has both; export it in its own format"
    )


def _huggingface_settings(config: LlamaConfig, source: str) -> dict[str, Any]:
    """Return the content of config.json. Raises UserError if it cannot express the configuration."""
    architecture = _architecture(config, source)
    values = asdict(config)
    for name in ("rope_factors", "qkv_bias", "qk_norm"):
        del values[name]
    if config.rope_factors is not None:
        values["rope_scaling"] = _huggingface_rope_scaling(config, config.rope_factors, source)
    return {
        "architectures": [f"{architecture.capitalize()}ForCausalLM"],
        "model_type": architecture,
        "hidden_act": "silu",
        **values,
    }


def _huggingface_rope_scaling(
    config: LlamaConfig, factors: Sequence[float], source: str
) -> Mapping[str, object]:
    if len(set(factors)) == 1:
        return {"rope_type": "linear", "factor": factors[0]}
    scaling = {"rope_type": "llama3", "factor": float(round(max(factors))), **_LLAMA3}
    if not np.allclose(factors, llama3_factors(config.head_dim, config.rope_theta, scaling), rtol=1e-5):
        raise UserError(
            f"{source} scales its rotary positions in another way than Llama 3.1 to 3.3; export it with format=gguf"
        )
    return scaling


def _gguf_settings(config: LlamaConfig, source: str) -> tuple[dict[str, Any], np.ndarray | None]:
    """Return the metadata of the architecture, and rope_freqs or None.

    Raises UserError if GGUF cannot express the configuration.
    """
    architecture = _architecture(config, source)
    values: dict[str, Any] = {
        "width": config.hidden_size,
        "ffn": config.intermediate_size,
        "layers": config.num_hidden_layers,
        "heads": config.num_attention_heads,
        "kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "rotated": config.head_dim,
        "positions": config.max_position_embeddings,
        "epsilon": config.rms_norm_eps,
        "theta": config.rope_theta,
    }
    factors, rope_freqs = config.rope_factors, None
    if factors and len(set(factors)) == 1:
        values |= {"scaling": "linear", "factor": factors[0]}
    elif factors and architecture != "llama":
        raise UserError(
            f"{source} has a factor for each rotary frequency, which GGUF knows only for the architecture llama; "
            "export it with format=huggingface"
        )
    elif factors:
        rope_freqs = np.asarray(factors, np.float32)
    keys = {name: f"{architecture}.{field.alias}" for name, field in LlamaGgufMetadata.model_fields.items()}
    metadata = {keys[name]: value for name, value in values.items()}
    metadata[f"{architecture}.attention.value_length"] = config.head_dim
    return {"general.architecture": architecture, "general.type": "model"} | metadata, rope_freqs
