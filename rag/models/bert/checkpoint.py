"""BERT-family checkpoints: which tensor goes where, and what the files say of architecture and pooling.

Hugging Face folders (config.json, safetensors, and the files that sentence-transformers adds) and GGUF files;
both end up as the same module, kept converted (rag.models.checkpoint.keep): the second start maps memory.
`load` gives an encoder, `load_classifier` one with its sequence-classification head, from folders only.
"""

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from rag.models import checkpoint
from rag.models.bert.configuration import (  # fmt: skip
    config_from_gguf,
    config_from_huggingface,
    listed_modules,
    max_length,
    pooling_modules,
    prompts_of,
    sentence_settings,
)
from rag.models.bert.model import (
    Bert,
    BertClassifier,
    BertConfig,
    Linear,
    Pooling,
    abstract,
    abstract_classifier,
)
from rag.models.checkpoint import Rule
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.runtime.machine import cpu_flags
from rag.types import UserError

DTYPES = ("float32", "bfloat16", "int8")  # of the layers' weights
PREFIXES = ("bert.", "roberta.")  # where the encoder sits inside a model with a head

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

_SETTINGS = "encoder.json"
_MOST_LABELS = 1 << 20


@dataclass(frozen=True, slots=True)
class EncoderSettings:
    """What a checkpoint says beside its weights."""

    config: BertConfig
    pooling: Pooling
    query_prompt: str = ""  # what the checkpoint wants written before a question ...
    document_prompt: str = ""  # ... and before a passage
    lower_case: bool = False  # texts are lower-cased before the tokenizer sees them


@dataclass(frozen=True, slots=True)
class ClassifierSettings:
    """What a sequence classifier's checkpoint says beside its weights."""

    config: BertConfig
    labels: int
    max_length: int  # tokens of a pair, special ones included
    separators: int  # special tokens that stand between the two texts: 1 in BERT, 2 in RoBERTa


def load(path: Path, dtype: str = "float32") -> tuple[Bert, Tokenizer, EncoderSettings]:
    """The encoder, tokenizer and settings of a Hugging Face folder or a GGUF file, memory-mapped.

    `dtype` is one of DTYPES, that of the layers' weights; tables and normalisations stay float32. Raises UserError
    for another architecture, tensors that do not fit, and pooling that is not mean or CLS.
    """
    convert = _convert_gguf if checkpoint.is_gguf(path) else _convert_huggingface
    folder = checkpoint.keep("bert", source_files(path), partial(convert, path))
    values = json.loads((folder / _SETTINGS).read_text())
    config, pooling = BertConfig(**values.pop("config")), Pooling(**values.pop("pooling"))
    model = checkpoint.load_module(abstract(config), folder)
    model = convert_layers(checkpoint.to_device(model, np.dtype(np.float32)), dtype)
    return model, Tokenizer.load(folder), EncoderSettings(config, pooling, **values)


def convert_layers(model: Bert, dtype: str) -> Bert:
    """The encoder with the weights of its layers in one of DTYPES.

    Without instructions for bfloat16 products a processor multiplies float32 numbers, of bfloat16's values, far
    sooner than bfloat16 ones.
    """
    if dtype == "int8":
        model = checkpoint.quantized(model)
        checkpoint.multiply_natively(model)
    if dtype == "bfloat16":
        multiplies = jax.default_backend() != "cpu" or any("bf16" in flag for flag in cpu_flags())
        for _, layer in nnx.iter_modules(model):
            if isinstance(layer, Linear):
                weight = layer.weight[...].astype(jnp.bfloat16)
                layer.weight = nnx.Param(weight if multiplies else weight.astype(jnp.float32))
    return model


def load_classifier(path: Path) -> tuple[BertClassifier, Tokenizer, ClassifierSettings]:
    """The sequence classifier in a Hugging Face folder: float32, memory-mapped.

    Raises UserError for another architecture, a checkpoint without such a head, and tensors that do not fit.
    """
    if checkpoint.is_gguf(path):
        raise UserError(
            f"{path} is a GGUF file, and classifiers are read from Hugging Face folders only; name the original"
        )
    folder = checkpoint.keep("bert-classifier", source_files(path), partial(_convert_classifier, path))
    values = json.loads((folder / _SETTINGS).read_text())
    settings = ClassifierSettings(BertConfig(**values.pop("config")), **values)
    model = checkpoint.load_module(abstract_classifier(settings.config, settings.labels), folder)
    return checkpoint.to_device(model, np.dtype(np.float32)), Tokenizer.load(folder), settings


def source_files(path: Path) -> list[Path]:
    """Every file that the embeddings depend on, in a fixed order; UserError if this is no checkpoint."""
    if checkpoint.is_gguf(path):
        return [path]
    if not (path / "config.json").is_file():
        raise UserError(
            f"{path} is neither a GGUF file nor a folder with a config.json; name an encoder's checkpoint"
        )
    files = [
        *checkpoint.shards(path),
        *sorted(path.glob("*.json")),
        *sorted(path.glob("[0-9]_*/config.json")),
    ]
    if (path / "modules.json").is_file():  # which may name other folders
        files += [path / place / "config.json" for kind, place in listed_modules(path) if kind == "Pooling"]
    files += sorted(path.glob("*.jinja"))
    return list({os.path.normpath(file): file for file in files if file.is_file()}.values())


def _convert_huggingface(path: Path, folder: Path) -> None:
    settings = settings_from_huggingface(path)
    tensors = {
        name: np.asarray(array, np.float32) for name, array in checkpoint.read_safetensors(path).items()
    }
    prefix = prefix_of(tensors)
    checkpoint.check_layers(
        tensors, prefix + "encoder.layer.{i}.", settings.config.num_hidden_layers, str(path)
    )
    tokenizer = Tokenizer.from_folder(path)
    checkpoint.check_vocabulary(tokenizer, settings.config.vocab_size, str(path))
    model = checkpoint.fill(abstract(settings.config), tensors, huggingface_table(prefix), str(path))
    _write(model, tokenizer, settings, folder)


def _convert_classifier(path: Path, folder: Path) -> None:
    values = checkpoint.read_config(path)
    config = config_from_huggingface(values, str(path))
    head = "bert" if config.position_offset == 0 else "roberta"
    tensors = {
        name: np.asarray(array, np.float32) for name, array in checkpoint.read_safetensors(path).items()
    }
    last = f"{HEADS[head][-1][0]}.weight"
    if last not in tensors:
        raise UserError(
            f"{path} holds no sequence-classification head ({last}); name a cross-encoder's checkpoint"
        )
    prefix = prefix_of(tensors)
    checkpoint.check_layers(tensors, prefix + "encoder.layer.{i}.", config.num_hidden_layers, str(path))
    tokenizer = Tokenizer.from_folder(path)
    checkpoint.check_vocabulary(tokenizer, config.vocab_size, str(path))
    labels = tensors[last].shape[:1]
    if not labels or not 1 <= labels[0] <= _MOST_LABELS:
        raise UserError(f"{path} holds {last} with shape {tensors[last].shape}; the checkpoint is damaged")
    settings = ClassifierSettings(
        config, labels[0], max_length(path, config), separators=1 if head == "bert" else 2
    )
    module = abstract_classifier(config, settings.labels)
    model = checkpoint.fill(module, tensors, classifier_table(head, prefix), str(path))
    _write(model, tokenizer, settings, folder)


def _convert_gguf(path: Path, folder: Path) -> None:
    metadata, tensors = checkpoint.read_gguf(path)
    settings = settings_from_gguf(metadata, tensors)
    checkpoint.check_layers(tensors, "blk.{i}.", settings.config.num_hidden_layers, str(path))
    tokenizer = Tokenizer.from_gguf(metadata)
    checkpoint.check_vocabulary(tokenizer, settings.config.vocab_size, str(path))
    model = checkpoint.fill(abstract(settings.config), tensors, gguf_table(), str(path))
    _write(model, tokenizer, settings, folder)


def _write(
    model: Bert | BertClassifier,
    tokenizer: Tokenizer,
    settings: EncoderSettings | ClassifierSettings,
    folder: Path,
) -> None:
    checkpoint.save_module(model, folder)
    (folder / _SETTINGS).write_text(json.dumps(asdict(settings), indent=1))
    tokenizer.save(folder)


def prefix_of(names: Iterable[str]) -> str:
    """What stands before the encoder's names: nothing, or the model's attribute in a model with a head."""
    return next((prefix for name in names for prefix in PREFIXES if name.startswith(prefix)), "")


def huggingface_table(prefix: str = "") -> Sequence[Rule]:
    """Names in a Hugging Face checkpoint -> paths in the module.

    gamma and beta are what the checkpoints of 2018 call a normalisation's weight and bias.
    """
    kinds = {"weight": "weight", "bias": "bias", "gamma": "weight", "beta": "bias"}
    used = [
        Rule(f"{prefix}{name}.{kind}", f"{name}.{ours}") for name, _ in NAMES for kind, ours in kinds.items()
    ]
    unused = [Rule(f"{prefix}{name}", None) for name in UNUSED]
    return [*used, *unused, *(Rule(name, None) for name in UNUSED_HEADS)]


def classifier_table(head: str, prefix: str) -> Sequence[Rule]:
    """Names in a sequence classifier's checkpoint -> paths in the module; `head` is a key of HEADS."""
    rules = [
        Rule(f"{name}.{kind}", f"{path}.{kind}") for name, path in HEADS[head] for kind in ("weight", "bias")
    ]
    inside = [
        Rule(rule.name, rule.path and f"bert.{rule.path}", rule.transform)
        for rule in huggingface_table(prefix)
    ]
    return [*rules, *inside]  # the first that matches counts, and the encoder's table leaves the pooler out


def gguf_table() -> Sequence[Rule]:
    """Names in a GGUF file of architecture `bert` -> paths in the module."""
    used = [Rule(f"{gguf}.{kind}", f"{name}.{kind}") for name, gguf in NAMES for kind in ("weight", "bias")]
    return [*used, *(Rule(f"cls.{kind}", None) for kind in ("weight", "bias"))]  # the pooler


def settings_from_huggingface(path: Path) -> EncoderSettings:
    """Architecture, pooling and prompts of a checkpoint folder; UserError for what this encoder cannot do.

    Without the files of sentence-transformers: the mean over the tokens, of unit length.
    """
    config = config_from_huggingface(checkpoint.read_config(path), str(path))
    prompts = prompts_of(path)
    mode, normalize = "mean", True
    if (path / "modules.json").is_file():
        mode, normalize = pooling_modules(path)
    return EncoderSettings(
        config,
        Pooling(mode, normalize, max_length(path, config)),
        query_prompt=prompts.get("query") or "",
        document_prompt=prompts.get("document", prompts.get("passage")) or "",
        lower_case=bool(sentence_settings(path).do_lower_case),
    )


def settings_from_gguf(metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]) -> EncoderSettings:
    """Architecture and pooling of a GGUF file."""
    return EncoderSettings(*config_from_gguf(metadata, tensors))
