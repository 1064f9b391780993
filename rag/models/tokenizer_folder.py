"""Tokenizers out of Hugging Face checkpoint folders: tokenizer.json and the small JSON files beside it."""

import json
from pathlib import Path

from tokenizers import Tokenizer

from rag.models.configuration import Configuration, configured
from rag.models.tokenizer import END_TEXTS, TokenizerSpec, read_core, read_json, unique_ids
from rag.records import reason
from rag.types import UserError


class _Named(Configuration):
    name: str
    template: str


class _Templates(Configuration):
    """The chat templates of tokenizer_config.json: one, or several by name."""

    chat_template: str | list[_Named] | None = None


class _Generation(Configuration):
    """generation_config.json."""

    eos_token_id: int | list[int] | None = None


def build(folder: Path) -> tuple[Tokenizer, TokenizerSpec]:
    """The tokenizer of a checkpoint folder. Raises UserError for a missing or damaged file."""
    core = read_core(folder)
    config = read_json(folder / "tokenizer_config.json")
    named = str(folder / "tokenizer_config.json")
    declared = read_json(folder / "special_tokens_map.json") | config
    texts = {name: _content(value) for name, value in declared.items() if name.endswith("_token")}

    def token_id(*names: str) -> int | None:
        found = (core.token_to_id(texts[name]) for name in names if texts.get(name))
        return next((index for index in found if index is not None), None)

    generation = folder / "generation_config.json"
    stops = configured(_Generation, read_json(generation), str(generation)).eos_token_id
    added = core.get_added_tokens_decoder()
    ends = [index for index, token in sorted(added.items()) if token.content in END_TEXTS]
    return core, TokenizerSpec(
        **_decoder_traits(core),
        bos_id=token_id("bos_token", "cls_token"),
        eos_ids=unique_ids([token_id("eos_token"), *(stops if isinstance(stops, list) else [stops]), *ends]),
        unk_id=token_id("unk_token"),
        pad_id=token_id("pad_token"),
        chat_template=_chat_template(folder, configured(_Templates, config, named).chat_template),
    )


def _content(token: object) -> str | None:
    """The text of a special token, which these files give as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, stated: str | list[_Named] | None) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({reason(error)}); fetch the file again") from error
    if isinstance(stated, list):
        return {entry.name: entry.template for entry in stated}.get("default")
    return stated


def _decoder_traits(core: Tokenizer) -> dict[str, object]:
    """`kind` and `strips_space`, read from the tokenizer's decoder."""
    decoder = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {"type": None}
    steps = decoder.get("decoders", [decoder])
    types = {step["type"] for step in steps}
    if "ByteLevel" in types:
        return {"kind": "byte_level"}
    if types & {"ByteFallback", "Metaspace"}:
        strips = any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
        return {"kind": "sentencepiece", "strips_space": strips}
    return {"kind": "wordpiece" if "WordPiece" in types else "other"}
