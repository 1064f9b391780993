"""Make training examples of any dataset: for each question a gold passage, and distractors that a retriever finds."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from rag.evaluate.datasets import Dataset
from rag.retrieve import Retriever
from rag.retrieve.cached import cached_search
from rag.retrieve.collection import Collection
from rag.retrieve.search import Dense
from rag.runtime.options import Count, checked
from rag.train.contexts import ReaderExample
from rag.types import Chunk, Hit


class ExampleSet(NamedTuple):
    """Examples, the texts of all passages, which they name by index, and how many questions were left out, and why."""

    examples: tuple[ReaderExample, ...]
    passages: tuple[str, ...]
    left_out: Mapping[str, int]  # reason -> questions


@checked
def make_examples(
    dataset: Dataset, collection: Collection, retriever: Retriever = Dense(), depth: Count = 20
) -> ExampleSet:
    """Return an example for each question of a dataset that has a gold answer and a gold passage.

    The gold passage is a chunk of a relevant document: the first that has an answer in it, else the one with the
    evidence, else the only chunk. Where the evidence is known, its chunk is looked at first. Of the answers, those that
    are in the gold passage come first. Distractors are what the retriever finds for the question, best first, without
    the gold passage and without passages that have an answer in them.

    Args:
        dataset: Questions, judgements, answers and evidence.
        collection: The dataset's chunks (rag.evaluate.retrieval: chunk_all, build_collection).
        retriever: Finds the distractors.
        depth: How many passages are retrieved for a question.
    """
    chunks = collection.chunks()
    left_out = Counter({"it is flagged as unanswerable": len(dataset.unanswerable)})
    gold: dict[str, int] = {}
    for query in dataset.queries:
        answers = dataset.answers.get(query, ())
        relevant = sorted((-grade, name) for name, grade in dataset.qrels[query].items() if grade > 0)
        rows = [int(row) for _, name in relevant for row in collection.rows_of([name])]
        row = _gold_row(rows, chunks, dataset, query)
        if not answers:
            left_out["it has no gold answer"] += 1
        elif row is None:
            left_out["no passage has an answer or the evidence in it"] += 1
        else:
            gold[query] = row
    found = cached_search(collection, retriever, [dataset.queries[query] for query in gold], depth)
    examples = tuple(
        _example(dataset, query, row, hits, chunks)
        for (query, row), hits in zip(gold.items(), found, strict=True)
    )
    return ExampleSet(examples, tuple(chunk.text for chunk in chunks), +left_out)


def _gold_row(rows: Iterable[int], chunks: Sequence[Chunk], dataset: Dataset, query: str) -> int | None:
    """Return the row of the gold passage among the rows of the relevant documents' chunks, best document first."""
    spans = dataset.evidence.get(query, ())

    def has_evidence(row: int) -> bool:
        chunk = chunks[row]
        return any(
            e.document == chunk.document_id and chunk.start <= e.start and e.end <= chunk.end for e in spans
        )

    ordered = sorted(rows, key=has_evidence, reverse=True)  # stable
    for row in ordered:
        if has_answer(chunks[row].text, dataset.answers.get(query, ())):
            return row
    first = next(iter(ordered), None)
    return first if first is not None and (len(ordered) == 1 or has_evidence(first)) else None


def _example(
    dataset: Dataset, query: str, gold: int, hits: Sequence[Hit], chunks: Sequence[Chunk]
) -> ReaderExample:
    text = chunks[gold].text
    answers = sorted(dataset.answers[query], key=lambda answer: not has_answer(text, [answer]))  # stable
    distractors = tuple(
        hit.row for hit in hits if hit.chunk.text != text and not has_answer(hit.chunk.text, answers)
    )
    return ReaderExample(query, dataset.queries[query], tuple(answers), gold, distractors)


def has_answer(text: str, answers: Iterable[str]) -> bool:
    """Return whether a text has one of the answers in it, in upper or lower case."""
    folded = text.casefold()
    return any(answer.casefold() in folded for answer in answers)


def is_verbatim(example: ReaderExample, passages: Sequence[str]) -> bool:
    """Return whether the first answer is in the gold passage: then no other answer need be trained on."""
    return has_answer(passages[example.gold], example.answers[:1])


def concatenated(sets: Iterable[ExampleSet]) -> ExampleSet:
    """Return several sets as one, whose passages differ; an id that an earlier set has gets the number of its set."""
    rows: dict[str, int] = {}  # of a passage's text
    examples: dict[str, ReaderExample] = {}
    left_out: Counter[str] = Counter()
    for number, (some, passages, reasons) in enumerate(sets, 1):
        new = [rows.setdefault(text, len(rows)) for text in passages]
        for e in some:
            id = f"{number}:{e.id}" if e.id in examples else e.id
            distractors = tuple(dict.fromkeys(new[row] for row in e.distractors))
            examples[id] = e._replace(id=id, gold=new[e.gold], distractors=distractors)
        left_out.update(reasons)
    return ExampleSet(tuple(examples.values()), tuple(rows), left_out)


def hold_out(passage_of: Mapping[str, str], count: int) -> frozenset[str]:
    """Return the ids of at most `count` questions, and of all questions on the same passages.

    Passages are taken in the order of the SHA-256 of their texts, each with all its questions, while these are at most
    `count`; so the choice does not depend on the order of files.

    Args:
        passage_of: The id of each question -> the text of its gold passage.
        count: The most questions.
    """
    groups: dict[str, list[str]] = {}
    for id, text in passage_of.items():
        groups.setdefault(text, []).append(id)
    held: set[str] = set()
    for text in sorted(groups, key=lambda text: hashlib.sha256(text.encode()).digest()):
        if len(held) + len(groups[text]) <= count:
            held.update(groups[text])
    return frozenset(held)
