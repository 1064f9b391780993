"""SQuAD files (v1.1 and v2.0) as a dataset."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rag.evaluate.datasets import Dataset, Judgement, assemble
from rag.evaluate.datasets.ir_datasets import _check_once
from rag.evaluate.datasets.questions import Question, leave_out, locate, valid_json
from rag.evaluate.datasets.spans import read_text
from rag.runtime.options import Count, Filled, Seed
from rag.types import Document, UserError

# --- SQuAD


def load_squad(
    path: Filled | Path, *, strict: bool = True, limit: Count | None = None, seed: Seed = 0
) -> Dataset:
    """Load a SQuAD file, 1.1 or 2.0 (Rajpurkar et al. 2016, 2018), XQuAD too, or `limit` of its questions.

    Every different context is a document, its title beside it, not in it; a question judges its own context
    relevant, grade 1. Its answers are all annotators'; its evidence is the span of the first one only, since
    the others say the same again. That span is the bare answer, so recall over it asks whether the answer was
    retrieved, and precision says little. Questions marked impossible are unanswerable and not judged. Raises
    UserError for a malformed file, a repeated id, and, when `strict`, an answer that is not where it claims to be.
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
    _check_once((question.id for question in questions), f"{file} repeats the question id")
    leave_out(faults, f"{file} gives answers that are not there:", strict, problems)
    corpus, name = list(documents.values()), file.stem
    dataset = assemble(name, corpus, questions, judgements, str(file), str(file), strict, problems)
    return dataset.sample(limit, seed)


def _paragraphs(file: Path) -> Iterator[tuple[str, str, str, list]]:
    """(id, title, context, questions) of each paragraph; the id is the article's title and a number from 0."""
    data = valid_json(read_text(file), str(file))
    for number, article in enumerate(_member(data, "data", list, str(file)), 1):
        at = f"{file}, article {number}"
        paragraphs = _member(article, "paragraphs", list, at)
        title = _member(article, "title", str, at) if "title" in article else ""
        for i, paragraph in enumerate(paragraphs):
            context = _member(paragraph, "context", str, f"{at}, paragraph {i}")
            asked = _member(paragraph, "qas", list, f"{at}, paragraph {i}")
            yield f"{number}-{title or 'article'}-{i}", title.replace("_", " "), context, asked


def _squad_question(row: object, document: Document, where: str, faults: list[str]) -> Question:
    id, text = _member(row, "id", str, where), _member(row, "question", str, where)
    if row.get("is_impossible"):
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
