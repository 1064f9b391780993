"""A page as a list of blocks, written as Markdown (GitHub's tables) or as one self-contained HTML file.

    blocks = [Heading(1, "Report"), Table(("system", "nDCG@10"), (("bm25", "0.40"),)), Picture("a.png", png, "a")]
    markdown(blocks)          # refers to a.png, which belongs beside it
    html("Report", blocks)    # holds the picture itself, as a data URI; no script, nothing fetched

Every text is plain: markup in it is escaped and shown as typed.
"""

import base64
import math
import re
import struct
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined


@dataclass(frozen=True)
class Heading:
    """A heading; level 1 is the title of the page."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """A paragraph of text."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells, as many in each as in `header`; the rows in `strong` are highlighted."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{len(row)} cells under {len(self.header)} headings: {row}")


@dataclass(frozen=True)
class Picture:
    """A PNG at twice the size at which it is shown; `name` is its file's, `alt` describes it."""

    name: str
    png: bytes
    alt: str


@dataclass(frozen=True)
class Details:
    """Blocks that are hidden until their one line, `summary`, is clicked."""

    summary: str
    blocks: Sequence["Block"]


Block = Heading | Paragraph | Bullets | Table | Picture | Details

_WIDEST = 6  # columns of figures beside each other
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_NUMERIC = re.compile(r"(?:[-+<]?[0-9].*|n/a|)", re.S)


def _numeric_columns(table: Table) -> list[bool]:
    """Return which columns hold only numbers (and gaps): they are aligned on the right."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    return [any(column) and all(_NUMERIC.fullmatch(cell) for cell in column) for column in columns]


def slug_of(text: str) -> str:
    """Return a text as a part of a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:40] or "dataset"


def _one_line(text: str) -> str:
    """Return a text as one line, with U+FFFD for control characters and those that turn the direction of writing."""
    return _CONTROL.sub("\N{REPLACEMENT CHARACTER}", " ".join(text.split()))


def _unbroken(text: str) -> str:
    """Return a number's text with no-break spaces: a line may end only before a bracket, as in "0.40 [0.36, 0.44]"."""
    return re.sub(r" (?![\[(])", "\N{NO-BREAK SPACE}", _one_line(text))


def tables(header: Sequence[str], rows: Sequence[Sequence[str]], named: int = 1) -> list[Table]:
    """Return rows of many columns as tables of few, one below the other; each begins with the first `named` columns."""
    rest = range(named, len(header))
    count = max(1, math.ceil(len(rest) / _WIDEST))
    portions = [rest[len(rest) * i // count : len(rest) * (i + 1) // count] for i in range(count)]
    return [
        Table(
            [*header[:named], *(header[i] for i in portion)],
            [[*row[:named], *(row[i] for i in portion)] for row in rows],
        )
        for portion in portions
    ]


# --- Markdown


def markdown(blocks: Sequence[Block]) -> str:
    """Return the page in GitHub's Markdown; pictures are referred to by name."""
    return "\n\n".join(_markdown_block(block) for block in blocks) + "\n"


def _markdown_block(block: Block) -> str:
    match block:
        case Heading(level, text):
            return f"{'#' * level} {_escaped(text)}"
        case Paragraph(text):
            return _escaped(text)
        case Bullets(items):
            return "\n".join(f"- {_escaped(item)}" for item in items)
        case Table():
            return _markdown_table(block)
        case Picture(name, _, alt):
            return f"![{_escaped(alt)}]({name})"
        case Details(summary, blocks):
            inner = "\n\n".join(_markdown_block(block) for block in blocks)
            return f"<details><summary>{escape(_one_line(summary))}</summary>\n\n{inner}\n\n</details>"


def _markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(table)]
    rows = [[_inline(cell) for cell in row] for row in table.rows]
    for number in table.strong:
        rows[number] = [f"**{cell}**" if cell else "" for cell in rows[number]]
    lines = [[_inline(cell) for cell in table.header], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """Escape plain text for Markdown, not at the start of a line."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~$]|\](?=[(\[:]))", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it is not markup


def _escaped(text: str) -> str:
    """Escape plain text at the start of a line, where # - + = [ and 1. are markup too."""
    text = re.sub(r"^([0-9]+)(?=[.)](?: |$))", r"\1\\", _inline(text))
    return re.sub(r"^(?=[#=+\[-])", r"\\", text)


# --- HTML


def html(title: str, blocks: Sequence[Block]) -> str:
    """Return the page as one HTML 5 document that refers to nothing outside itself: style and pictures are in it."""
    loader = FileSystemLoader(Path(__file__).parent)
    environment = Environment(
        loader=loader,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
    )
    environment.filters |= {
        "kind": lambda block: type(block).__name__,
        "one_line": _one_line,
        "unbroken": _unbroken,
        "numeric_columns": _numeric_columns,
        "shown_size": _shown_size,
        "base64": lambda png: base64.b64encode(png).decode("ascii"),
    }
    return environment.get_template("page.html").render(title=title, blocks=blocks).lstrip()


def _shown_size(png: bytes) -> tuple[int, int]:
    """Return the width and height at which a picture is shown, half of its pixels."""
    width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
    return width // 2, height // 2
