"""How much two sets of text spans share, and the metrics of that."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

Span = tuple[int, int]  # start, end exclusive: of characters, or of a document's tokens
Spans = Mapping[str, Sequence[Span]]  # document id -> spans


@dataclass(frozen=True, slots=True)
class Overlap:
    """Lengths in one unit (characters or tokens): of retrieved text, of evidence, and of evidence retrieved."""

    retrieved: int
    relevant: int
    both: int


def recall(overlap: Overlap) -> float:
    """Return the share of the evidence that was retrieved."""
    return _ratio(overlap.both, overlap.relevant)


def precision(overlap: Overlap) -> float:
    """Return the share of the retrieved text that is evidence."""
    return _ratio(overlap.both, overlap.retrieved)


def iou(overlap: Overlap) -> float:
    """Return intersection over union, where retrieved text counts at its full length."""
    return _ratio(overlap.both, overlap.retrieved + overlap.relevant - overlap.both)


def overlap_of(retrieved: Spans, relevant: Spans) -> Overlap:
    """Return the lengths of both and of what they share.

    Where spans overlap, each retrieved one counts in full; relevant text and shared text count once.
    """
    evidence = {document: _union(spans) for document, spans in relevant.items()}
    both = sum(_shared(_union(retrieved.get(document, ())), spans) for document, spans in evidence.items())
    return Overlap(
        retrieved=sum(_length(spans) for spans in retrieved.values()),
        relevant=sum(_length(spans) for spans in evidence.values()),
        both=both,
    )


def _union(spans: Iterable[Span]) -> list[Span]:
    """Return the same text as sorted spans that neither overlap nor touch."""
    union: list[Span] = []
    for start, end in sorted(spans):
        if union and start <= union[-1][1]:
            union[-1] = union[-1][0], max(union[-1][1], end)
        else:
            union.append((start, end))
    return union


def _shared(left: Sequence[Span], right: Sequence[Span]) -> int:
    """Return the length that lies in both; each is sorted and without overlaps, so one sweep is enough."""
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
