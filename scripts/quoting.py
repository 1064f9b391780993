"""Quote the free text of a command line, so that it passes through the grammars of Hydra and OmegaConf unchanged."""

import re
from collections.abc import Sequence
from pathlib import Path

from hydra_run import groups
from settings import CONF

# Settings whose value is free text; a leading dot means the last word of any dotted key.
FREE_TEXT = (
    *("question", "runs", "baseline", "output", "keep", "stages"),
    *(".path", ".url", ".model", ".uri"),
    *("generator.weights", "generator.adapter", "bench.weights", "dataset.output"),
)
# Texts and lists of texts with escapes: \n is a line break on a command line, as it is in YAML, since shells leave the
# backslash. So are \t and \r; \\ is a backslash, and any other backslash stays.
TEMPLATES = (
    *(".system", ".user", ".passage", ".separator", ".abstain_answer"),
    *(".query_prompt", ".document_prompt", ".finished", "reranker.prompt"),
)
TEXT_LISTS = (".stop", ".separators")
MEASURE_LISTS = (".measures",)  # of names such as RBP(p=0.8)@10, which Hydra would take for a function
_MEASURE = re.compile(r"""(["']).*?\1|\w+\(\w+=[^()]*\)(?:@\w+)?""", re.DOTALL)
_ESCAPES = {"n": "\n", "t": "\t", "r": "\r", "\\": "\\"}


def quote(text: str) -> str:
    """Return a Hydra override value that OmegaConf resolves to exactly this text.

    Two grammars are applied to it. In OmegaConf's, `${` starts an interpolation: it and the backslashes right before it
    are escaped (its documentation: "Escaped interpolations"), and a lone "???", its mark of a missing value, is the
    default of a resolver. In Hydra's, text is a quoted string, which Hydra's own class writes.
    """
    from hydra.core.override_parser.types import Quote, QuotedString

    literal = re.sub(r"(\\*)\$\{", r"\1\1\\${", text) if text != "???" else '${oc.select:_,"???"}'
    return QuotedString(literal, Quote.single).with_quotes()


def quote_overrides(
    arguments: Sequence[str], free_text: Sequence[str] = FREE_TEXT, config_dir: Path = CONF
) -> list[str]:
    """Return a command line in Hydra's grammar: free text is quoted, and null for a group is an empty list of choices.

    `key=null` is null for every key except `question`. In a sweep, `path=choice(a,b)` is a choice, as in Hydra; a
    plain comma is part of the text.

    Args:
        arguments: The command line as typed.
        free_text: The keys of free text, as in FREE_TEXT.
        config_dir: The folder of the configuration, whose groups are looked up.
    """
    sweep, chosen_from = "-m" in arguments or "--multirun" in arguments, groups(config_dir)

    def quoted(argument: str) -> str:
        match = re.fullmatch(r"(\+{0,2}([\w./-]+)(?:@[\w.]+)?=)(.*)", argument, re.S)
        if match is None:
            return argument
        start, key, value = match.groups()
        template = _is_one(key, TEMPLATES)
        if key in chosen_from:
            return start + re.sub(r"(?<![^,(])null(?![^,)])", "[]", value)
        if _is_one(key, TEXT_LISTS):
            return start + _unescaped_parts(value)
        if _is_one(key, MEASURE_LISTS):
            return start + _MEASURE.sub(lambda m: m[0] if m[1] else quote(m[0]), value)
        if not template and not _is_one(key, free_text):
            return argument
        if (sweep and re.fullmatch(r"choice\(.*\)", value, re.S)) or (value == "null" and key != "question"):
            return argument
        return start + quote(_unescaped(value) if template else value)

    return [quoted(argument) for argument in arguments]


def _is_one(key: str, names: Sequence[str]) -> bool:
    return any(key.endswith(name) if name.startswith(".") else key == name for name in names)


def _unescaped(text: str, mark: str = "") -> str:
    """Return the text with its escapes resolved, including that of `mark`, the quotation mark around it."""
    return re.sub(r"\\(.)", lambda m: m[1] if m[1] == mark else _ESCAPES.get(m[1], m[0]), text, flags=re.S)


def _unescaped_parts(value: str) -> str:
    """Return a list, or a sweep over lists, with its texts quoted and their escapes resolved.

    Words without quotes that Hydra interprets stay as they are: null, numbers, and ${...} instead of the whole list.
    """
    if re.fullmatch(r"\$\{[^{}]*\}", value):
        return value

    def text(match: re.Match) -> str:
        mark = match[0][0]
        if mark in "\"'":
            return quote(_unescaped(match[0][1:-1], mark))
        literal = "\\" in match[0] or "${" in match[0] or match[0] == "???"
        return quote(_unescaped(match[0])) if literal else match[0]

    return re.sub(r"""(["'])(?:\\.|(?!\1|\\).)*\1|[^\s\[\](),"']+""", text, value, flags=re.S)
