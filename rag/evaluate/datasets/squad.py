"""Datasets in the format of SQuAD 1.1 and 2.0 (Rajpurkar et al. 2016, 2018), XQuAD too."""

from pathlib import Path

from pydantic import Field

from rag.evaluate.datasets import Dataset
from rag.evaluate.datasets.assemble import Judgement, assemble
from rag.evaluate.datasets.files import REMEDY, DatasetRow, check_unique, leave_out, read_text
from rag.evaluate.datasets.questions import EvidenceRow, Question, locate
from rag.runtime.options import Count, Filled, Seed
from rag.runtime.records import fitted_record, parsed_json
from rag.types import Document, UserError


class SquadAnswer(DatasetRow):
    """An answer and its first character in the context."""

    text: str
    answer_start: int


class SquadQuestion(DatasetRow):
    """A question; only one marked impossible may be without answers."""

    id: str
    question: str
    is_impossible: bool = False
    answers: list[SquadAnswer] = Field(default_factory=list)


class SquadParagraph(DatasetRow):
    """A context and the questions about it."""

    context: str
    qas: list[SquadQuestion]


class SquadArticle(DatasetRow):
    """The paragraphs of a Wikipedia article."""

    title: str = ""
    paragraphs: list[SquadParagraph]


class SquadFile(DatasetRow):
    """A whole file."""

    data: list[SquadArticle]


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
        UserError: for a malformed file, a repeated id, a question without answers that is not marked impossible, and,
            when `strict`, an answer that is not at its position.
    """
    file = Path(path).expanduser()
    documents: dict[str, Document] = {}  # by text
    questions: list[Question] = []
    judgements: list[Judgement] = []
    faults: list[str] = []
    text = read_text(file).removeprefix("\ufeff")
    articles = fitted_record(file, parsed_json(file, text, REMEDY), SquadFile, REMEDY).data
    for number, article in enumerate(articles, 1):
        for i, paragraph in enumerate(article.paragraphs):
            id, title = f"{number}-{article.title or 'article'}-{i}", article.title.replace("_", " ")
            new = Document(id, id, paragraph.context, title)
            document = documents.setdefault(paragraph.context, new)
            for row in paragraph.qas:
                question = _question(file, row, document, faults)
                questions.append(question)
                if question.answerable:
                    judgements.append(Judgement(id, question.id, document.id, 1))
    problems: list[str] = []
    check_unique((question.id for question in questions), f"{file} repeats the question id")
    leave_out(faults, f"{file} gives answers that are not there:", strict, problems)
    corpus, name = list(documents.values()), file.stem
    dataset = assemble(name, corpus, questions, judgements, str(file), strict=strict, problems=problems)
    return dataset.sample(limit, seed)


def _question(file: Path, row: SquadQuestion, document: Document, faults: list[str]) -> Question:
    if row.is_impossible:
        return Question(row.id, row.question, answerable=False)
    if not row.answers:
        raise UserError(
            f'{file} has no "answers" for the question "{row.id}", which only a question with "is_impossible": true '
            "may leave out: correct the file."
        )
    spans = [
        EvidenceRow(document=document.id, quote=text, start=start, end=start + len(text))
        for text, start in ((answer.text, answer.answer_start) for answer in row.answers[:1])
    ]
    evidence = locate(spans, {document.id: document.text}, f'question "{row.id}"', faults)
    answers = tuple(dict.fromkeys(answer.text for answer in row.answers))
    return Question(row.id, row.question, answers, True, evidence)
