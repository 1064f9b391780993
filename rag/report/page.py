"""A page as a list of blocks, written as Markdown (GitHub's tables) or as one self-contained HTML file.

    blocks = [Heading(1, "Report"), Table(("system", "nDCG@10"), (("bm25", "0.40"),)), Picture("a.png", png, "a")]
    markdown(blocks)          # refers to a.png, which belongs beside it
    html("Report", blocks)    # holds the picture itself, as a data URI; no script, nothing fetched

Every text is plain: what looks like markup in it is escaped and shown as typed.
"""

import base64
import html as entities
import re
import struct
from collections.abc import Iterator, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Heading:
    """A title; level 1 is the page's own."""

    level: int
    text: str


@dataclass(frozen=True)
class Paragraph:
    """One paragraph of prose."""

    text: str


@dataclass(frozen=True)
class Bullets:
    """A plain list of sentences."""

    items: Sequence[str]


@dataclass(frozen=True)
class Table:
    """Rows of cells, as many in each as in `header`; the rows in `strong` stand out."""

    header: Sequence[str]
    rows: Sequence[Sequence[str]]
    strong: frozenset[int] = frozenset()

    def __post_init__(self):
        for row in self.rows:
            if len(row) != len(self.header):
                raise ValueError(f"{len(row)} cells under {len(self.header)} headings: {row}")


@dataclass(frozen=True)
class Picture:
    """A PNG at twice the size it is shown in; `name` is its file's, `alt` says what it shows."""

    name: str
    png: bytes
    alt: str


Block = Heading | Paragraph | Bullets | Table | Picture

_NUMERIC = re.compile(r"(?:[-+<]?[0-9].*|n/a|)", re.S)


def _numeric_columns(table: Table) -> list[bool]:
    """Which columns hold figures (and gaps) only: they are aligned on the right."""
    columns = list(zip(*table.rows, strict=True)) or [()] * len(table.header)
    return [any(column) and all(_NUMERIC.fullmatch(cell) for cell in column) for column in columns]


def _one_line(text: str) -> str:
    return " ".join(text.split())


# --- Markdown


def markdown(blocks: Sequence[Block]) -> str:
    """The page in GitHub's Markdown; pictures are referred to by name."""
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


def _markdown_table(table: Table) -> str:
    rule = ["---:" if numeric else "---" for numeric in _numeric_columns(table)]
    rows = [[_inline(cell) for cell in row] for row in table.rows]
    for number in table.strong:
        rows[number] = [f"**{cell}**" if cell else "" for cell in rows[number]]
    lines = [[_inline(cell) for cell in table.header], rule, *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _inline(text: str) -> str:
    """Plain text in Markdown, not at a line's start: marks lose their meaning."""
    text = _one_line(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    text = re.sub(r"([\\`*|~$]|\](?=[(\[:]))", r"\\\1", text)
    return re.sub(r"(?<![^\W_])_|_(?![^\W_])", r"\\_", text)  # inside a word it marks nothing


def _escaped(text: str) -> str:
    """As _inline, also for the marks that count at a line's start: # - + = [ and 1. among them."""
    text = re.sub(r"^([0-9]+)(?=[.)](?: |$))", r"\1\\", _inline(text))
    return re.sub(r"^(?=[#=+\[-])", r"\\", text)


# --- HTML

_STYLE = """
:root { color-scheme: light; }
body { font: 15px/1.5 system-ui, "Segoe UI", Helvetica, Arial, sans-serif; color: #1c2024; background: #fff;
  margin: 0 auto; padding: 1.5rem 1.5rem 4rem; max-width: 84rem; }
h1 { font-size: 1.8rem; line-height: 1.2; margin: .5rem 0 1rem; }
h2 { font-size: 1.4rem; margin: 2.75rem 0 .75rem; padding-top: .75rem; border-top: 2px solid #d5dae0; }
h3 { font-size: 1.1rem; margin: 2rem 0 .5rem; }
p, ul { max-width: 60rem; }
li { margin: .2rem 0; }
nav { background: #f3f5f8; padding: .6rem 1rem; border-radius: 6px; }
nav a { margin-right: 1.5rem; }
a { color: #0b5c9e; }
.wide { overflow-x: auto; margin: .75rem 0 1.25rem; }
table { border-collapse: collapse; font-size: .87rem; font-variant-numeric: tabular-nums; }
th, td { padding: .32rem .7rem; text-align: left; vertical-align: top; border-bottom: 1px solid #e3e7eb; }
th { border-bottom: 2px solid #9aa5b1; vertical-align: bottom; background: #f8f9fb; }
th.number, td.number { text-align: right; white-space: nowrap; }
td:not(.number) { overflow-wrap: anywhere; min-width: 5rem; max-width: 34rem; }
td:first-child:not(.number), td.number:first-child + td:not(.number) { min-width: 13rem; }
tbody tr:nth-child(even) { background: #fafbfc; }
tbody tr:hover { background: #eef4fa; }
tr.strong td { font-weight: 650; background: #fff5e0; }
img { display: block; max-width: 100%; height: auto; margin: .75rem 0 1.25rem; }
@media print { body { max-width: none; padding: 0; } .wide { overflow: visible; } img { break-inside: avoid; } }
"""


def html(title: str, blocks: Sequence[Block]) -> str:
    """The page as one HTML 5 document with nothing outside itself: style and pictures are in it."""
    body = "\n".join(_html_blocks(blocks))
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{_text(title)}</title>\n<style>{_STYLE}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def _html_blocks(blocks: Sequence[Block]) -> Iterator[str]:
    for number, block in enumerate(blocks):
        yield _html_block(block, number)
        if isinstance(block, Heading) and block.level == 1:
            yield _navigation(blocks)


def _navigation(blocks: Sequence[Block]) -> str:
    links = [
        f'<a href="#s{number}">{_text(block.text)}</a>'
        for number, block in enumerate(blocks)
        if isinstance(block, Heading) and block.level == 2
    ]
    return f"<nav>{' '.join(links)}</nav>"


def _html_block(block: Block, number: int) -> str:
    match block:
        case Heading(level, text):
            return f'<h{level} id="s{number}">{_text(text)}</h{level}>'
        case Paragraph(text):
            return f"<p>{_text(text)}</p>"
        case Bullets(items):
            return "<ul>\n" + "\n".join(f"<li>{_text(item)}</li>" for item in items) + "\n</ul>"
        case Table():
            return _html_table(block)
        case Picture(_, png, alt):
            width, height = struct.unpack(">II", png[16:24])  # of the IHDR chunk, which is always the first
            data = base64.b64encode(png).decode("ascii")
            size = f'width="{width // 2}" height="{height // 2}"'
            return f'<img {size} alt="{_text(alt)}" src="data:image/png;base64,{data}">'


def _html_table(table: Table) -> str:
    kinds = [' class="number"' if numeric else "" for numeric in _numeric_columns(table)]
    head = "".join(
        f'<th scope="col"{kind}>{_text(cell)}</th>' for kind, cell in zip(kinds, table.header, strict=True)
    )
    lines = []
    for number, row in enumerate(table.rows):
        cells = "".join(f"<td{kind}>{_text(cell)}</td>" for kind, cell in zip(kinds, row, strict=True))
        kind = ' class="strong"' if number in table.strong else ""
        lines.append(f"<tr{kind}>{cells}</tr>")
    rows = "\n".join(lines)
    return f'<div class="wide"><table>\n<thead><tr>{head}</tr></thead>\n<tbody>\n{rows}\n</tbody>\n</table></div>'


def _text(text: str) -> str:
    return entities.escape(_one_line(text))
