"""Datasets of JSON lines, each a question with the passage that answers it: {question, context, answers}."""

from pathlib import Path

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import REMEDY, DatasetRow, NotBlank, check_unique, lines_of
from rag.evaluate.datasets.questions import Question
from rag.runtime.options import Count, Filled, Seed
from rag.runtime.records import fitted_record, parsed_json
from rag.types import Document, UserError


class ContextQuestion(DatasetRow):
    """A line of the file; a question without answers is one that its context does not answer."""

    question: NotBlank
    context: NotBlank
    answers: list[NotBlank]
    id: NotBlank | None = None  # None: the line's number
    title: str = ""  # of the context


def load_jsonl(path: Filled | Path, *, limit: Count | None = None, seed: Seed = 0) -> Dataset:
    """Load a JSON lines file of questions with their contexts.

    Every different context is a document, whose text is without the title. A question judges its own context
    relevant, grade 1. Questions without answers are unanswerable and not judged.

    Args:
        path: The file.
        limit: How many questions to draw; None takes all.
        seed: Of the draw.

    Raises:
        UserError: for a malformed line, a repeated id, and a file without any answer.
    """
    file = Path(path).expanduser()
    documents: dict[str, Document] = {}  # by text
    questions: list[Question] = []
    judgements: list[Judgement] = []
    for line, content in lines_of(file):
        where = f"{file}, line {line}"
        row = fitted_record(where, parsed_json(where, content, REMEDY), ContextQuestion, REMEDY)
        name = f"passage-{len(documents)}"
        document = documents.setdefault(row.context, Document(name, name, row.context, row.title))
        question = Question(row.id or str(line), row.question, tuple(row.answers), bool(row.answers))
        questions.append(question)
        if question.answerable:
            judgements.append(Judgement(f"line {line}", question.id, document.id, 1))
    if not judgements:
        raise UserError(
            f"{file} has no question with an answer: give lines of question, context and answers."
        )
    check_unique((question.id for question in questions), f"{file} repeats the question id")
    dataset = assemble(file.stem, list(documents.values()), questions, judgements, str(file))
    return dataset.sample(limit, seed)
