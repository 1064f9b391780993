"""Metrics of retrieved chunks that do not depend on the chunker: how much of the evidence they contain.

Evidence is spans of the documents, so rankings of different chunkers are judged by the same standard (Smith and
Troynikov, "Evaluating Chunking Strategies for Retrieval", Chroma technical report, 2024). With r the text of the
retrieved chunks, each counted at its full length however they overlap, and e the text of the evidence:

    recall = |r and e| / |e|      precision = |r and e| / |r|      IoU = |r and e| / (|r| + |e not in r|)

|r and e| counts each position once. The report speaks of tokens, but its code (chunking_evaluation,
base_evaluation.py) counts characters: "CharRecall@5", "CharPrecision@5" and "CharIoU@5" are its figures of the first
five chunks. "Token..." counts tokens of the whole document that touch a span. "...@512t" takes chunks in order until
512 tokens are used, the last one cut: the same budget for every chunker, where five chunks are more text of a larger
one. Repeated text uses the budget again, as it would in a prompt.
"""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np
from jaxtyping import Int

from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.metrics import Metric, find
from rag.evaluate.metrics.overlap import Overlap, Span, Spans, overlap_of
from rag.types import Document, Hit, UserError

DEFAULT_SPAN_MEASURES = ("CharRecall@5", "CharPrecision@5", "CharIoU@5", "TokenRecall@512t", "TokenIoU@512t")

_NAME = re.compile(r"([a-z]+)@([1-9][0-9]*)(t?)", re.IGNORECASE)


class DocumentTokens:
    """The token boundaries of documents; a document is tokenised once, when they are first needed."""

    def __init__(self, documents: Iterable[Document], token_spans: Callable[[str], Int[np.ndarray, "n 2"]]):
        """`token_spans` is the embedder's: it returns start and end of each token of a text, in characters."""
        self._texts = {document.id: document.text for document in documents}
        self._token_spans = token_spans
        self._bounds: dict[str, tuple[list[int], list[int]]] = {}

    def touching(self, document: str, span: Span) -> Span:
        """Return the tokens that touch a span of characters: the first one's index and the last one's plus 1."""
        starts, ends = self._of(document)
        first = bisect_right(ends, span[0])
        return first, max(first, bisect_left(starts, span[1]))

    def cut(self, document: str, span: Span, budget: int) -> Span:
        """Return the longest first part of a span of characters that at most `budget` tokens touch."""
        first, last = self.touching(document, span)
        if last - first <= budget:
            return span
        return span[0], max(span[0], self._of(document)[0][first + budget])

    def _of(self, document: str) -> tuple[list[int], list[int]]:
        if document not in self._bounds:
            spans = np.asarray(self._token_spans(self._texts[document]), np.int64).reshape(-1, 2)
            # Bisection needs sorted lists, and a few tokenizers give an empty token a span further back.
            starts, ends = np.maximum.accumulate(spans).T if len(spans) else spans.T
            self._bounds[document] = starts.tolist(), ends.tolist()
        return self._bounds[document]


class _SpanMeasure(NamedTuple):
    """A metric with what its name says after the @."""

    metric: Metric
    cutoff: int
    cutoff_is_tokens: bool

    @property
    def counts_tokens(self) -> bool:
        return self.metric.name.startswith("Token")


def is_span_measure(name: str) -> bool:
    """Return whether `name` is a metric of evidence with a cut-off, such as TokenRecall@512t."""
    return _parsed(name) is not None


def _parsed(name: str) -> _SpanMeasure | None:
    match = _NAME.fullmatch(name)
    metric = match and find(match[1], "evidence")
    return _SpanMeasure(metric, int(match[2]), bool(match[3])) if match and metric else None


def span_measures(
    hits: Sequence[Hit],
    evidence: Sequence[Evidence],
    tokens: DocumentTokens,
    measures: Sequence[str] = DEFAULT_SPAN_MEASURES,
) -> dict[str, float]:
    """Compute the metrics of one query from its ranking and its evidence, in time linear in the sorted spans.

    Args:
        hits: Best first, deep enough for every cut-off: what is not among them counts as not found.
        evidence: The query's spans, at least one.
        tokens: The token boundaries of the documents.
        measures: Names such as CharRecall@5 or TokenIoU@512t.

    Returns:
        Name, as given -> value from 0 to 1; all 0 where nothing is retrieved.

    Raises:
        UserError: for an unknown name.
        ValueError: without evidence.
    """
    if not evidence:
        raise ValueError("measures over evidence are not defined for a query without any")
    ranked = [(hit.chunk.document_id, (hit.chunk.start, hit.chunk.end)) for hit in hits]
    relevant = _by_document((item.document, (item.start, item.end)) for item in evidence)
    overlaps: dict[tuple[bool, int, bool], Overlap] = {}
    values: dict[str, float] = {}
    for name in measures:
        asked = _parsed(name)
        if asked is None:
            examples = ", ".join(DEFAULT_SPAN_MEASURES)
            raise UserError(f'There is no measure "{name}": choose from such as {examples}.')
        key = asked.counts_tokens, asked.cutoff, asked.cutoff_is_tokens
        if key not in overlaps:
            cut = asked.cutoff
            retrieved = _by_document(_within(ranked, cut, tokens) if asked.cutoff_is_tokens else ranked[:cut])
            overlaps[key] = (
                overlap_of(_in_tokens(retrieved, tokens), _in_tokens(relevant, tokens))
                if asked.counts_tokens
                else overlap_of(retrieved, relevant)
            )
        values[name] = asked.metric.function(overlaps[key])
    return values


def _within(
    ranked: Sequence[tuple[str, Span]], budget: int, tokens: DocumentTokens
) -> list[tuple[str, Span]]:
    """Return the first of the ranked spans, as many as fit in a budget of tokens, the last one cut."""
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
