"""Find where sentences end, by rules: no model, linear time, most languages.

A full stop ends a sentence unless it belongs to an abbreviation, an initial, a number or a list marker, or
the next word begins in lower case. East Asian full stops need no space after them. Headings, list items, table rows
and paragraphs end where their lines end; any other line break is only a wrapped line.
Source: Grefenstette and Tapanainen, "What is a word, what is a sentence?", 1994.
"""

import re
from itertools import pairwise

# A full stop after these never ends a sentence.
_ABBREVIATIONS = frozenset(
    "mr mrs ms dr prof st rev hon gen col sgt capt lt cmdr gov sen rep messrs mme mlle vs cf e.g i.e viz ca "
    "approx incl resp bzw z.b d.h ggf".split()
)
# A full stop after these does not end a sentence before a number: "No. 5", "Fig. 2", "et al. (2019)", "Jan. 3".
_BEFORE_NUMBER = frozenset(
    "no nos nr fig figs eq eqs sec secs ch chap vol vols p pp art tab ref refs al jan feb mar apr jun jul "
    "aug sep sept oct nov dec".split()
)
# A full stop after these ends a sentence only before a word that often begins one. Initials (J.) and acronyms (U.S.)
# are treated the same.
_AMBIGUOUS = frozenset("inc ltd co corp jr sr dept univ bros est".split())
_STARTERS = frozenset(
    "a an the this that these those it its he his she her they their we our you i in on at by for from to as "
    "if when while after before since because although however but and so then there here what who how "
    "why".split()
)
_INITIALS = re.compile(r"(?:\w\.)*\w")
_LIST_NUMBER = re.compile(r"\s*\d{1,3}")
_WORD = re.compile(r"[\s\"'“‘«(\[{¿¡*_]*(\w+)")  # after quotes, brackets and emphasis marks

# The look-behind makes the regex try a run of stops only once, from the first; the possessive `*+` makes it linear.
_STOP = re.compile(
    r"(?<![.!?…؟۔।॥።։])[.!?…؟۔।॥።։]++(?:[\"'”’»)\]}]|\[\d{1,4}\])*+(?=\s)"
    r"|[。！？｡]++[」』）”’》\"')]*+"
)
_STRUCTURE = r"#{1,6}\s|[-*+•‣◦]\s|\d{1,3}[.)]\s|>|\||```|~~~|={3,}|-{3,}|[^\n]* \| "
_LINE_ENDS = re.compile(
    rf"\n(?=[^\S\n]*+(?:\n|{_STRUCTURE}))"  # before a blank line, a list item, a heading, a table row ...
    r"|^[^\S\n]*+(?:#{1,6}\s|={3,}+|-{3,}+|```|~~~|\|)[^\n]*+\n",  # after a heading, a rule, a fence
    re.MULTILINE,
)


def sentences(text: str) -> list[tuple[int, int]]:
    """Return the character spans of the sentences of `text`, in order, without the white space around them.

    Spans don't overlap, none is empty, and together they hold every character that is not white space.
    """
    cuts = {match.end() for match in _LINE_ENDS.finditer(text)}
    cuts.update(match.end() for match in _STOP.finditer(text) if _ends_sentence(text, match))
    spans = (trimmed(text, start, end) for start, end in pairwise(sorted(cuts | {0, len(text)})))
    return [(start, end) for start, end in spans if start < end]


def trimmed(text: str, start: int, end: int) -> tuple[int, int]:
    """Return the span without the white space at its ends; for white space alone, an empty span."""
    piece = text[start:end]
    return end - len(piece.lstrip()), start + len(piece.rstrip())


def _ends_sentence(text: str, stop: re.Match) -> bool:
    """Return whether a full stop ends its sentence, judged by the words before and after it."""
    if stop[0][0] in "。！？｡":
        return True
    following = _WORD.match(text, stop.end(), stop.end() + 60)
    next_word = following[1] if following else ""
    if next_word[:1].islower():
        return False
    if not stop[0].startswith(".") or stop[0].startswith(".."):
        return True
    before = text[max(0, stop.start() - 40) : stop.start()]
    word = (
        before.split()[-1].lstrip("([{\"'“‘«").lower() if before.strip() and not before[-1].isspace() else ""
    )
    if word in _ABBREVIATIONS:
        return False
    if word in _BEFORE_NUMBER and next_word[:1].isdigit():
        return False
    if word in _AMBIGUOUS or (_INITIALS.fullmatch(word) and not word.isdigit()):
        return next_word.lower() in _STARTERS
    return not _LIST_NUMBER.fullmatch(before.rpartition("\n")[2])
