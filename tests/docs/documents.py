"""Read Markdown documents: their fenced blocks, the text around them, headings and links."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r" *(`{3,})(\S*).*")


class Block(NamedTuple):
    """A fenced block of a document."""

    path: Path
    line: int  # of its first line, from 1
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def documents() -> list[Path]:
    """Return README.md and the pages of docs/: all that a user is meant to follow."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def parse(path: Path) -> tuple[str, list[Block]]:
    """Return a document's text with empty lines in place of its fenced blocks, and these blocks."""
    prose, blocks, fence, inside = [], [], None, []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        match = _FENCE.fullmatch(line)
        if fence is None and match:
            fence, language, inside = match[1], match[2], []
        elif fence is not None and line.strip() == fence:
            blocks.append(Block(path, number - len(inside), language, "\n".join(inside)))
            fence = None
        elif fence is not None:
            inside.append(line)
        else:
            prose.append(line)
            continue
        prose.append("")
    if fence is not None:
        raise ValueError(f"{path}: the block before line {number} has no end")
    return "\n".join(prose), blocks


def links(prose: str) -> Iterator[tuple[int, str]]:
    """Yield line and target of every link and picture; code spans are no links."""
    for number, line in enumerate(prose.splitlines(), 1):
        plain = re.sub(r"`[^`]*`", "", line)
        for match in re.finditer(r"\]\(<?([^()\s>]+)>?(?: \"[^\"]*\")?\)|(?:src|href)=\"([^\"]+)\"", plain):
            yield number, match[1] or match[2]


def anchors(prose: str) -> set[str]:
    """Return the anchors of a document's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    for heading in re.findall(r"^#{1,6} +(.+?) *#*$", prose, re.M):
        plain = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", plain.lower()).replace(" ", "-")
        found[name] = found.get(name, -1) + 1
    return {name if n == 0 else f"{name}-{n}" for name, last in found.items() for n in range(last + 1)}
