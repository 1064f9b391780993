"""Evaluation sets: a corpus, queries, relevance judgements, gold answers and evidence, checked when they are loaded.

    path/corpus.jsonl         {"_id", "title" (optional), "text"}, or path/documents/: a folder of files
    path/queries.jsonl        {"_id", "text"} and optionally "answers", "answerable", "evidence"
    path/qrels/<split>.tsv    query-id, corpus-id, score: integers; 0 or less means judged irrelevant

This is the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663) with these additions: "answers", "answerable"
and "evidence", at top level or under "metadata", and documents that may be plain files. Evidence is a list of
{"document", "quote"}, the quote standing in the loaded text once, or of {"document", "start", "end"}, characters
of the loaded text (which begins with the title where there is one). Other layouts: rag.evaluate.datasets.spans.

What would make a figure wrong is an error that names file, line and id; what is merely worth knowing goes into
`problems`.
"""

import math
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from rag.evaluate.datasets.questions import (
    Evidence,
    Question,
    leave_out,
    named,
)
from rag.runtime.cache_key import content_key
from rag.runtime.options import Count, Seed, checked
from rag.types import Document, UserError


@dataclass(frozen=True)
class Dataset:
    """A checked evaluation set. Every query in `queries` is judged; those that are not stand apart."""

    name: str
    corpus: tuple[Document, ...]  # text is "title text", as BEIR embeds it; of a file, its text as loaded
    queries: dict[str, str]  # query id -> text, in file order: those that this split judges
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade; the same ids as `queries`
    answers: dict[str, tuple[str, ...]]  # query id -> accepted answers; only queries that come with some
    unjudged: dict[str, str]  # query id -> text: left out of the evaluation, no judgement in this split
    unanswerable: frozenset[str]  # of `unjudged`: flagged as having no answer in the corpus
    drop_self_hits: bool  # queries are documents of the corpus themselves: pass it on to metrics.evaluate
    problems: tuple[str, ...]  # what is odd but tolerable, one sentence each
    evidence: dict[str, tuple[Evidence, ...]] = field(
        default_factory=dict
    )  # only queries that come with some
    limit: int | None = None  # of a sample: how many queries were drawn; None for the whole set
    seed: int = 0  # of a sample

    @property
    def unanswerable_queries(self) -> dict[str, str]:
        """Query id -> text of those flagged unanswerable, in file order: what a reader should abstain from."""
        return {query: text for query, text in self.unjudged.items() if query in self.unanswerable}

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits of what figures depend on: contents and their order, not the set's name or place."""
        evidence = {q: [(e.document, e.start, e.end) for e in spans] for q, spans in self.evidence.items()}
        corpus = [(document.id, document.text) for document in self.corpus]
        queries, unanswerable = list(self.queries.items()), list(self.unanswerable_queries.items())
        return content_key(
            "dataset", corpus, queries, self.qrels, self.answers, evidence, unanswerable, self.drop_self_hits
        )

    @checked
    def sample(self, limit: Count | None, seed: Seed = 0) -> "Dataset":
        """The set with `limit` of its queries, drawn by `seed`, and its whole corpus; itself if it has no more.

        The same ids are drawn whatever their order in the file, and a smaller sample is part of a larger one.
        Of the unanswerable queries the same share stays, at least one. UserError for a limit below 1.
        """
        if limit is None:
            return self
        if limit >= len(self.queries):
            return self
        share = math.ceil(limit * len(self.unanswerable) / len(self.queries))
        unanswerable = _drawn(self.unanswerable, share, seed)
        kept = _drawn(self.queries, limit, seed) | unanswerable

        def of_kept(values: Mapping) -> dict:
            return {query: value for query, value in values.items() if query in kept}

        return replace(
            self,
            queries=of_kept(self.queries),
            qrels=of_kept(self.qrels),
            answers=of_kept(self.answers),
            unjudged=of_kept(self.unjudged),
            unanswerable=unanswerable,
            evidence=of_kept(self.evidence),
            limit=limit,
            seed=seed,
        )


def _drawn(ids: Iterable[str], count: int, seed: int) -> frozenset[str]:
    return frozenset(sorted(ids, key=lambda id: content_key("sample", seed, id))[:count])


# --- what all layouts share: records, and the checks that join them


@dataclass(frozen=True, slots=True)
class Judgement:
    """A grade as its file tells it, and where: "line 3"."""

    where: str
    query: str
    document: str
    grade: int


def assemble(
    name: str,
    corpus: Sequence[Document],
    questions: Sequence[Question],
    judgements: Iterable[Judgement],
    source: str,
    corpus_source: str,
    strict: bool,
    problems: Sequence[str],
) -> Dataset:
    """The Dataset of parts whose ids are unique, checked against each other.

    `source` and `corpus_source` say in messages where judgements and documents come from. Raises UserError for
    an empty corpus or query, judgements that contradict each other or the flag, none at all, and, when `strict`,
    for those of unknown ids.
    """
    problems = [*problems, *_corpus_problems(corpus, corpus_source)]
    documents = {document.id: document.text for document in corpus}
    texts = {question.id: question.text for question in questions}
    qrels = _qrels(judgements, source, texts, documents, strict, problems)
    for question in questions:
        if not question.text.strip():
            raise UserError(f'The query "{question.id}" of {name} is empty: write it or remove it.')
        if not question.answerable and question.id in qrels:
            raise UserError(
                f'Query "{question.id}" of {source} is flagged unanswerable but judged: drop one.'
            )
    unjudged_evidence = [
        q.id
        for q in questions
        if q.id in qrels and any(qrels[q.id].get(e.document, 0) < 1 for e in q.evidence)
    ]
    if unjudged_evidence:
        problems.append(f"{source} does not judge the evidence of {named(unjudged_evidence)} relevant.")
    return Dataset(
        name=name,
        corpus=tuple(corpus),
        queries={query: text for query, text in texts.items() if query in qrels},
        qrels={query: qrels[query] for query in texts if query in qrels},
        answers={question.id: question.answers for question in questions if question.answers},
        unjudged={query: text for query, text in texts.items() if query not in qrels},
        unanswerable=frozenset(question.id for question in questions if not question.answerable),
        drop_self_hits=any(q in documents and _same_text(t, documents[q]) for q, t in texts.items()),
        problems=tuple(problems),
        evidence={question.id: question.evidence for question in questions if question.evidence},
    )


def _corpus_problems(corpus: Sequence[Document], source: str) -> Iterator[str]:
    if not corpus:
        raise UserError(f"The corpus {source} is empty: add documents.")
    first: dict[str, str] = {}
    empty = [document.id for document in corpus if not document.text.strip()]
    repeated = [d.id for d in corpus if d.text.strip() and first.setdefault(d.text, d.id) != d.id]
    if empty:
        yield f"{source} has no text for {named(empty)}."
    if repeated:
        yield f"{source} repeats the text of an earlier document in {named(repeated)}."


def _same_text(query: str, document: str) -> bool:
    """A query that was made from a document is its text, with or without the title."""
    words, passage = " ".join(query.lower().split()), " ".join(document.lower().split())
    return bool(words) and passage.endswith(words)


def _qrels(
    judgements: Iterable[Judgement],
    source: str,
    queries: Collection[str],
    documents: Collection[str],
    strict: bool,
    problems: list[str],
) -> dict[str, dict[str, int]]:
    qrels: dict[str, dict[str, int]] = {}
    dangling, repeated = [], []
    for item in judgements:
        if item.query not in queries:
            dangling.append(f'query "{item.query}" ({item.where})')
        elif item.document not in documents:
            dangling.append(f'document "{item.document}" ({item.where})')
        elif (known := qrels.get(item.query, {}).get(item.document)) is None:
            qrels.setdefault(item.query, {})[item.document] = item.grade
        elif known != item.grade:
            raise UserError(
                f'{source}, {item.where} grades "{item.document}" {item.grade} after {known} for the query '
                f'"{item.query}": keep one.'
            )
        else:
            repeated.append(item.where)
    leave_out(dangling, f"{source} judges the unknown", strict, problems)
    if repeated:
        problems.append(f"{source} repeats earlier judgements in {named(repeated)}.")
    if not qrels:
        raise UserError(f"{source} judges no query: add judgements.")
    if hopeless := [query for query, judged in qrels.items() if max(judged.values()) <= 0]:
        problems.append(f"{source} has no relevant document for {named(hopeless)}, which count as 0.")
    return qrels
