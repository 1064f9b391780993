"""HTML files: headings, lists and tables become plain text of the same shape; navigation and scripts are removed."""

import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO

from rag.ingest.load.encoding import UnreadableFile, decode
from rag.ingest.load.markdown import first_heading

_DECLARED_ENCODING = re.compile(rb"charset\s*=\s*[\"']?\s*([\w.:-]+)", re.IGNORECASE)
_DROPPED = frozenset(
    "script style nav noscript template head svg iframe object canvas audio video button select "
    "textarea".split()
)
# Of these, the ones whose text a browser shows if the end tag is missing.
_SHOWN_UNCLOSED = frozenset("nav svg object canvas audio video button select".split())
_TAGS = re.compile(rf"<(/?)({'|'.join(_SHOWN_UNCLOSED)})\b[^>]*?(/?)>", re.IGNORECASE)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLANK_LINE = frozenset(  # a blank line before and after
    "address article aside blockquote body details dl fieldset figure footer form header hr main p pre "
    "section table".split()
) | frozenset(_HEADINGS)
_NEW_LINE = frozenset("caption dd div dt figcaption legend li summary tr".split())
_WHITE = re.compile("[ \t\n\r\f]+")  # the white space that HTML collapses; no-break spaces are not part of it
_PAGE_END = re.compile(r"</(?:body|html)\s*>", re.IGNORECASE)
_MAX_TAGS = 2_000_000  # in a page: parsing them takes some seconds
_MAX_DEPTH = 2048  # of nested elements: at an end tag the parser searches every level for the start tag
_MAX_INDENT = 16  # levels of a list: in deeper lists the indentation would be most of the text


def load_html(data: bytes) -> tuple[str, str]:
    """Return the text of an HTML file and its title, or its first heading if it has no title."""
    declared = _DECLARED_ENCODING.search(data[:4096])
    text, title = html_text(decode(data, declared[1].decode("ascii", "replace") if declared else ""))
    return text, title or first_heading(text)


def html_text(source: str) -> tuple[str, str]:
    """Return the readable text of a page and its title ("" if it has none).

    Headings become `# ...`, list items `- ...` or `1. ...` (indented two spaces a level, for the first 16), table
    rows `a | b | c`, and preformatted text is not changed. Time and memory are linear in the length of `source`.

    Raises:
        UnreadableFile: the page has more than 2,000,000 tags, its elements are nested more than 2,048 deep, or
            libxml2 stops before the end: half a page is never returned.
    """
    from lxml import etree  # here: an answer loads no files

    if source.count("<") > _MAX_TAGS:
        raise UnreadableFile(
            f"it has more than {_MAX_TAGS:,} HTML tags: divide it, or save its text as a .txt file"
        )
    # libxml2 ignores what follows an early </html>; without the two end tags it parses the rest too. Bytes, because
    # it rejects a str that begins with an XML declaration.
    data = _PAGE_END.sub("", source).encode("utf-8", "replace")
    page = _Page(_DROPPED - _unclosed(source))
    # Parsed as events: a tree would take 40 times the size of the page, and time quadratic in an element's attributes.
    parser = etree.HTMLParser(target=page, encoding="utf-8", huge_tree=True)
    if data:
        etree.fromstring(data, parser)
    fatal = [entry.message for entry in parser.error_log if entry.level_name == "FATAL"]
    if fatal:
        raise UnreadableFile(
            f"the HTML parser stops at an error ({fatal[0].strip()}): save its text as a .txt file"
        )
    return "".join(page.pieces), page.title


def _unclosed(source: str) -> set[str]:
    """Return the tags of dropped elements that lack an end tag: the parser closes them where the page ends."""
    missing = Counter[str]()
    for end, tag, empty in _TAGS.findall(source):
        missing[tag.lower()] += -1 if end else not empty
    return {tag for tag, count in missing.items() if count > 0}


@dataclass(slots=True)
class _Element:
    """An element that was started and has not ended."""

    tag: str
    dropped: bool  # whether its text, or the text of an element around it, is dropped
    children: int = 0  # elements in it so far


@dataclass
class _Page:
    """The parser's target: collects the text, and what must be written before the next word.

    Before the next word come line breaks, then markers such as `- `. The parser calls start, end, data and close.
    """

    dropped: frozenset[str]  # tags of the elements whose text is dropped
    pieces: list[str] = field(default_factory=list)
    title: str = ""
    breaks: int = 0
    markers: list[str] = field(default_factory=list)
    lists: list[int | None] = field(default_factory=list)  # open lists: their last number, None if unordered
    row: int = 0  # len(pieces) where the open table row began
    cell: int = -1  # len(pieces) where the open cell began, -1 outside rows
    preformatted: int = 0  # number of open <pre> elements
    path: list[_Element] = field(default_factory=list)  # the open elements, from the root
    text: StringIO = field(default_factory=StringIO)  # since the last element began or ended

    def start(self, tag: str, attributes: Mapping[str, str], _namespaces: object = None) -> None:
        self._flush()
        if len(self.path) == _MAX_DEPTH:
            raise UnreadableFile(
                f"its HTML elements are nested more than {_MAX_DEPTH:,} deep: save its text as a .txt file"
            )
        above = self.path[-1] if self.path else _Element("", False)
        hidden = "hidden" in attributes or attributes.get("aria-hidden") == "true"
        element = _Element(tag, above.dropped or tag in self.dropped or hidden)
        if not element.dropped:
            self._open(tag, first=above.children == 0)
        above.children += 1
        self.path.append(element)

    def end(self, tag: str) -> None:
        self._flush()
        element = self.path.pop()
        if not element.dropped:
            self._close(element.tag)

    def data(self, text: str) -> None:
        self.text.write(text)

    def close(self) -> None:
        self._flush()

    def _flush(self) -> None:
        """Write the text since the last element began or ended."""
        text = self.text.getvalue()
        if not text:
            return
        self.text = StringIO()
        if not self.path or not self.path[-1].dropped:
            self._write(text)
        elif not self.title and [element.tag for element in self.path[:4]] == ["html", "head", "title"]:
            self.title = text

    def _open(self, tag: str, first: bool) -> None:
        self._break(tag)
        match tag:
            case "ul" | "ol":
                self.lists.append(0 if tag == "ol" else None)
            case "li":
                self.markers.append(self._item())
            case "tr":
                self.row = len(self.pieces)
            case "td" | "th":
                self.cell = len(self.pieces)
                if self.cell > self.row:
                    self.breaks = 0  # a paragraph in the last cell ended, but the row goes on
                if not first:
                    self.markers.append(" | ")
            case "pre":
                self.preformatted += 1
            case "br" if not self.markers:
                self.breaks = min(2, self.breaks + 1)
            case heading if heading in _HEADINGS:
                self.markers.append(_HEADINGS[heading])

    def _close(self, tag: str) -> None:
        match tag:
            case "ul" | "ol":
                self.lists.pop()
            case "li" | "tr":
                self.cell = -1
                self.markers.clear()  # an empty item, or the empty cells that end a row
                self.breaks = min(self.breaks, 1)  # a paragraph in an item adds no blank line between items
            case "pre":
                self.preformatted -= 1
            case heading if self.markers and self.markers[-1] == _HEADINGS.get(heading):
                self.markers.pop()
        self._break(tag)

    def _write(self, text: str) -> None:
        at_start = bool(self.breaks or self.markers or not self.pieces)
        if self.preformatted:
            text = text.lstrip("\r\n") if at_start else text
        else:
            text = _WHITE.sub(" ", text)
            if at_start or self.pieces[-1][-1] in " \n":
                text = text.lstrip(" ")
        if text:
            lead = "\n" * self.breaks if self.pieces else ""
            self.pieces.append(lead + "".join(self.markers) + text)
            self.breaks = 0
            self.markers.clear()

    def _break(self, tag: str) -> None:
        # A paragraph begins on the line of its list item or table cell.
        if self.markers or self.cell == len(self.pieces):
            return
        if tag in _BLANK_LINE or (tag in ("ul", "ol") and not self.lists):
            self.breaks = 2
        elif tag in _NEW_LINE or tag in ("ul", "ol"):
            self.breaks = max(self.breaks, 1)

    def _item(self) -> str:
        indent = "  " * min(len(self.lists) - 1, _MAX_INDENT)
        if not self.lists or self.lists[-1] is None:
            return indent + "- "
        self.lists[-1] += 1
        return f"{indent}{self.lists[-1]}. "
