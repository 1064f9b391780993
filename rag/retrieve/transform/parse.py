"""Parse the texts that a language model writes: lists of questions, one on each line, and single passages.

Small models answer when they are asked to rephrase, repeat themselves and the prompt, and put introductions before
what they write.
"""

import re
from collections.abc import Iterable, Sequence

from rag.runtime.records import parse_json
from rag.types import Message

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)  # of a model that reasons aloud
_MARK = re.compile(r"(?:[-*•·–—>#]+|\(?(?:\d{1,2}|[a-z])[.):])(?:\s+|$)", re.IGNORECASE)  # of a list
_NUMBER = re.compile(r"(?:^|(?<=\s))\(?(\d{1,2})[.)]\s+")
_LABEL = re.compile(
    r"(?:(?:the|re-?written|rephrased|reworded|alternative|other|search|sub|follow[ -]?up|simpler|new|original"
    r"|hypothetical|short|example)[ -]+)*"
    r"(?:sub)?(?:quer(?:y|ies)|questions?|passage|paragraph|document|answer|rewrite|keywords?|[qa])"
    r"(?: *#?\d{1,2})? *:\s*",
    re.IGNORECASE,
)
_QUOTED_AT_END = re.compile(r":\s*[\"“]([^\"“”]+)[\"”]?\.?$")  # ... you can use this query: "..."
_QUOTES = ('""', "“”", "''", "‘’", "«»", "``", "「」")


def lines(raw: str) -> list[str]:
    """Return the texts of a list, one on each line, without numbers, bullets, labels, quotes and introductions."""
    raw = _THOUGHT.sub("", raw).strip()
    found = _json_list(raw)
    if found is None:
        found = [item for line in raw.splitlines() for item in _numbered(line)]
    bare = [_bare(_quoted(item)) for item in found]
    return [text for text in bare if normal(text) and not text.endswith(":")]


def passage(raw: str) -> list[str]:
    """Return the whole text on one line, without label, quotes and introduction; no text where it is blank."""
    parts = [line.strip() for line in _THOUGHT.sub("", raw).splitlines() if line.strip()]
    if len(parts) > 1 and parts[0].endswith(":"):
        parts = parts[1:]
    text = _bare(" ".join(" ".join(parts).split()))
    return [text] if normal(text) else []


def without_echoes(raw: str, messages: Sequence[Message]) -> str:
    """Return the text without the lines that only repeat a line of the prompt."""
    prompted = {normal(_bare(line)) for message in messages for line in message.content.splitlines()}
    prompted.discard("")
    return "\n".join(line for line in raw.splitlines() if normal(_bare(line)) not in prompted)


def distinct(texts: Iterable[str]) -> list[str]:
    """Return the texts without those that differ from an earlier one only in case, punctuation and spaces."""
    first: dict[str, str] = {}
    for text in texts:
        first.setdefault(normal(text), text)
    return list(first.values())


def normal(text: str) -> str:
    """Return only the words, in lower case; empty for a text without any."""
    return " ".join(re.findall(r"\w+", text.casefold()))


def _json_list(raw: str) -> list[str] | None:
    if not raw.startswith("["):
        return None
    try:
        values = parse_json(raw)
    except ValueError:  # not JSON, cut off, or nested too deeply
        return None
    return values if all(isinstance(value, str) for value in values) else None


def _numbered(line: str) -> list[str]:
    """Return the items of "1. ... 2. ... 3. ..." on one line; else the line."""
    marks = list(_NUMBER.finditer(line))
    if len(marks) < 2 or [int(mark[1]) for mark in marks] != list(range(1, len(marks) + 1)):
        return [line]
    ends = [mark.start() for mark in marks[1:]] + [len(line)]
    return [line[mark.end() : end] for mark, end in zip(marks, ends, strict=True)]


def _bare(line: str) -> str:
    """Return a line without list mark, label, emphasis and quotes, in whatever order they enclose it."""
    text, before = line.replace("**", "").strip(), None
    while text != before:
        before = text
        for pattern in (_MARK, _LABEL):
            if mark := pattern.match(text):
                text = text[mark.end() :]
        if len(text) > 1 and text[0] + text[-1] in _QUOTES:
            text = text[1:-1]
        text = text.strip()
    return text


def _quoted(line: str) -> str:
    """Return the text that an introduction on the same line quotes; else the line."""
    quoted = _QUOTED_AT_END.search(line.strip())
    return quoted[1] if quoted else line
