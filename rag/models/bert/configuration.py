"""Read the architecture and pooling of BERT-family checkpoints from Hugging Face's files and from GGUF metadata."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from annotated_types import Ge
from pydantic import Field, TypeAdapter, ValidationError

from rag.models.bert.model import Activation, BertConfig, Pooling, PoolingMode
from rag.models.configuration import (  # fmt: skip
    Configuration,
    Epsilon,
    Heads,
    Layers,
    Positions,
    Rows,
    Width,
    head_size,
    read_json,
    validate,
)
from rag.models.tensor_files import gguf_name
from rag.runtime.records import misfit, parse_json, reason, stays_inside
from rag.types import UserError

FAMILIES = ("bert", "roberta", "xlm-roberta", "camembert")  # model_type in config.json

_ACTIVATIONS: dict[str, Activation] = {"gelu": "gelu", "gelu_new": "gelu_new", "relu": "relu"}
_POOLING_MODES: dict[str, PoolingMode] = {"mean": "mean", "cls": "cls"}
_GGUF_POOLING: dict[int, PoolingMode] = {1: "mean", 2: "cls"}  # llama.cpp's enum llama_pooling_type


class BertConfigJson(Configuration):
    """config.json."""

    model_type: str = "bert"
    position_embedding_type: str | None = "absolute"
    hidden_act: str = "gelu"
    vocab_size: Rows
    hidden_size: Width
    num_hidden_layers: Layers
    num_attention_heads: Heads
    intermediate_size: Width
    max_position_embeddings: Rows
    type_vocab_size: Rows
    layer_norm_eps: Epsilon


class RobertaConfigJson(Configuration):
    """The setting of config.json that only RoBERTa and its relatives need."""

    pad_token_id: Annotated[int, Ge(0)]


class SentencePrompts(Configuration):
    """Schema of config_sentence_transformers.json: prompts by the kind of text (query, document)."""

    prompts: dict[str, str | None] | None = None


class SentenceSettings(Configuration):
    """sentence_bert_config.json."""

    do_lower_case: bool | None = False
    max_seq_length: Positions | None = None


class SentenceModule(Configuration):
    """An entry of modules.json, sentence-transformers' list of what is applied in order."""

    type: str
    path: str = ""


class TokenizerLimits(Configuration):
    """Schema of tokenizer_config.json, in which 10^30 means no limit."""

    model_max_length: Annotated[float, Ge(1)] | None = None


class BertGgufMetadata(Configuration):
    """GGUF metadata of the architecture `bert`."""

    tokens: list[Any] = Field(alias="tokenizer.ggml.tokens", min_length=1, max_length=1 << 24)
    pooling: int = Field(1, alias="bert.pooling_type")
    layers: Layers = Field(alias="bert.block_count")
    heads: Heads = Field(alias="bert.attention.head_count")
    ffn: Width = Field(alias="bert.feed_forward_length")
    epsilon: Epsilon = Field(alias="bert.attention.layer_norm_epsilon")
    positions: Positions = Field(alias="bert.context_length")


def prompts_of(path: Path) -> Mapping[str, str | None]:
    """Return the prompts of a checkpoint folder, such as those of "query" and "document"."""
    file = path / "config_sentence_transformers.json"
    return validate(SentencePrompts, read_json(file), str(file)).prompts or {}


def sentence_settings(path: Path) -> SentenceSettings:
    """Return the settings in a folder's sentence_bert_config.json, or their defaults."""
    file = path / "sentence_bert_config.json"
    return validate(SentenceSettings, read_json(file), str(file))


def max_length(path: Path, config: BertConfig) -> int:
    """Return how many tokens an input may have, special ones included.

    It is the limit in sentence-transformers' file, or else the tokenizer's, and no more than the positions.
    """
    positions = config.max_position_embeddings - config.position_offset
    file = path / "tokenizer_config.json"
    stated = sentence_settings(path).max_seq_length
    limit = stated or validate(TokenizerLimits, read_json(file), str(file)).model_max_length or positions
    return int(min(limit, positions))


def pooling_modules(path: Path) -> tuple[PoolingMode, bool]:
    """Return (mode, whether vectors are normalised) from modules.json. Raises UserError for other modules."""
    mode, normalize = None, False
    for kind, folder in modules_of(path):
        match kind:
            case "Transformer":
                pass
            case "Pooling":
                mode = _pooling_mode(path / folder / "config.json")
            case "Normalize":
                normalize = True
            case other:
                raise UserError(
                    f"{path}/modules.json asks for a module {reason(ValueError(other))}, which this encoder does not "
                    "have; take a checkpoint of Transformer, Pooling and Normalize only"
                )
    if mode is None:
        raise UserError(f"{path}/modules.json names no Pooling module; take a sentence-embedding checkpoint")
    return mode, normalize


def modules_of(folder: Path) -> list[tuple[str, str]]:
    """Return (class, folder) of every module in a checkpoint's modules.json. Raises UserError if it is damaged."""
    path = folder / "modules.json"
    try:
        modules = TypeAdapter(list[SentenceModule]).validate_python(
            parse_json(path.read_text(encoding="utf-8"))
        )
    except (OSError, ValueError) as error:  # pydantic's among them
        cause = misfit(error) if isinstance(error, ValidationError) else reason(error)
        raise UserError(f"{path} is no list of modules ({cause}); fetch the file again") from error
    for module in modules:
        if not stays_inside(module.path):
            raise UserError(
                f"{path} names a folder outside of its own ({module.path!r:.80}); do not use this checkpoint"
            )
    return [(module.type.rsplit(".", 1)[-1], module.path) for module in modules]


def _pooling_mode(path: Path) -> PoolingMode:
    values = read_json(path)
    mode = values.get("pooling_mode")  # since version 5; before, there was one switch for each mode
    if mode is None:
        on = [key for key, value in values.items() if key.startswith("pooling_mode_") and value]
        known = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}
        mode = known.get(on[0], on[0]) if len(on) == 1 else " + ".join(on)
    if not isinstance(mode, str) or mode not in _POOLING_MODES:
        raise UserError(
            f"{path} asks for pooling {mode!r:.200}; only mean and cls are known, take another checkpoint"
        )
    return _POOLING_MODES[mode]


def config_from_huggingface(values: Mapping[str, Any], source: str) -> BertConfig:
    """Return the architecture that a config.json describes. Raises UserError if this encoder does not cover it."""
    stated = validate(BertConfigJson, values, source)
    family = stated.model_type
    if family not in FAMILIES:
        raise UserError(
            f"{source} is a {family!r:.80} model; the encoder knows only {', '.join(FAMILIES)}, take one of these"
        )
    if (positions := stated.position_embedding_type or "absolute") != "absolute":
        raise UserError(f"{source} has positions {positions!r:.80}; only absolute ones are known")
    if (activation := stated.hidden_act) not in _ACTIVATIONS:
        raise UserError(
            f"{source} has the activation {activation!r:.80}; only gelu, gelu_new and relu are known"
        )
    head_size(None, stated.hidden_size, stated.num_attention_heads, source)
    offset = 0 if family == "bert" else validate(RobertaConfigJson, values, source).pad_token_id + 1
    if offset >= stated.max_position_embeddings:
        raise UserError(
            f"{source} has {stated.max_position_embeddings} positions, of which {offset} are not used; its "
            "configuration is damaged, fetch it again"
        )
    return BertConfig(
        vocab_size=stated.vocab_size,
        hidden_size=stated.hidden_size,
        num_hidden_layers=stated.num_hidden_layers,
        num_attention_heads=stated.num_attention_heads,
        intermediate_size=stated.intermediate_size,
        max_position_embeddings=stated.max_position_embeddings,
        type_vocab_size=stated.type_vocab_size,
        layer_norm_eps=stated.layer_norm_eps,
        hidden_act=_ACTIVATIONS[activation],
        position_offset=offset,
    )


def config_from_gguf(
    metadata: Mapping[str, Any], tensors: Mapping[str, np.ndarray]
) -> tuple[BertConfig, Pooling]:
    """Return the architecture and pooling of a GGUF file. Its converter has removed RoBERTa's unused positions."""
    name = gguf_name(metadata)
    architecture = metadata.get("general.architecture")
    if architecture != "bert":
        raise UserError(
            f"{name} is of architecture {architecture!r:.80}, which the encoder does not know; take one of bert"
        )
    stated = validate(BertGgufMetadata, metadata, name)
    if stated.pooling not in _GGUF_POOLING:
        raise UserError(
            f"{name} asks for llama.cpp's pooling type {stated.pooling}; only mean (1) and cls (2) are known"
        )
    positions, width = _matrix_shape(tensors, "position_embd.weight", name)
    types, _ = _matrix_shape(tensors, "token_types.weight", name)
    head_size(None, width, stated.heads, name)
    config = BertConfig(
        vocab_size=len(stated.tokens),
        hidden_size=width,
        num_hidden_layers=stated.layers,
        num_attention_heads=stated.heads,
        intermediate_size=stated.ffn,
        max_position_embeddings=positions,
        type_vocab_size=types,
        layer_norm_eps=stated.epsilon,
    )
    return config, Pooling(_GGUF_POOLING[stated.pooling], True, min(positions, stated.positions))


def _matrix_shape(tensors: Mapping[str, np.ndarray], name: str, source: str) -> tuple[int, int]:
    shape = tensors[name].shape if name in tensors else ()
    if len(shape) != 2:
        raise UserError(f"{source} holds no table {name}; the file is damaged, or of another model")
    return shape
