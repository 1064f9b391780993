"""HTML to readable plain text: headings, lists and tables keep their shape, navigation and scripts go."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from io import StringIO

from lxml import etree

_DROPPED = frozenset(
    "script style nav noscript template head svg iframe object canvas audio video button select "
    "textarea".split()
)
_HEADINGS = {f"h{level}": "#" * level + " " for level in range(1, 7)}
_BLANK_LINE = frozenset(  # a blank line before and after
    "address article aside blockquote body details dl fieldset figure footer form header hr main p pre "
    "section table".split()
) | frozenset(_HEADINGS)
_NEW_LINE = frozenset("caption dd div dt figcaption legend li summary tr".split())
_WHITE = re.compile("[ \t\n\r\f]+")  # what HTML collapses; no-break spaces are not among it
_PAGE_END = re.compile(r"</(?:body|html)\s*>", re.IGNORECASE)
_MOST_TAGS = 2_000_000  # of a page: some seconds
_DEEPEST = 2048  # elements within one another: the parser looks for what a tag ends at every level
_DEEPEST_INDENT = 16  # levels of a list: far below, the spaces before the items would be most of the text


class HtmlError(ValueError):
    """The page cannot be read; the message says why."""


def html_text(source: str) -> tuple[str, str]:
    """Return the readable text of a page and its title ("" if it has none).

    Headings become `# ...`, list items `- ...` or `1. ...` (indented two spaces a level, for the first 16), table
    rows `a | b | c`, and preformatted text stays as it is. Time and memory are linear in the length of `source`.
    Raises HtmlError for more than 2,000,000 tags, for elements nested more than 2,048 deep, and where libxml2 stops
    before the end, rather than returning half a page.
    """
    if source.count("<") > _MOST_TAGS:
        raise HtmlError(
            f"it has more than {_MOST_TAGS:,} HTML tags: divide it, or save its text as a .txt file"
        )
    # libxml2 forgets what follows an early </html>; without the two closing tags it reads on. Bytes, because
    # it refuses a str that begins with an XML declaration.
    data = _PAGE_END.sub("", source).encode("utf-8", "replace")
    page = _Page()
    # As events: a tree would take forty times the page's size, and the square of an element's attributes in time.
    parser = etree.HTMLParser(target=page, encoding="utf-8", huge_tree=True)
    if data:
        etree.fromstring(data, parser)
    fatal = [entry.message for entry in parser.error_log if entry.level_name == "FATAL"]
    if fatal:
        raise HtmlError(
            f"the HTML parser stops at an error ({fatal[0].strip()}): save its text as a .txt file"
        )
    return "".join(page.pieces), page.title


@dataclass(slots=True)
class _Element:
    """An open element."""

    tag: str
    dropped: bool  # it, or one that it is in
    children: int = 0  # elements in it so far


@dataclass
class _Page:
    """The text so far, and what must come before the next word: line breaks, then markers such as `- `.

    The parser calls start, end, data and close.
    """

    pieces: list[str] = field(default_factory=list)
    title: str = ""
    breaks: int = 0
    markers: list[str] = field(default_factory=list)
    lists: list[int | None] = field(
        default_factory=list
    )  # the open lists: last number given, None if unordered
    row: int = 0  # len(pieces) where the open table row began
    cell: int = -1  # len(pieces) where the open cell began, -1 outside rows
    preformatted: int = 0  # open <pre> elements
    path: list[_Element] = field(default_factory=list)  # from the root to the element that is open
    text: StringIO = field(default_factory=StringIO)  # since the last element began or ended

    def start(self, tag: str, attributes: Mapping[str, str], _namespaces: object = None) -> None:
        self._flush()
        if len(self.path) == _DEEPEST:
            raise HtmlError(
                f"its HTML elements are nested more than {_DEEPEST:,} deep: save its text as a .txt file"
            )
        above = self.path[-1] if self.path else _Element("", False)
        hidden = "hidden" in attributes or attributes.get("aria-hidden") == "true"
        element = _Element(tag, above.dropped or tag in _DROPPED or hidden)
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
                    self.breaks = 0  # the last cell's paragraph ends here, its row does not
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
                self.breaks = min(self.breaks, 1)  # a paragraph that ends inside makes no loose list
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
        if self.markers or self.cell == len(
            self.pieces
        ):  # a paragraph begins on its item's line, or its cell's
            return
        if tag in _BLANK_LINE or (tag in ("ul", "ol") and not self.lists):
            self.breaks = 2
        elif tag in _NEW_LINE or tag in ("ul", "ol"):
            self.breaks = max(self.breaks, 1)

    def _item(self) -> str:
        indent = "  " * min(len(self.lists) - 1, _DEEPEST_INDENT)
        if not self.lists or self.lists[-1] is None:
            return indent + "- "
        self.lists[-1] += 1
        return f"{indent}{self.lists[-1]}. "
