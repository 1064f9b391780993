"""Datasets in the format of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), XQuAD too."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import check_unique, leave_out, read_text, valid_json
from rag.evaluate.datasets.questions import Question, locate
from rag.runtime.options import Count, Filled, Seed
from rag.types import Document, UserError


def load_squad(
    path: Filled | Path, *, strict: bool = True, limit: Count | None = None, seed: Seed = 0
) -> Dataset:
    """Load a SQuAD file.

    Every different context is a document, whose text is without the title. A question judges its own context
    relevant, grade 1. Its answers are those of all annotators; its evidence is the span of the first one only, since
    the others say the same again. That span is the bare answer, so recall over it asks whether the answer was
    retrieved, and precision says little. Questions marked impossible are unanswerable and not judged.

    Args:
        path: The JSON file.
        strict: Whether an answer that is not at the position given is an error; otherwise it gives no evidence.
        limit: How many questions to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: for a malformed file, a repeated id, and, when `strict`, an answer that is not at its position.
    """
    file = Path(path).expanduser()
    documents: dict[str, Document] = {}  # by text
    questions: list[Question] = []
    judgements: list[Judgement] = []
    faults: list[str] = []
    for where, title, context, asked in _paragraphs(file):
        document = documents.setdefault(context, Document(where, where, context, title))
        for row in asked:
            question = _squad_question(row, document, f"{file}, {where}", faults)
            questions.append(question)
            if question.answerable:
                judgements.append(Judgement(where, question.id, document.id, 1))
    problems: list[str] = []
    check_unique((question.id for question in questions), f"{file} repeats the question id")
    leave_out(faults, f"{file} gives answers that are not there:", strict, problems)
    corpus, name = list(documents.values()), file.stem
    dataset = assemble(name, corpus, questions, judgements, str(file), str(file), strict, problems)
    return dataset.sample(limit, seed)


def _paragraphs(file: Path) -> Iterator[tuple[str, str, str, list]]:
    """Yield (id, title, context, questions) of each paragraph; the id is the article's title and a number from 0."""
    data = valid_json(read_text(file).removeprefix("\ufeff"), str(file))
    for number, article in enumerate(_member(data, "data", list, str(file)), 1):
        at = f"{file}, article {number}"
        paragraphs = _member(article, "paragraphs", list, at)
        title = _member(article, "title", str, at) if "title" in article else ""
        for i, paragraph in enumerate(paragraphs):
            context = _member(paragraph, "context", str, f"{at}, paragraph {i}")
            asked = _member(paragraph, "qas", list, f"{at}, paragraph {i}")
            yield f"{number}-{title or 'article'}-{i}", title.replace("_", " "), context, asked


def _squad_question(row: dict, document: Document, where: str, faults: list[str]) -> Question:
    id, text = _member(row, "id", str, where), _member(row, "question", str, where)
    impossible = row.get("is_impossible", False)
    if not isinstance(impossible, bool):
        raise UserError(f'{where}, {id}: "is_impossible" must be true or false: correct it.')
    if impossible:
        return Question(id, text, answerable=False)
    given = [
        (
            _member(answer, "text", str, f"{where}, {id}"),
            _member(answer, "answer_start", int, f"{where}, {id}"),
        )
        for answer in _member(row, "answers", list, f"{where}, {id}")
    ]
    spans = [
        {"document": document.id, "quote": answer, "start": start, "end": start + len(answer)}
        for answer, start in given[:1]
    ]
    evidence = locate(spans, {document.id: document.text}, f'question "{id}"', faults)
    return Question(id, text, tuple(dict.fromkeys(answer for answer, _ in given)), True, evidence)


def _member(record: object, key: str, kind: type, where: str) -> Any:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, kind) or isinstance(value, bool):
        raise UserError(f'{where} has no {kind.__name__} "{key}" as SQuAD\'s layout has: correct it.')
    return value
