"""Evaluation sets: a corpus, queries, relevance judgements, gold answers and evidence, checked when they are loaded.

Each format is one file here with a function that returns a Dataset, and one file in conf/dataset. A new format builds
its documents, questions and judgements and gives them to rag.evaluate.datasets.assemble.assemble, which checks them.
"""

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property

from rag.evaluate.datasets.questions import Evidence
from rag.runtime.cache.keys import content_key
from rag.runtime.options import Count, Seed, checked
from rag.types import Document


@dataclass(frozen=True)
class Dataset:
    """A checked evaluation set. Every query in `queries` is judged; the others are in `unjudged`."""

    name: str
    corpus: tuple[Document, ...]  # text is "title text", as BEIR embeds it; of a file, its text as loaded
    queries: dict[str, str]  # query id -> text, in file order: those that this split judges
    qrels: dict[str, dict[str, int]]  # query id -> document id -> grade; the same ids as `queries`
    answers: dict[str, tuple[str, ...]]  # query id -> accepted answers; only queries that come with some
    unjudged: dict[str, str]  # query id -> text: left out of the evaluation, no judgement in this split
    unanswerable: frozenset[str]  # of `unjudged`: flagged as having no answer in the corpus
    drop_self_hits: bool  # queries are documents of the corpus themselves: none may find itself
    problems: tuple[str, ...]  # faults that are tolerated, one sentence each
    evidence: dict[str, tuple[Evidence, ...]] = field(
        default_factory=dict
    )  # only queries that come with some
    limit: int | None = None  # of a sample: how many queries were drawn; None for the whole set
    seed: int = 0  # of a sample

    @property
    def unanswerable_queries(self) -> dict[str, str]:
        """Query id -> text of those flagged unanswerable, in file order: a reader should abstain from them."""
        return {query: text for query, text in self.unjudged.items() if query in self.unanswerable}

    def question(self, query: str) -> str:
        """Return the text of a query, judged or not."""
        return self.queries.get(query) or self.unjudged[query]

    @cached_property
    def fingerprint(self) -> str:
        """64 hex digits of all that figures depend on: contents and their order, not the set's name or path."""
        evidence = {q: [(e.document, e.start, e.end) for e in spans] for q, spans in self.evidence.items()}
        corpus = [(document.id, document.text) for document in self.corpus]
        queries, unanswerable = list(self.queries.items()), list(self.unanswerable_queries.items())
        return content_key(
            "dataset", corpus, queries, self.qrels, self.answers, evidence, unanswerable, self.drop_self_hits
        )

    @checked
    def sample(self, limit: Count | None, seed: Seed = 0) -> "Dataset":
        """Return the set with `limit` of its queries, drawn by `seed`, and its whole corpus; itself if it has no more.

        The same ids are drawn whatever their order in the file, and a smaller sample is part of a larger one.
        Of the unanswerable queries the same share is drawn, at least one. Raises UserError for a limit below 1.
        """
        if limit is None or limit >= len(self.queries):
            return self
        share = math.ceil(limit * len(self.unanswerable) / len(self.queries))
        unanswerable = _drawn(self.unanswerable, share, seed)
        drawn = _drawn(self.queries, limit, seed) | unanswerable

        def of_drawn(values: Mapping) -> dict:
            return {query: value for query, value in values.items() if query in drawn}

        return replace(
            self,
            queries=of_drawn(self.queries),
            qrels=of_drawn(self.qrels),
            answers=of_drawn(self.answers),
            unjudged=of_drawn(self.unjudged),
            unanswerable=unanswerable,
            evidence=of_drawn(self.evidence),
            limit=limit,
            seed=seed,
        )


def _drawn(ids: Iterable[str], count: int, seed: int) -> frozenset[str]:
    return frozenset(sorted(ids, key=lambda id: content_key("sample", seed, id))[:count])
