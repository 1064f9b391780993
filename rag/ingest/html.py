"""HTML to readable plain text: headings, lists and tables keep their shape, navigation and scripts go."""

import re
from dataclasses import dataclass, field

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


class HtmlError(ValueError):
    """The parser gave the page up; the message says why."""


def html_text(source: str) -> tuple[str, str]:
    """Return the readable text of a page and its title ("" if it has none).

    Headings become `# ...`, list items `- ...` or `1. ...` (indented two spaces a level), table rows
    `a | b | c`, and preformatted text stays as it is. Raises HtmlError where libxml2 stops before the end
    (elements nested 2,048 deep), rather than returning half a page.
    """
    # libxml2 forgets what follows an early </html>; without the two closing tags it reads on. Bytes, because
    # it refuses a str that begins with an XML declaration.
    data = _PAGE_END.sub("", source).encode("utf-8", "replace")
    parser = etree.HTMLParser(encoding="utf-8", huge_tree=True, remove_comments=True, remove_pis=True)
    root = etree.fromstring(data, parser)
    fatal = [entry.message for entry in parser.error_log if entry.level_name == "FATAL"]
    if fatal:
        raise HtmlError(fatal[0].strip())
    if root is None:
        return "", ""
    page = _Page()
    walk = etree.iterwalk(root, events=("start", "end"))
    for event, element in walk:
        dropped = (
            element.tag in _DROPPED or "hidden" in element.attrib or element.get("aria-hidden") == "true"
        )
        if event == "start":
            if dropped:
                walk.skip_subtree()
            else:
                page.open(element)
                page.write(element.text)
        else:
            if not dropped:
                page.close(element)
            page.write(element.tail)
    return "".join(page.pieces), root.findtext("head/title") or ""


@dataclass
class _Page:
    """The text so far, and what must come before the next word: line breaks, then a marker such as `- `."""

    pieces: list[str] = field(default_factory=list)
    breaks: int = 0
    marker: str = ""
    lists: list[int | None] = field(
        default_factory=list
    )  # the open lists: last number given, None if unordered
    row: int = 0  # len(pieces) where the open table row began
    cell: int = -1  # len(pieces) where the open cell began, -1 outside rows
    preformatted: int = 0  # open <pre> elements

    def open(self, element: etree._Element) -> None:
        self._break(element.tag)
        match element.tag:
            case "ul" | "ol":
                self.lists.append(0 if element.tag == "ol" else None)
            case "li":
                self.marker += self._item()
            case "tr":
                self.row = len(self.pieces)
            case "td" | "th":
                self.cell = len(self.pieces)
                if self.cell > self.row:
                    self.breaks = 0  # the last cell's paragraph ends here, its row does not
                if element.getprevious() is not None:
                    self.marker += " | "
            case "pre":
                self.preformatted += 1
            case "br" if not self.marker:
                self.breaks = min(2, self.breaks + 1)
            case heading if heading in _HEADINGS:
                self.marker += _HEADINGS[heading]

    def close(self, element: etree._Element) -> None:
        match element.tag:
            case "ul" | "ol":
                self.lists.pop()
            case "li" | "tr":
                self.cell = -1
                self.marker = ""  # an empty item, or the empty cells that end a row
                self.breaks = min(self.breaks, 1)  # a paragraph that ends inside makes no loose list
            case "pre":
                self.preformatted -= 1
            case heading if heading in _HEADINGS:
                self.marker = self.marker.removesuffix(_HEADINGS[heading])
        self._break(element.tag)

    def write(self, text: str | None) -> None:
        if not text:
            return
        at_start = bool(self.breaks or self.marker or not self.pieces)
        if self.preformatted:
            text = text.lstrip("\r\n") if at_start else text
        else:
            text = _WHITE.sub(" ", text)
            if at_start or self.pieces[-1][-1] in " \n":
                text = text.lstrip(" ")
        if text:
            lead = "\n" * self.breaks if self.pieces else ""
            self.pieces.append(lead + self.marker + text)
            self.breaks, self.marker = 0, ""

    def _break(self, tag: str) -> None:
        if self.marker or self.cell == len(
            self.pieces
        ):  # a paragraph begins on its item's line, or its cell's
            return
        if tag in _BLANK_LINE or (tag in ("ul", "ol") and not self.lists):
            self.breaks = 2
        elif tag in _NEW_LINE or tag in ("ul", "ol"):
            self.breaks = max(self.breaks, 1)

    def _item(self) -> str:
        indent = "  " * (len(self.lists) - 1)
        if not self.lists or self.lists[-1] is None:
            return indent + "- "
        self.lists[-1] += 1
        return f"{indent}{self.lists[-1]}. "
