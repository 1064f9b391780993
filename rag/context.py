"""Build the context of a prompt: the passages of the hits, within a token budget, numbered for citation."""

import re
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from rag.ingest.chunk.markdown import sections
from rag.ingest.chunk.tokens import Span
from rag.ingest.sentences import sentences
from rag.runtime.options import Count, check_fields
from rag.types import Chunk, Context, Hit, Source

Order = Literal["score", "reverse", "document", "sides"]
Expand = Literal["none", "neighbours", "section", "parent"]
CountTokens = Callable[[str], int]
Render = Callable[
    [Source], str
]  # a passage as it is in the prompt, so that numbers and paths are counted too
DocumentText = Callable[[str], str]  # the text of a document, by its id

_CHARS_PER_TOKEN = (
    16  # more than texts have: text farther away than this times the tokens allowed is not looked at
)


@dataclass(frozen=True)
class ContextOptions:
    """How passages are chosen and ordered.

    `order`: "score" is best first; "reverse" best last, beside the question; "document" as in their documents, the
    document with the best passage first; "sides" the best at both ends and the weakest in the middle, which models use
    least in a long context (Liu et al., "Lost in the Middle", 2023).

    `expand`, to search in small chunks and to show larger passages: "neighbours" widens each hit by `expand_by`
    sentences on both sides, "section" to its section (from heading to heading), "parent" to its whole document; but
    never beyond `expand_tokens`, taken evenly from both sides of the hit.
    """

    max_tokens: Count = 1024  # of the rendered passages, by the generator's tokenizer
    order: Order = "score"
    # Hits below it are not relevant. Its scale is the retriever's; the pipeline replaces "auto" by the embedder's.
    min_score: float | Literal["auto"] | None = None
    merge: bool = True  # overlapping or adjoining chunks of a document become one passage
    expand: Expand = "none"
    # sentences on each side, for "neighbours"; where a chunk cuts a sentence, its rest is the first
    expand_by: Count = 2
    expand_tokens: Count = 256  # of a widened passage as rendered, by the generator's tokenizer

    def __post_init__(self) -> None:
        check_fields(self)


def text_of(source: Source) -> str:
    """Return the passage alone: the default where there is no prompt template."""
    return source.text


def build_context(
    hits: Sequence[Hit],
    documents_text: DocumentText | None,
    options: ContextOptions,
    count_tokens: CountTokens,
    render: Render = text_of,
) -> Context:
    """Return the passages to show for `hits`; an empty context means that nothing relevant was found.

    Hits below `min_score` (and NaN) and repeated texts are left out. Then, best first, each hit is taken if the
    passages still fit `max_tokens` with it, merged with its neighbours. A hit that does not fit is left out and counted
    in `Context.dropped`; only the best hit is truncated instead, at the end of a sentence or word. Ties keep the order
    of `hits`. With `options.expand` a hit is widened first, and where the wide passage does not fit beside the better
    ones, the hit itself is tried.

    Args:
        hits: in any order.
        documents_text: with it, chunks are also merged across the white space between them; without it only where they
            overlap or touch. `options.expand` needs it.
        options: how passages are chosen and ordered.
        count_tokens: of the generator's tokenizer.
        render: a passage as it is in the prompt.
    """
    count_tokens, documents_text = cache(count_tokens), documents_text and cache(documents_text)
    ranked = sorted(hits, key=lambda hit: -hit.score)
    if options.min_score == "auto":
        raise ValueError("min_score is still 'auto': only the retriever knows its scores' scale")
    if options.min_score is not None:
        ranked = [hit for hit in ranked if hit.score >= options.min_score]
    join = _merged if options.merge else _unmerged
    chosen: list[Hit] = []
    dropped = 0
    for hit, wide in _widened(_distinct(ranked), documents_text, options, count_tokens, render):
        for taken in dict.fromkeys((wide, hit)):
            together = _numbered(join([*chosen, taken], documents_text), "score")
            if _total(together, count_tokens, render) <= options.max_tokens:
                chosen.append(taken)
                break
        else:
            dropped += 1
            if not chosen and (cut := _cut(together[0], options.max_tokens, count_tokens, render)):
                chosen.append(replace(hit, chunk=replace(hit.chunk, end=cut.end, text=cut.text)))
    sources = _numbered(join(chosen, documents_text), options.order)
    context = Context(sources, _total(sources, count_tokens, render), dropped)
    return trim(context, options.max_tokens, count_tokens, render)  # a new number may be a token longer


def trim(context: Context, max_tokens: int, count_tokens: CountTokens, render: Render = text_of) -> Context:
    """Return `context` within `max_tokens`: without its least relevant passages, the last one left truncated.

    The passages that are left keep their order and are numbered again from 1; `dropped` grows by those that were left
    out or truncated. With `max_tokens` below one word the result is empty. A context that fits is returned unchanged.

    Args:
        context: the passages.
        max_tokens: of the rendered passages.
        count_tokens: of the generator's tokenizer.
        render: a passage as it is in the prompt.
    """
    sources, dropped, tokens = context.sources, context.dropped, _total(context.sources, count_tokens, render)
    while sources and tokens > max_tokens:
        dropped += 1
        if len(sources) == 1:
            cut = _cut(sources[0], max_tokens, count_tokens, render)
            sources = (cut,) if cut else ()
        else:
            weakest = min(reversed(sources), key=lambda source: source.score)
            sources = _renumbered(source for source in sources if source is not weakest)
        tokens = _total(sources, count_tokens, render)
    return Context(sources, tokens, dropped)


def _distinct(hits: Iterable[Hit]) -> list[Hit]:
    """Return the hits without those whose text was there before."""
    first: dict[str, Hit] = {}
    for hit in hits:
        first.setdefault(hit.chunk.text, hit)
    return list(first.values())


def _widened(
    hits: Sequence[Hit],
    documents_text: DocumentText | None,
    options: ContextOptions,
    count_tokens: CountTokens,
    render: Render,
) -> Iterable[tuple[Hit, Hit]]:
    """Return each hit and the widened hit, without those that become the same text as a better one."""
    if options.expand == "none":
        return [(hit, hit) for hit in hits]
    if documents_text is None:
        raise ValueError(f"expand={options.expand!r} needs the documents' text")
    limit, sections_of = min(options.expand_tokens, options.max_tokens), cache(sections)

    def fits(hit: Hit) -> bool:
        return _total(_numbered([hit], "score"), count_tokens, render) <= limit

    found: dict[str, tuple[Hit, Hit]] = {}
    for hit in hits:
        text = documents_text(hit.chunk.document_id)
        bounds = _around(hit.chunk, sections_of(text)) if options.expand == "section" else (0, len(text))
        sides = _sides(hit.chunk, text, bounds, limit * _CHARS_PER_TOKEN)
        most = options.expand_by if options.expand == "neighbours" else max(map(len, sides))
        wide = _widest(hit, text, sides, most, fits)
        found.setdefault(wide.chunk.text, (hit, wide))
    return found.values()


def _around(chunk: Chunk, spans: Sequence[Span]) -> Span:
    """Return the start of the span that a chunk begins in, and the end of the one that it ends in."""
    first = max(0, bisect_right(spans, chunk.start, key=lambda span: span[0]) - 1)
    last = min(len(spans) - 1, bisect_left(spans, chunk.end, key=lambda span: span[1]))
    return spans[first][0], spans[last][1]


def _sides(chunk: Chunk, text: str, bounds: Span, reach: int) -> tuple[list[int], list[int]]:
    """Return where the sentences before a chunk begin and those after it end, the nearest first, within `bounds`.

    Text more than `reach` characters away is not looked at, nor the sentence that is cut there.
    """
    low, high = max(bounds[0], chunk.start - reach), min(bounds[1], chunk.end + reach)
    spans = [(low + start, low + end) for start, end in sentences(text[low:high])]
    before = [start for start, _ in spans[low > bounds[0] :] if start < chunk.start]
    after = [end for _, end in spans[: len(spans) - (high < bounds[1])] if end > chunk.end]
    return before[::-1], after


def _widest(
    hit: Hit, text: str, sides: tuple[list[int], list[int]], most: int, fits: Callable[[Hit], bool]
) -> Hit:
    """Return the hit with as many sentences on each side, `most` or fewer, as fit."""
    starts, ends = [hit.chunk.start, *sides[0]], [hit.chunk.end, *sides[1]]

    def widened(count: int) -> Hit:
        start, end = starts[: count + 1][-1], ends[: count + 1][-1]
        name = f"{hit.chunk.document_id}:{start}-{end}"
        return replace(hit, chunk=replace(hit.chunk, id=name, start=start, end=end, text=text[start:end]))

    count = bisect_left(range(1, most + 1), True, key=lambda count: not fits(widened(count)))
    return widened(count) if count else hit


def _unmerged(hits: Sequence[Hit], _: DocumentText | None) -> list[Hit]:
    return list(hits)


def _merged(ranked: Sequence[Hit], documents_text: DocumentText | None) -> list[Hit]:
    """Merge overlapping and adjoining hits of a document into one, with the score and rank of the best."""
    rank = {id(hit): position for position, hit in enumerate(ranked)}
    merged: list[tuple[int, Hit]] = []
    for hit in sorted(ranked, key=lambda hit: (hit.chunk.document_id, hit.chunk.start, hit.chunk.end)):
        position = rank[id(hit)]
        union = _union(merged[-1][1].chunk, hit.chunk, documents_text) if merged else None
        if union is None:
            merged.append((position, hit))
        else:
            best = min(position, merged[-1][0])
            merged[-1] = best, replace(ranked[best], chunk=union)
    return [hit for _, hit in sorted(merged, key=lambda pair: pair[0])]


def _union(left: Chunk, right: Chunk, documents_text: DocumentText | None) -> Chunk | None:
    """Return the two chunks, of which `left` begins first, as one; None if other text is between them."""
    if left.document_id != right.document_id:
        return None
    if right.end <= left.end:
        return left
    between = ""
    if right.start > left.end:
        if documents_text is None:
            return None
        between = documents_text(left.document_id)[left.end : right.start]
        if between.strip():
            return None
    text = left.text + between + right.text[max(0, left.end - right.start) :]
    return replace(left, id=f"{left.document_id}:{left.start}-{right.end}", end=right.end, text=text)


def _numbered(hits: Sequence[Hit], order: Order) -> tuple[Source, ...]:
    """Return ranked hits as sources in prompt order."""
    return _renumbered(
        Source(0, chunk.path, chunk.start, chunk.end, hit.score, chunk.text, chunk.document_id)
        for hit in _ordered(hits, order)
        for chunk in [hit.chunk]
    )


def _ordered(ranked: Sequence[Hit], order: Order) -> list[Hit]:
    match order:
        case "reverse":
            return list(ranked[::-1])
        case "document":
            first: dict[str, int] = {}
            for position, hit in enumerate(ranked):
                first.setdefault(hit.chunk.document_id, position)
            return sorted(ranked, key=lambda hit: (first[hit.chunk.document_id], hit.chunk.start))
        case "sides":
            return [*ranked[::2], *ranked[1::2][::-1]]
        case _:
            return list(ranked)


def _renumbered(sources: Iterable[Source]) -> tuple[Source, ...]:
    return tuple(replace(source, n=n) for n, source in enumerate(sources, 1))


def _total(sources: Iterable[Source], count_tokens: CountTokens, render: Render) -> int:
    return sum(count_tokens(render(source)) for source in sources)


def _cut(source: Source, max_tokens: int, count_tokens: CountTokens, render: Render) -> Source | None:
    """Return the longest first part of a passage that fits: whole sentences, else words, else characters."""

    def truncated(end: int) -> Source:
        return replace(source, end=source.start + end, text=source.text[:end])

    def tokens(end: int) -> int:
        return count_tokens(render(truncated(end)))

    def fitting(ends: Sequence[int]) -> int:
        fit = bisect_right(ends, max_tokens, key=tokens)
        return ends[fit - 1] if fit else 0

    words = [match.end() for match in re.finditer(r"\S+", source.text)]
    longest = fitting(words) or fitting(range(1, len(source.text) + 1))
    sentence = max((end for _, end in sentences(source.text) if end <= longest), default=0)
    if 2 * sentence >= longest and tokens(sentence) <= max_tokens:  # not where it would lose more than half
        longest = sentence
    return truncated(longest) if longest else None
