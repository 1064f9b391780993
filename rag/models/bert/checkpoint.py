"""Load BERT-family checkpoints: Hugging Face folders and GGUF files.

A folder has config.json, safetensors, and the files that sentence-transformers adds. All become the same module and are
cached as converted files (rag.models.conversion_cache), so that later starts memory-map the weights. `load` returns an
encoder; `load_classifier` returns one with its sequence-classification head, from folders only.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag.models import conversion_cache, tensor_files
from rag.models.bert.configuration import (  # fmt: skip
    config_from_gguf,
    config_from_huggingface,
    max_length,
    modules_of,
    pooling_modules,
    prompts_of,
    sentence_settings,
)
from rag.models.bert.model import (
    Bert,
    BertClassifier,
    BertConfig,
    Pooling,
    PoolingMode,
    abstract,
    abstract_classifier,
)
from rag.models.checkpoint import Rule, check_layers, check_vocabulary, fill
from rag.models.configuration import read_settings, write_settings
from rag.models.gguf_file import is_gguf
from rag.models.layers import Linear, multiply_natively, quantize_weights
from rag.models.placement import to_device
from rag.models.tokenizer import load_tokenizer, tokenizer_files
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.runtime.machine.hardware import cpu_flags
from rag.types import UserError

LayerDtype = Literal["float32", "bfloat16", "int8"]  # of the layers' weights
PREFIXES = ("bert.", "roberta.")  # before the encoder's names in a model with a head

# (Hugging Face's name, llama.cpp's name)
NAMES = (
    ("embeddings.word_embeddings", "token_embd"),
    ("embeddings.position_embeddings", "position_embd"),
    ("embeddings.token_type_embeddings", "token_types"),
    ("embeddings.LayerNorm", "token_embd_norm"),
    ("encoder.layer.{i}.attention.self.query", "blk.{i}.attn_q"),
    ("encoder.layer.{i}.attention.self.key", "blk.{i}.attn_k"),
    ("encoder.layer.{i}.attention.self.value", "blk.{i}.attn_v"),
    ("encoder.layer.{i}.attention.output.dense", "blk.{i}.attn_output"),
    ("encoder.layer.{i}.attention.output.LayerNorm", "blk.{i}.attn_output_norm"),
    ("encoder.layer.{i}.intermediate.dense", "blk.{i}.ffn_up"),
    ("encoder.layer.{i}.output.dense", "blk.{i}.ffn_down"),
    ("encoder.layer.{i}.output.LayerNorm", "blk.{i}.layer_output_norm"),
)

# Known and not used: buffers, the pooler, and the heads of pre-training.
UNUSED = (
    "embeddings.position_ids",
    "embeddings.token_type_ids",
    "pooler.dense.weight",
    "pooler.dense.bias",
)
UNUSED_HEADS = (
    "cls.predictions.bias",
    *(f"cls.predictions.transform.dense.{kind}" for kind in ("weight", "bias")),
    *(f"cls.predictions.transform.LayerNorm.{kind}" for kind in ("weight", "bias", "gamma", "beta")),
    *(f"cls.predictions.decoder.{kind}" for kind in ("weight", "bias")),
    *(f"cls.seq_relationship.{kind}" for kind in ("weight", "bias")),
    "lm_head.bias",
    *(f"lm_head.{part}.{kind}" for part in ("dense", "layer_norm", "decoder") for kind in ("weight", "bias")),
)

# (name in a sequence classifier, path in ours): BERT's head is its pooler and `classifier`
HEADS = {
    "bert": (("bert.pooler.dense", "dense"), ("classifier", "out_proj")),
    "roberta": (("classifier.dense", "dense"), ("classifier.out_proj", "out_proj")),
}

_SETTINGS_FILE = "encoder.json"
_MAX_LABELS = 1 << 20


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """The settings of an encoder's checkpoint."""

    config: BertConfig
    pooling: Pooling
    query_prompt: str = ""  # text that the checkpoint expects before a question ...
    document_prompt: str = ""  # ... and before a passage
    lower_case: bool = False  # texts are lower-cased before they are tokenized


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """The settings of a sequence classifier's checkpoint."""

    config: BertConfig
    labels: int
    max_length: int  # tokens of a pair, special ones included
    separators: int  # special tokens between the two texts: 1 in BERT, 2 in RoBERTa


def load(path: Path, dtype: str = "float32") -> tuple[Bert, Tokenizer, EncoderSettings]:
    """Load the encoder, tokenizer and settings of a Hugging Face folder or a GGUF file.

    Args:
        dtype: float32, bfloat16 or int8, for the weights of the layers; embeddings and normalisations stay float32.

    Returns:
        The model, with memory-mapped weights where they are float32, its tokenizer, and its settings.

    Raises:
        UserError: the architecture is not known, tensors do not fit it, or the pooling is neither mean nor CLS.
    """
    folder = conversion_cache.converted_folder("bert", source_files(path), partial(_convert, path))
    settings = read_converted_settings(folder)
    model = conversion_cache.load_module(abstract(settings.config), folder)
    model = to_device(model, np.dtype(np.float32))
    return convert_layers(model, dtype), Tokenizer.load(folder), settings


def convert_layers(model: Bert, dtype: str) -> Bert:
    """Return the encoder with the weights of its layers in `dtype`.

    A processor without bfloat16 instructions multiplies float32 numbers much faster than bfloat16 ones: there the
    weights are rounded to bfloat16 and stored as float32.
    """
    if dtype == "int8":
        model = quantize_weights(model)
        multiply_natively(model)
    if dtype == "bfloat16":
        fast = jax.default_backend() != "cpu" or any("bf16" in flag for flag in cpu_flags())
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, Linear):
                weight = layer.weight[...].astype(jnp.bfloat16)
                layer.weight = nnx.Param(weight if fast else weight.astype(jnp.float32))
    return model


def load_classifier(path: Path) -> tuple[BertClassifier, Tokenizer, ClassifierSettings]:
    """Load the sequence classifier in a Hugging Face folder, with memory-mapped float32 weights.

    Raises:
        UserError: the architecture is not known, the checkpoint has no such head, or tensors do not fit.
    """
    if is_gguf(path):
        raise UserError(
            f"{path} is a GGUF file, and classifiers are read from Hugging Face folders only; name the original"
        )
    folder = conversion_cache.converted_folder(
        "bert-classifier", source_files(path), partial(_convert_classifier, path)
    )
    settings = read_settings(folder / _SETTINGS_FILE, ClassifierSettings)
    model = conversion_cache.load_module(abstract_classifier(settings.config, settings.labels), folder)
    return to_device(model, np.dtype(np.float32)), Tokenizer.load(folder), settings


def source_files(path: Path) -> list[Path]:
    """Return every file that embeddings depend on, in a fixed order. Raises UserError if this is not a checkpoint."""
    if is_gguf(path):
        return [path]
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither a GGUF file nor a folder with a config.json; name an encoder's checkpoint"
        )
    files = [
        *tensor_files.shards(path),
        *sorted(path.glob("*.json")),
        *sorted(path.glob("[0-9]_*/config.json")),
    ]
    if (path / "modules.json").is_file():  # it may name other folders
        files += [path / folder / "config.json" for kind, folder in modules_of(path) if kind == "Pooling"]
    files += tokenizer_files(path)
    return list({os.path.normpath(file): file for file in files if file.is_file()}.values())


def _convert(path: Path, folder: Path) -> None:
    """Write an encoder's weights, settings and tokenizer into `folder`."""
    tensors: Mapping[str, np.ndarray]
    if is_gguf(path):
        metadata, tensors = tensor_files.read_gguf(path)
        settings = EncoderSettings(*config_from_gguf(metadata, tensors))
        table, layers = gguf_table(), "blk.{i}."
    else:
        settings, tensors = settings_from_huggingface(path), tensor_files.read_safetensors(path)
        prefix = prefix_of(tensors)
        table, layers = huggingface_table(prefix), prefix + "encoder.layer.{i}."
    check_layers(tensors, layers, settings.config.num_hidden_layers, str(path))
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, settings.config.vocab_size, str(path))
    _write(fill(abstract(settings.config), tensors, table, str(path)), tokenizer, settings, folder)


def _convert_classifier(path: Path, folder: Path) -> None:
    """Write a classifier's weights, settings and tokenizer into `folder`."""
    config = config_from_huggingface(tensor_files.read_config(path), str(path))
    head = "bert" if config.position_offset == 0 else "roberta"
    tensors = tensor_files.read_safetensors(path)
    last = f"{HEADS[head][-1][0]}.weight"
    if last not in tensors:
        raise UserError(
            f"{path} holds no sequence-classification head ({last}); name a cross-encoder's checkpoint"
        )
    prefix = prefix_of(tensors)
    check_layers(tensors, prefix + "encoder.layer.{i}.", config.num_hidden_layers, str(path))
    tokenizer = load_tokenizer(path)
    check_vocabulary(tokenizer, config.vocab_size, str(path))
    labels = tensors[last].shape[:1]
    if not labels or not 1 <= labels[0] <= _MAX_LABELS:
        raise UserError(f"{path} holds {last} with shape {tensors[last].shape}; the checkpoint is damaged")
    separators = 1 if head == "bert" else 2
    settings = ClassifierSettings(config, labels[0], max_length(path, config), separators)
    module = abstract_classifier(config, settings.labels)
    _write(fill(module, tensors, classifier_table(head, prefix), str(path)), tokenizer, settings, folder)


def _write(
    model: Bert | BertClassifier,
    tokenizer: Tokenizer,
    settings: EncoderSettings | ClassifierSettings,
    folder: Path,
) -> None:
    conversion_cache.save_module(model, folder)
    write_settings(folder / _SETTINGS_FILE, settings)
    tokenizer.save(folder)


def read_converted_settings(folder: Path) -> EncoderSettings:
    """Return the settings of a converted encoder."""
    return read_settings(folder / _SETTINGS_FILE, EncoderSettings)


def prefix_of(names: Iterable[str]) -> str:
    """Return the prefix of the encoder's names: "", or the name of its attribute in a model with a head."""
    return next((prefix for name in names for prefix in PREFIXES if name.startswith(prefix)), "")


def huggingface_table(prefix: str = "") -> Sequence[Rule]:
    """Return the table of names in a Hugging Face checkpoint -> paths in the module.

    Checkpoints of 2018 call the weight and bias of a normalisation gamma and beta.
    """
    kinds = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    used = [
        Rule(f"{prefix}{name}.{kind}", f"{name}.{ours}") for name, _ in NAMES for kind, ours in kinds.items()
    ]
    unused = [Rule(f"{prefix}{name}", None) for name in UNUSED]
    return [*used, *unused, *(Rule(name, None) for name in UNUSED_HEADS)]


def classifier_table(head: str, prefix: str) -> Sequence[Rule]:
    """Return the table of names in a sequence classifier's checkpoint -> paths in the module.

    `head` is a key of HEADS. Its rules precede the encoder's, which leave the pooler out: the first match counts.
    """
    rules = [
        Rule(f"{name}.{kind}", f"{path}.{kind}") for name, path in HEADS[head] for kind in ("weight", "bias")
    ]
    encoder = [Rule(rule.name, rule.path and f"bert.{rule.path}") for rule in huggingface_table(prefix)]
    return [*rules, *encoder]


def gguf_table() -> Sequence[Rule]:
    """Return the table of names in a GGUF file of architecture `bert` -> paths in the module."""
    used = [Rule(f"{gguf}.{kind}", f"{name}.{kind}") for name, gguf in NAMES for kind in ("weight", "bias")]
    return [*used, *(Rule(f"cls.{kind}", None) for kind in ("weight", "bias"))]  # the pooler


def settings_from_huggingface(path: Path) -> EncoderSettings:
    """Return the architecture, pooling and prompts of a checkpoint folder.

    Without the files of sentence-transformers, the pooling is the mean over the tokens, normalised to unit length.
    Raises UserError for settings that this encoder does not support.
    """
    config = config_from_huggingface(tensor_files.read_config(path), str(path))
    prompts = prompts_of(path)
    mode: PoolingMode = "mean"
    normalize = True
    if (path / "modules.json").is_file():
        mode, normalize = pooling_modules(path)
    return EncoderSettings(
        config,
        Pooling(mode, normalize, max_length(path, config)),
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document", prompts.get("passage")) or "",
        lower_case=bool(sentence_settings(path).do_lower_case),
    )
