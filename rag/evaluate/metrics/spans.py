"""Relevance that does not depend on the chunker: how much of the evidence's text a ranking of chunks brings.

Evidence is spans of the documents, so rankings of different chunkers are judged by the same standard (Smith and
Troynikov, "Evaluating Chunking Strategies for Retrieval", Chroma technical report, 2024). With r the text of the
retrieved chunks, each counted at its full length however they overlap, and e the text of the evidence:

    recall = |r and e| / |e|      precision = |r and e| / |r|      IoU = |r and e| / (|r| + |e not in r|)

|r and e| counts each place once. The report speaks of tokens, but its code (chunking_evaluation, base_evaluation.py)
counts characters: "CharRecall@5", "CharPrecision@5" and "CharIoU@5" are its figures of the first five chunks.
"Token..." counts tokens of the whole document that touch a span. "...@512t" takes chunks in order until 512 tokens
are used, the last one cut: the same budget for every chunker, where five chunks are more text of a larger one.
Repeated text uses the budget again, as it would in a prompt.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Int

from rag.evaluate.datasets.questions import Evidence
from rag.types import Document, Hit, UserError

DEFAULT_SPAN_MEASURES = ("CharRecall@5", "CharPrecision@5", "CharIoU@5", "TokenRecall@512t", "TokenIoU@512t")

_NAME = re.compile(r"(Char|Token)(Recall|Precision|IoU)@([1-9][0-9]*)(t?)", re.IGNORECASE)

Span = tuple[int, int]  # start, end exclusive: of characters, or of a document's tokens
Spans = Mapping[str, Sequence[Span]]  # document id -> spans


class DocumentTokens:
    """The tokens of the documents, by the embedder's tokenizer; each is tokenised once, when first asked about."""

    def __init__(self, documents: Iterable[Document], token_spans: Callable[[str], Int[np.ndarray, "n 2"]]):
        self._texts = {document.id: document.text for document in documents}
        self._token_spans = token_spans
        self._bounds: dict[str, tuple[list[int], list[int]]] = {}

    def touching(self, document: str, span: Span) -> Span:
        """The numbers, from the first to past the last, of the tokens that touch a span of characters."""
        starts, ends = self._of(document)
        first = bisect_right(ends, span[0])
        return first, max(first, bisect_left(starts, span[1]))

    def cut(self, document: str, span: Span, budget: int) -> Span:
        """The longest beginning of a span of characters that at most `budget` tokens touch."""
        first, last = self.touching(document, span)
        return (
            span if last - first <= budget else (span[0], max(span[0], self._of(document)[0][first + budget]))
        )

    def _of(self, document: str) -> tuple[list[int], list[int]]:
        if document not in self._bounds:
            spans = np.asarray(self._token_spans(self._texts[document]), np.int64).reshape(-1, 2)
            # Bisection needs sorted lists, and a few tokenizers give an empty token a span further back.
            starts, ends = np.maximum.accumulate(spans).T if len(spans) else spans.T
            self._bounds[document] = starts.tolist(), ends.tolist()
        return self._bounds[document]


@dataclass(frozen=True, slots=True)
class Overlap:
    """Lengths, in one unit: of what was retrieved, of the evidence, and of the evidence that was retrieved."""

    retrieved: int
    relevant: int
    both: int

    def value(self, measure: str) -> float:
        match measure.lower():
            case "recall":
                return _ratio(self.both, self.relevant)
            case "precision":
                return _ratio(self.both, self.retrieved)
            case "iou":
                return _ratio(self.both, self.retrieved + self.relevant - self.both)
        raise ValueError(f"no measure of an overlap is called {measure!r}")


def is_span_measure(name: str) -> bool:
    """Whether `name` is one of this file's, such as TokenRecall@512t."""
    return _NAME.fullmatch(name) is not None


def span_measures(
    hits: Sequence[Hit],
    evidence: Sequence[Evidence],
    tokens: DocumentTokens,
    measures: Sequence[str] = DEFAULT_SPAN_MEASURES,
) -> dict[str, float]:
    """Measure -> value from 0 to 1, under the names given, of one query's ranking and its evidence.

    `hits` best first, deep enough for every cut-off and budget: what is not there is not found. Where nothing is
    retrieved all are 0. Time is linear in the spans, but for sorting them. Raises UserError for an unknown
    measure, ValueError without evidence.
    """
    if not evidence:
        raise ValueError("measures over evidence are not defined for a query without any")
    ranked = [(hit.chunk.document_id, (hit.chunk.start, hit.chunk.end)) for hit in hits]
    relevant = _by_document((item.document, (item.start, item.end)) for item in evidence)
    overlaps: dict[tuple[str, str, str], Overlap] = {}
    values = {}
    for name in measures:
        unit, measure, depth, budget = _parsed(name)
        key = unit, depth, budget
        if key not in overlaps:
            taken = _within(ranked, int(depth), tokens) if budget else ranked[: int(depth)]
            retrieved = _by_document(taken)
            overlaps[key] = (
                overlap(retrieved, relevant)
                if unit == "char"
                else overlap(_in_tokens(retrieved, tokens), _in_tokens(relevant, tokens))
            )
        values[name] = overlaps[key].value(measure)
    return values


def overlap(retrieved: Spans, relevant: Spans) -> Overlap:
    """How much of each there is and how much they share. Spans that overlap: retrieved ones count in full each,
    relevant ones, and what is shared, once."""
    evidence = {document: _union(spans) for document, spans in relevant.items()}
    both = sum(_shared(_union(retrieved.get(document, ())), spans) for document, spans in evidence.items())
    return Overlap(
        retrieved=sum(_length(spans) for spans in retrieved.values()),
        relevant=sum(_length(spans) for spans in evidence.values()),
        both=both,
    )


def precision_omega(chunks: Spans, evidence: Sequence[Evidence]) -> float:
    """The chunker's own precision, in characters: over exactly the chunks that hold evidence, as if all were found.

    `chunks` are all of the corpus, in reading order (starts and ends increase). As in the report's code a chunk
    that merely touches the evidence is one of them, and overlapping chunks count once.
    """
    relevant = _by_document((item.document, (item.start, item.end)) for item in evidence)
    both = everything = 0
    for document, spans in relevant.items():
        spans, own = _union(spans), chunks.get(document, ())
        held: list[Span] = []
        for start, end in spans:
            first = bisect_left(own, start, key=lambda chunk: chunk[1])
            held += own[first : bisect_right(own, end, key=lambda chunk: chunk[0])]
        both += _shared(_union(held), spans)
        everything += _length(_union([*held, *spans]))
    return _ratio(both, everything)


def _parsed(name: str) -> tuple[str, str, str, str]:
    match = _NAME.fullmatch(name)
    if not match:
        raise UserError(
            f'There is no measure "{name}": choose from such as {", ".join(DEFAULT_SPAN_MEASURES)}.'
        )
    return match[1].lower(), match[2], match[3], match[4]


def _within(
    ranked: Sequence[tuple[str, Span]], budget: int, tokens: DocumentTokens
) -> list[tuple[str, Span]]:
    """The first of the ranked spans, as many as the budget of tokens holds, the last one cut."""
    taken: list[tuple[str, Span]] = []
    for document, span in ranked:
        if budget <= 0:
            break
        taken.append((document, tokens.cut(document, span, budget)))
        first, last = tokens.touching(document, span)
        budget -= last - first
    return taken


def _by_document(items: Iterable[tuple[str, Span]]) -> dict[str, list[Span]]:
    spans: dict[str, list[Span]] = {}
    for document, span in items:
        spans.setdefault(document, []).append(span)
    return spans


def _in_tokens(spans: Spans, tokens: DocumentTokens) -> dict[str, list[Span]]:
    return {document: [tokens.touching(document, span) for span in of] for document, of in spans.items()}


def _union(spans: Iterable[Span]) -> list[Span]:
    """The same places as sorted spans that neither overlap nor touch."""
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _shared(left: Sequence[Span], right: Sequence[Span]) -> int:
    """The length of what lies in both, each sorted and without overlaps: one sweep over the two."""
    i = j = shared = 0
    while i < len(left) and j < len(right):
        shared += max(0, min(left[i][1], right[j][1]) - max(left[i][0], right[j][0]))
        if left[i][1] < right[j][1]:
            i += 1
        else:
            j += 1
    return shared


def _length(spans: Iterable[Span]) -> int:
    return sum(end - start for start, end in spans)


def _ratio(part: int, whole: int) -> float:
    return part / whole if whole else 0.0
