"""Tokenizers out of Hugging Face checkpoint folders: tokenizer.json and the small JSON files beside it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from rag.models.configuration import Configuration, configured
from rag.models.tokenizer.tokenizer import END_TEXTS, TokenizerSpec, read_core, read_json, unique_ids
from rag.runtime.records import reason
from rag.types import UserError

_LONGEST_PATTERN = 4000  # characters
_MOST_GROWTH = 1000


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
    _check_steps(core, folder)
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


def _check_steps(core: Tokenizer, folder: Path) -> None:
    """Look at how texts are rewritten and split. Raises UserError for what could take or write without end."""
    growth = 1
    for part in (core.normalizer, core.pre_tokenizer):
        for step in _steps(json.loads(part.__getstate__())) if part is not None else ():
            pattern = step["pattern"].get("Regex") if isinstance(step.get("pattern"), dict) else None
            if pattern is not None and (len(pattern) > _LONGEST_PATTERN or _repeats_a_group(pattern)):
                raise UserError(
                    f"the tokenizer in {folder} splits by the pattern {pattern!r:.80}, which may take without end; "
                    "take another checkpoint"
                )
            growth *= max(1, len(step.get("content") or ""), len(step.get("prepend") or ""))
    if growth > _MOST_GROWTH:
        raise UserError(
            f"the tokenizer in {folder} makes texts {growth:,} times as long; take another checkpoint"
        )


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """A normalizer or pre-tokenizer, and those that it is a sequence of."""
    yield part
    for name in ("normalizers", "pretokenizers"):
        for step in part.get(name) or ():
            yield from _steps(step)


def _repeats_a_group(pattern: str) -> bool:
    """Whether a regular expression repeats a group without a limit, as (a+)+ does, or refers back to one."""
    plain = re.sub(r"\\[^1-9k]", "x", pattern)  # escaped characters
    plain = re.sub(r"\[\^?\]?[^\[\]]*(\[[^\[\]]*\][^\[\]]*)*\]", "x", plain)  # classes, and classes in them
    return bool(re.search(r"\)(?:[*+]|\{\d*,\d*\})|\\[1-9k]", plain))


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
