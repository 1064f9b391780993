"""Join the documents, questions and judgements of a dataset, and check them against each other."""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.files import check_ids, leave_out, named
from rag.evaluate.datasets.questions import Question
from rag.types import Document, UserError

_MAX_GRADE = 10_000  # trec_eval counts in C integers, and keeps a counter for every grade up to the highest


@dataclass(frozen=True, slots=True)
class Judgement:
    """A grade as it is in a file; `where` says at which position, such as "line 3"."""

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
    corpus_source: str | None = None,
    strict: bool = True,
    problems: Sequence[str] = (),
) -> Dataset:
    """Check the parts of a dataset against each other and return it.

    What would make a figure wrong is an error that names file, line and id; what is only worth knowing goes into
    the dataset's `problems`.

    Args:
        name: The dataset's name.
        corpus: Documents with unique ids.
        questions: Queries with unique ids.
        judgements: Relevance judgements.
        source: The file of the judgements, for messages.
        corpus_source: The file or folder of the documents, for messages; None: the same file.
        strict: Whether judgements of unknown ids are an error; otherwise they are left out and listed in `problems`.
        problems: Sentences to begin `problems` with.

    Raises:
        UserError: for an empty corpus or query, judgements that contradict each other or the flag "answerable", none
            at all, and, when `strict`, for judgements of unknown ids.
    """
    found = [*problems, *_corpus_problems(corpus, corpus_source or source)]
    documents = {document.id: document.text for document in corpus}
    check_ids((*documents, *(question.id for question in questions)), name)
    texts = {question.id: question.text for question in questions}
    qrels = _qrels(judgements, source, texts, documents, strict, found)
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
        found.append(f"{source} does not judge the evidence of {named(unjudged_evidence)} relevant.")
    if drop_self_hits := _are_documents(texts, documents, qrels):
        found.append(f"The queries of {name} are documents of its corpus: what finds itself is not counted.")
    return Dataset(
        name=name,
        corpus=tuple(corpus),
        queries={query: text for query, text in texts.items() if query in qrels},
        qrels={query: qrels[query] for query in texts if query in qrels},
        answers={question.id: question.answers for question in questions if question.answers},
        unjudged={query: text for query, text in texts.items() if query not in qrels},
        unanswerable=frozenset(question.id for question in questions if not question.answerable),
        drop_self_hits=drop_self_hits,
        problems=tuple(found),
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


def _are_documents(
    queries: Mapping[str, str], documents: Mapping[str, str], qrels: Mapping[str, Mapping[str, int]]
) -> bool:
    """Return whether queries are documents themselves, under the same ids, as in ArguAna and Quora.

    Most of the ids that are both must name the same text, for numbers coincide by chance; and no query may be judged
    to be answered by the document of its own id.
    """
    both = [query for query in queries if query in documents]
    if any(qrels.get(query, {}).get(query, 0) > 0 for query in both):
        return False
    same = sum(_same_text(queries[query], documents[query]) for query in both)
    return 2 * same > len(both)


def _same_text(query: str, document: str) -> bool:
    """Return whether a query is the text of a document, with or without the title."""
    words, passage = query.lower().split(), document.lower().split()
    return bool(words) and passage[-len(words) :] == words


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
        if abs(item.grade) > _MAX_GRADE:
            raise UserError(
                f"{source}, {item.where} has the grade {item.grade:,}: use grades up to {_MAX_GRADE:,}."
            )
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
