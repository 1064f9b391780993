"""Convert tokenizers to the files of a Hugging Face folder and to GGUF metadata.

Loading them gives equal ids: rag.models.tokenizer.huggingface and rag.models.tokenizer.gguf are the inverse.
"""

import itertools
import json
from collections.abc import Mapping
from typing import Any

from rag.models.tokenizer.gguf import (
    CONTROL,
    KEY,
    NORMAL,
    PRE_TOKENIZERS,
    UNUSED,
    USER_DEFINED,
    from_metadata,
    pre_tokenizer,
)
from rag.models.tokenizer.tokenizer import END_TEXTS, TOKENIZER_FILE, Tokenizer
from rag.types import UserError

_REMEDY = "export it with format=huggingface"


def huggingface_files(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the contents of tokenizer.json, tokenizer_config.json and generation_config.json, by file name."""
    spec = tokenizer.spec
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "chat_template": spec.chat_template,
        **tokenizer.special_texts,
    }
    generation = {
        "bos_token_id": spec.bos_id,
        "eos_token_id": list(spec.eos_ids) or None,
        "pad_token_id": spec.pad_id,
    }
    return {
        TOKENIZER_FILE: tokenizer.to_json(),
        "tokenizer_config.json": _json_object(config),
        "generation_config.json": _json_object(generation),
    }


def _json_object(values: Mapping[str, object]) -> str:
    return json.dumps({name: value for name, value in values.items() if value is not None}, indent=2)


def gguf_metadata(tokenizer: Tokenizer, rows: int, source: str) -> dict[str, Any]:
    """Return the GGUF metadata of a byte-level BPE tokenizer.

    Args:
        tokenizer: of a Hugging Face folder.
        rows: of the model's embedding; ids without a token become unused tokens, as in llama.cpp's converter.
        source: the checkpoint's name in errors.

    Raises:
        UserError: GGUF cannot express this tokenizer.
    """
    content, spec = json.loads(tokenizer.to_json()), tokenizer.spec
    model, added = content["model"], {token["id"]: token for token in content["added_tokens"]}
    if spec.kind != "byte_level" or model["type"] != "BPE" or not model["merges"]:
        raise UserError(
            f"the tokenizer in {source} is not byte-level BPE with merges, the only kind that is converted to GGUF; "
            f"{_REMEDY}"
        )
    if some := [token["content"] for token in added.values() if token["lstrip"] or token["rstrip"]]:
        raise UserError(
            f"the tokenizer in {source} removes the white space beside {some[0]!r:.80}, which GGUF cannot express; "
            f"{_REMEDY}"
        )
    texts = {index: text for text, index in model["vocab"].items()}
    texts |= {index: token["content"] for index, token in added.items()}
    types = {index: CONTROL if token["special"] else USER_DEFINED for index, token in added.items()}
    add_bos, add_eos = _around(tokenizer, source)
    values = {
        "model": "gpt2",
        "pre": _pre_tokenizer_name(content, source),
        "tokens": [texts.get(index, f"[PAD{index}]") for index in range(rows)],
        "token_type": [types.get(index, NORMAL if index in texts else UNUSED) for index in range(rows)],
        "merges": [" ".join(pair) for pair in model["merges"]],
        "bos_token_id": spec.bos_id,
        "eos_token_id": next(iter(spec.eos_ids), None),
        "unknown_token_id": spec.unk_id,
        "padding_token_id": spec.pad_id,
        "add_bos_token": add_bos,
        "add_eos_token": add_eos,
    }
    # other end tokens that no reader knows by their texts
    others = [index for index in spec.eos_ids[1:] if texts.get(index) not in END_TEXTS]
    values |= dict(zip(("eot_token_id", "eom_token_id"), others, strict=False))
    metadata = {KEY + name: value for name, value in values.items() if value is not None}
    if spec.chat_template is not None:
        metadata["tokenizer.chat_template"] = spec.chat_template
    _check_rules(tokenizer, from_metadata(metadata), source)
    return metadata


def _around(tokenizer: Tokenizer, source: str) -> tuple[bool, bool]:
    """Return whether a text begins with BOS and whether it ends with EOS. Raises UserError for other tokens."""
    bos, eos = tokenizer.spec.bos_id, next(iter(tokenizer.spec.eos_ids), None)
    inside, whole = tokenizer.encode("a", special=False), tokenizer.encode("a")
    for add_bos, add_eos in itertools.product((False, True), repeat=2):
        if [bos] * add_bos + inside + [eos] * add_eos == whole:
            return add_bos, add_eos
    raise UserError(
        f"the tokenizer in {source} puts other tokens around a text than BOS and EOS, which GGUF cannot express; "
        f"{_REMEDY}"
    )


def _pre_tokenizer_name(content: dict[str, Any], source: str) -> str:
    """Return GGUF's name of the rules that split a text into words. Raises UserError if it has none."""
    for name in PRE_TOKENIZERS:
        if _steps(json.loads(pre_tokenizer(name).__getstate__())) == _steps(content["pre_tokenizer"]):
            return name
    raise UserError(
        f"the tokenizer in {source} splits a text into words in another way than those that have a name in GGUF "
        f"({', '.join(PRE_TOKENIZERS)}); {_REMEDY}"
    )


def _steps(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return the steps of a pre-tokenizer without `trim_offsets`, which changes no id."""
    steps = (part or {}).get("pretokenizers", [part or {}])
    return [{name: value for name, value in step.items() if name != "trim_offsets"} for step in steps]


def _check_rules(tokenizer: Tokenizer, converted: Tokenizer, source: str) -> None:
    """Raise UserError if the converted tokenizer follows other rules than its original."""
    if _rules(tokenizer) != _rules(converted) or not tokenizer.eos_ids <= converted.eos_ids:
        raise UserError(
            f"the tokenizer in {source} has a normalizer, merge rules or end tokens that GGUF cannot express; {_REMEDY}"
        )


def _rules(tokenizer: Tokenizer) -> tuple[object, ...]:
    content = json.loads(tokenizer.to_json())
    names = ("ignore_merges", "byte_fallback", "dropout", "continuing_subword_prefix", "end_of_word_suffix")
    return content["normalizer"], *(content["model"].get(name) or None for name in names)
