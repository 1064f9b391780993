"""Evaluation sets in other layouts than BEIR's: SQuAD, character spans over plain files, ir_datasets.

Each gives the same Dataset, checked by the same rules (rag.evaluate.datasets).
"""

import csv
import importlib
import io
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rag.evaluate.datasets import Dataset, Judgement, assemble
from rag.evaluate.questions import Question, leave_out, locate, named, read_questions, valid_json
from rag.types import Document, UserError
from rag.values import Count, Filled, Seed

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


# --- character spans over plain files


def load_spans(
    path: Filled | Path,
    questions: Filled = "questions_df.csv",
    documents: Filled = "corpora",
    *,
    strict: bool = True,
    limit: Count | None = None,
    seed: Seed = 0,
) -> Dataset:
    """Load a folder of text files and questions whose evidence is spans of characters, or `limit` of them.

    `questions` and `documents` are a file and a folder in `path` ("." for `path` itself). Questions are JSON
    lines as in the layout of BEIR, or the CSV of Chroma's chunking evaluation (Smith and Troynikov 2024): columns
    question, references (a JSON list of {"content", "start_index", "end_index"}) and corpus_id, the name of the
    file without its ending; their ids are row numbers from 0. The files are UTF-8 text and are not cleaned, so
    that positions fit; others are left out. The documents that hold evidence are relevant, grade 1. Raises
    UserError for a malformed file and, when `strict`, for evidence that is not there.
    """
    path = Path(path).expanduser()
    file, folder = path / questions, path / documents
    if not folder.is_dir():
        raise UserError(f"There is no folder {folder} of documents: give dataset.path and dataset.documents.")
    problems: list[str] = []
    corpus = [_plain(name, folder, problems) for name in _files(folder) if folder / name != file]
    corpus = [document for document in corpus if document]
    texts = {document.id: document.text for document in corpus}
    read = _read_chroma if file.suffix.lower() == ".csv" else read_questions
    asked = read(file, texts, strict, problems)
    judgements = [
        Judgement(f'query "{question.id}"', question.id, document, 1)
        for question in asked
        for document in dict.fromkeys(span.document for span in question.evidence)
    ]
    name = path.resolve().name
    dataset = assemble(name, corpus, asked, judgements, str(file), str(folder), strict, problems)
    return dataset.sample(limit, seed)


def _files(folder: Path) -> list[str]:
    """Paths in the folder and its folders, with /, in order; hidden ones are passed over."""
    names = (file.relative_to(folder) for file in folder.rglob("*") if file.is_file())
    return sorted(name.as_posix() for name in names if not any(part.startswith(".") for part in name.parts))


def _plain(name: str, folder: Path, problems: list[str]) -> Document | None:
    try:
        return Document(id=name, path=name, text=read_text(folder / name), title=Path(name).stem)
    except UserError as error:
        problems.append(f"{folder / name} is left out: {error}")
        return None


def _read_chroma(file: Path, documents: dict[str, str], strict: bool, problems: list[str]) -> list[Question]:
    faults: list[str] = []
    questions = []
    for number, row in enumerate(_csv_rows(file)):
        where = f"{file}, question {number}"
        corpus_id = row["corpus_id"]
        document = corpus_id if corpus_id in documents else f"{corpus_id}.md"
        spans = [
            {"document": document, "quote": x["content"], "start": x["start_index"], "end": x["end_index"]}
            for x in _references(row["references"], where)
        ]
        evidence = locate(spans, documents, f"question {number}", faults)
        questions.append(Question(str(number), row["question"], evidence=evidence))
    leave_out(faults, f"{file} gives evidence that is not there:", strict, problems)
    return questions


def _csv_rows(file: Path) -> Iterator[dict[str, str]]:
    wanted = ("question", "references", "corpus_id")
    reader = csv.DictReader(io.StringIO(read_text(file).removeprefix("\ufeff"), newline=""), strict=True)
    try:
        for row in reader:
            if not all(isinstance(row.get(column), str) for column in wanted):
                raise UserError(
                    f"{file}, line {reader.line_num} lacks one of {', '.join(wanted)}: correct it."
                )
            yield row
    except csv.Error as error:
        raise UserError(f"{file}, line {reader.line_num} is not valid CSV ({error}): correct it.") from error


def _references(text: str, where: str) -> list[dict]:
    keys = {"content", "start_index", "end_index"}
    references = valid_json(text, f"{where}, references")
    if not isinstance(references, list) or not all(
        isinstance(x, dict) and keys <= x.keys() for x in references
    ):
        raise UserError(
            f"{where}: references must be a list of objects with {', '.join(sorted(keys))}: correct it."
        )
    return references


def read_text(file: Path) -> str:
    """The file's text with every character as it stands, line ends too. UserError if not there or not UTF-8."""
    try:
        return file.read_bytes().decode("utf-8")
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 ({error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it there.") from error


# --- ir_datasets


def load_ir_datasets(
    id: Filled, *, strict: bool = True, limit: Count | None = None, seed: Seed = 0
) -> Dataset:
    """Load a set by its id in the ir_datasets catalogue (MacAvaney et al. 2021), such as "beir/scifact/test".

    The library is not required otherwise; it downloads the set on first use. A document's and a query's text is
    what the library holds for it (default_text). Raises UserError without the library or a connection, and for
    an id that is unknown or lacks documents, queries or judgements.
    """
    what = f"The ir_datasets set {id}"
    source = _ir_dataset(id)
    parts = ("docs", "queries", "qrels")
    if missing := [part for part in parts if not getattr(source, f"has_{part}")()]:
        raise UserError(
            f"{what} has no {' and no '.join(missing)}: choose an id that has {', '.join(parts)}."
        )
    try:
        corpus = [
            Document(doc.doc_id, doc.doc_id, doc.default_text().strip(), getattr(doc, "title", "") or "")
            for doc in source.docs_iter()
        ]
        questions = [Question(query.query_id, query.default_text()) for query in source.queries_iter()]
        judgements = [
            Judgement(f"judgement {number}", row.query_id, row.doc_id, row.relevance)
            for number, row in enumerate(source.qrels_iter(), 1)
        ]
    except (OSError, RuntimeError) as error:  # what its downloads raise
        raise UserError(f"{what} cannot be fetched ({error}): go online, or choose another set.") from error
    _check_once((document.id for document in corpus), f"{what} repeats the document")
    _check_once((question.id for question in questions), f"{what} repeats the query")
    return assemble(id, corpus, questions, judgements, what, what, strict, []).sample(limit, seed)


def _ir_dataset(id: str) -> Any:
    try:
        return importlib.import_module("ir_datasets").load(id)
    except ImportError as error:
        raise UserError(
            f"dataset.id={id} needs the library ir_datasets ({error}): install it with pip install ir_datasets."
        ) from error
    except KeyError as error:
        raise UserError(f"ir_datasets knows no set {id}: choose an id of https://ir-datasets.com.") from error


def _check_once(ids: Iterable[str], fault: str) -> None:
    seen: set[str] = set()
    repeated = [f'"{id}"' for id in ids if id in seen or seen.add(id)]
    if repeated:
        raise UserError(f"{fault} {named(repeated)}: remove the second.")
