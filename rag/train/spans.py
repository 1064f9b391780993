"""Find spans of texts that can be answers, and the sentences with a blank that ask for them. The rules know English.

Letters: n n-grams of all texts.
"""

import re
from array import array
from collections.abc import Iterable, Iterator, Sequence
from itertools import takewhile

import numpy as np
from jaxtyping import Bool, Int, UInt64

from rag.index.lexical.analyzer import ENGLISH_STOP_WORDS
from rag.ingest.sentences import sentences
from rag.retrieve.transform.parse import normal
from rag.train.n_grams import n_grams

Span = tuple[int, int]  # characters of a text, the end exclusive

BLANK = "____"
MOST_WORDS = 10  # of a recurring span, as in Splinter
_SENTENCE_WORDS = range(6, 61)  # of a sentence that is asked, beside the blank

_MONTH = "(?:January|February|March|April|May|June|July|August|September|October|November|December)"
_UNIT = (
    "%|°C|°F|°|(?:percent|per cent|degrees(?: Celsius| Fahrenheit)?|mm|cm|m/s|km/h|m|km|metres?|meters?|kilometres?"
    "|kilometers?|miles?|feet|ft|knots|mg|g|kg|kilograms?|tonnes?|tons?|t|litres?|liters?|L|ml|seconds?|minutes?|hours?|days?"
    "|weeks?|months?|years?|volts?|V|hPa|watts?|W|kW|kWh|MW|Hz|kHz|MHz|KB|MB|GB|TB|people|euros?|dollars?|pounds?)(?!\\w)"
)
_CAPITALISED = r"[A-ZÀ-ÖØ-Þ][\w’'-]*\w"
_RULES = tuple(  # of matches that overlap the first is taken
    re.compile(rule)
    for rule in (
        r"[“\"«]([^“”\"«»\n]{2,60})[”\"»]",  # a quoted term
        r"`([^`\n]{2,60})`",
        rf"\b((?:\d{{1,2}} )?{_MONTH} (?:\d{{1,2}}, )?\d{{4}}|\d{{1,2}} {_MONTH}|{_MONTH} \d{{1,2}})\b",  # a date
        rf"(?<![\w.,:-])([$€£]?\d+(?:[.,:]\d+)*(?: (?:thousand|million|billion))?(?:[ -]?(?:{_UNIT}))?)"  # a number
        r"(?![\w:-]|[.,]\d)",
        rf"\b({_CAPITALISED}(?: (?:(?:of|the|de|du|la|van|von|der) ){{0,2}}{_CAPITALISED}){{0,5}})",  # a name
    )
)
# The head of a definition: "A loom is a frame that ..."
_DEFINITION = re.compile(
    r"(?:(?:An?|The) )?(\w[\w-]*(?: [\w-]+){0,3}?) (?:is|are|means|refers to|denotes) (?:an?|the) ",
    re.IGNORECASE,
)
_WORD = re.compile(r"\w+(?:[’'.,-]\w+)*")
_STOP_WORDS = frozenset(ENGLISH_STOP_WORDS) | frozenset(
    "i me my we us our you your he him his she her hers its who whom whose which what when where why how all any both "
    "each every some many much more most few several other another same own only also just very so than too can could "
    "may might must shall should would do does did has have had been being were am from about after before over under "
    "between during through because while since until although however here now once again up down out off above below "
    "within one".split()
)


def answer_spans(text: str) -> list[Span]:
    """Return the numbers with units, dates, names, quoted and defined terms in a text, in order, without overlaps."""
    found: list[Span] = []
    for begin, end in sentences(text):
        head = _DEFINITION.match(text, begin, end)
        spans = [match.span(1) for rule in _RULES for match in rule.finditer(text, begin, end)]
        for span in [head.span(1), *spans] if head else spans:
            start, stop = _without_stop_words(text, span)
            # one word that begins a sentence is capitalised anyway
            is_answer = start < stop and (head or start > begin or not text[start:stop].isalpha())
            if is_answer and not any(a < stop and start < b for a, b in found):
                found.append((start, stop))
    return sorted(found)


def _without_stop_words(text: str, span: Span) -> Span:
    """Return the span without stop words at its beginning, such as the article in "The Tern Bank"."""
    start, end = span
    words = list(_WORD.finditer(text, start, end))
    stops = sum(1 for _ in takewhile(lambda word: word[0].lower() in _STOP_WORDS, words))
    if stops == len(words):
        return end, end
    return words[stops].start() if stops else start, end


def recurring_spans(texts: Sequence[str]) -> list[list[Span]]:
    """Return the spans of each text that another text has too: n-grams of up to 10 words, without overlaps.

    An n-gram within a longer one that recurs is left out, as are those that begin or end with a stop word, and single
    words other than names. Source: Ram et al. 2021, arXiv:2101.00438, section 3.1.
    """
    columns = tuple(array("q") for _ in range(6))
    vocabulary: dict[str, int] = {}
    for owner, text in enumerate(texts):
        for begin, end in sentences(text):
            for match in _WORD.finditer(text, begin, end):
                word = vocabulary.setdefault(match[0].casefold(), len(vocabulary))
                is_name = match.start() > begin and match[0][0].isupper()
                for column, value in zip(
                    columns, (word, owner, begin, match.start(), match.end(), is_name), strict=True
                ):
                    column.append(value)
    words, owners, sentence_starts, starts, ends, names = (np.array(column, np.int64) for column in columns)
    is_stop = np.array([word in _STOP_WORDS for word in vocabulary], bool)[words]
    sentence_numbers = np.cumsum(np.diff(sentence_starts, prepend=-1) != 0) + owners
    taken = np.zeros(len(words), bool)
    found: list[list[Span]] = [[] for _ in texts]
    for size in range(MOST_WORDS, 0, -1):
        hashes, first = n_grams(words, sentence_numbers, size)
        last = first + size - 1
        good = _in_several(hashes, owners[first]) & ~is_stop[first] & ~is_stop[last]
        good &= (size > 1) | (names[first] == 1)
        for a, b in zip(first[good].tolist(), last[good].tolist(), strict=True):
            if not taken[a : b + 1].any():
                taken[a : b + 1] = True
                found[owners[a]].append((int(starts[a]), int(ends[b])))
    return [sorted(spans) for spans in found]


def _in_several(hashes: UInt64[np.ndarray, "n"], owners: Int[np.ndarray, "n"]) -> Bool[np.ndarray, "n"]:
    """Return which n-grams are in two texts or more."""
    _, number = np.unique(hashes, return_inverse=True)
    pairs = np.unique(np.stack([number, owners]), axis=1)
    return np.bincount(pairs[0])[number] > 1


def cloze_questions(text: str, spans: Iterable[Span]) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) for each span: its sentence with a blank, where the rest does not have the answer too.

    Left out are headings and other sentences without a full stop, sentences of few or very many words, and answers of
    more than one line.
    """
    whole = sentences(text)
    for start, stop in spans:
        answer = text[start:stop]
        for begin, end in whole:
            if begin <= start and stop <= end and "\n" not in answer and text[end - 1] in ".!?":
                question = " ".join(f"{text[begin:start]}{BLANK}{text[stop:end]}".split()).lstrip("-*•#> ")
                words = len(normal(question).split()) - 1
                if words in _SENTENCE_WORDS and answer.casefold() not in question.casefold():
                    yield question, answer
