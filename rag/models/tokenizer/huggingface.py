"""Build tokenizers from Hugging Face checkpoint folders: tokenizer.json and the small JSON files beside it."""

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tokenizers

from rag.models.configuration import Configuration, read_json, validate
from rag.models.tokenizer.tokenizer import END_TEXTS, Kind, Tokenizer, TokenizerSpec, read_core, unique_ids
from rag.runtime.records import reason
from rag.types import UserError

_MAX_PATTERN_LENGTH = 4000  # characters
_MAX_GROWTH = 1000


class NamedTemplate(Configuration):
    """One of several chat templates in tokenizer_config.json."""

    name: str
    template: str


class ChatTemplateConfig(Configuration):
    """The chat templates in tokenizer_config.json: one, or several with names."""

    chat_template: str | list[NamedTemplate] | None = None


class GenerationConfigJson(Configuration):
    """generation_config.json."""

    eos_token_id: int | list[int] | None = None


def matches(path: Path) -> bool:
    """Return True: `load` says what a path that is no checkpoint folder lacks (TokenizerSource)."""
    return True


def files(path: Path) -> list[Path]:
    """Return the folder's JSON files and chat templates."""
    return [*sorted(path.glob("*.json")), *sorted(path.glob("*.jinja"))]


def load(path: Path) -> Tokenizer:
    """Build the tokenizer of a checkpoint folder. Raises UserError for a missing, damaged or dangerous file."""
    core = read_core(path)
    _check_steps(core, path)
    config_file, generation_file = path / "tokenizer_config.json", path / "generation_config.json"
    config = read_json(config_file)
    declared = read_json(path / "special_tokens_map.json") | config
    texts = {name: _content(value) for name, value in declared.items() if name.endswith("_token")}

    def token_id(*names: str) -> int | None:
        stated = (text for name in names if (text := texts.get(name)))
        return next((index for text in stated if (index := core.token_to_id(text)) is not None), None)

    generation = validate(GenerationConfigJson, read_json(generation_file), str(generation_file))
    stops = generation.eos_token_id
    added = core.get_added_tokens_decoder()
    ends = [index for index, token in sorted(added.items()) if token.content in END_TEXTS]
    template = validate(ChatTemplateConfig, config, str(config_file)).chat_template
    kind, strips_space = _kind(core)
    spec = TokenizerSpec(
        kind=kind,
        strips_space=strips_space,
        bos_id=token_id("bos_token", "cls_token"),
        eos_ids=unique_ids([token_id("eos_token"), *(stops if isinstance(stops, list) else [stops]), *ends]),
        unk_id=token_id("unk_token"),
        pad_id=token_id("pad_token"),
        chat_template=_chat_template(path, template),
    )
    return Tokenizer(core, spec)


def _content(token: object) -> str | None:
    """Return the text of a special token, which these files write as a string or as {"content": ...}."""
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


def _chat_template(folder: Path, stated: str | list[NamedTemplate] | None) -> str | None:
    path = folder / "chat_template.jinja"
    if path.is_file():
        try:
            return path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read {path} ({reason(error)}); fetch the file again") from error
    if isinstance(stated, list):
        return {entry.name: entry.template for entry in stated}.get("default")
    return stated


def _check_steps(core: tokenizers.Tokenizer, folder: Path) -> None:
    """Raise UserError if the normalizer or pre-tokenizer could run without end or make texts much longer."""
    growth = 1
    for part in (core.normalizer, core.pre_tokenizer):
        for step in _steps(json.loads(part.__getstate__())) if part is not None else ():
            pattern = step["pattern"].get("Regex") if isinstance(step.get("pattern"), dict) else None
            if pattern is not None and (len(pattern) > _MAX_PATTERN_LENGTH or _repeats_a_group(pattern)):
                raise UserError(
                    f"the tokenizer in {folder} splits by the pattern {pattern!r:.80}, which may take without end; "
                    "take another checkpoint"
                )
            growth *= max(1, len(step.get("content") or ""), len(step.get("prepend") or ""))
    if growth > _MAX_GROWTH:
        raise UserError(
            f"the tokenizer in {folder} makes texts {growth:,} times as long; take another checkpoint"
        )


def _steps(part: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield a normalizer or pre-tokenizer, and the members if it is a sequence."""
    yield part
    for name in ("normalizers", "pretokenizers"):
        for step in part.get(name) or ():
            yield from _steps(step)


def _repeats_a_group(pattern: str) -> bool:
    """Whether a regular expression repeats a group without a limit, as (a+)+ does, or has a back-reference."""
    plain = re.sub(r"\\[^1-9k]", "x", pattern)  # escaped characters
    plain = re.sub(r"\[\^?\]?[^\[\]]*(\[[^\[\]]*\][^\[\]]*)*\]", "x", plain)  # classes, and classes in them
    return bool(re.search(r"\)(?:[*+]|\{\d*,\d*\})|\\[1-9k]", plain))


def _kind(core: tokenizers.Tokenizer) -> tuple[Kind, bool]:
    """Return `kind` and `strips_space` of TokenizerSpec, from the tokenizer's decoder."""
    decoder = json.loads(core.decoder.__getstate__()) if core.decoder is not None else {"type": None}
    steps = decoder.get("decoders", [decoder])
    types = {step["type"] for step in steps}
    if "ByteLevel" in types:
        return "byte_level", False
    if types & {"ByteFallback", "Metaspace"}:
        return "sentencepiece", any(
            step["type"] == "Strip" or (step["type"] == "Metaspace" and step.get("prepend_scheme") != "never")
            for step in steps
        )
    return ("wordpiece" if "WordPiece" in types else "other"), False
