"""Evaluation sets: a corpus, queries, relevance judgements and gold answers, checked when they are loaded.

    path/corpus.jsonl         {"_id", "title" (optional), "text"}, or path/documents/: a folder of files
    path/queries.jsonl        {"_id", "text", "answers" (optional), "answerable" (optional)}
    path/qrels/<split>.tsv    query-id, corpus-id, score: integers; 0 or less means judged irrelevant

This is the layout of BEIR (Thakur et al. 2021, arXiv:2104.08663) with two additions: "answers" and
"answerable", at top level or under "metadata", and documents that may be plain files. What would make a
figure wrong is an error that names file, line and id; what is merely worth knowing goes into `problems`.
"""

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rag.ingest.load import Skipped, load_folder
from rag.types import Document, UserError

_HEADER = ["query-id", "corpus-id", "score"]
_NAMED = 5  # ids spelled out in a message before "and N more"


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


def load_beir(path: str | Path, split: str = "test", *, strict: bool = True) -> Dataset:
    """Load and check the set in folder `path`.

    Raises UserError for a missing or malformed file, a duplicate id, an empty query, a judgement that
    contradicts another one or the "answerable" flag, and a judgement of an unknown query or document. Some
    published sets have the last: with `strict=False` it is left out and listed in `problems`.
    """
    path = Path(path).expanduser()
    if not path.is_dir():
        raise UserError(f"There is no folder {path}: give one with queries.jsonl and qrels/{split}.tsv.")
    problems: list[str] = []
    corpus = _corpus(path, problems)
    documents = {document.id: document for document in corpus}
    queries = [_query(path / "queries.jsonl", line, row) for line, row in _rows(path / "queries.jsonl")]
    texts = {query.id: query.text for query in queries}
    qrels = _qrels(path / "qrels" / f"{split}.tsv", texts, documents, strict, problems)
    for query in queries:
        if not query.answerable and query.id in qrels:
            raise UserError(f'Query "{query.id}" of {path} is flagged unanswerable but judged: drop one.')
    return Dataset(
        name=path.resolve().name,
        corpus=corpus,
        queries={query: text for query, text in texts.items() if query in qrels},
        qrels={query: qrels[query] for query in texts if query in qrels},
        answers={query.id: query.answers for query in queries if query.answers},
        unjudged={query: text for query, text in texts.items() if query not in qrels},
        unanswerable=frozenset(query.id for query in queries if not query.answerable),
        drop_self_hits=any(q in documents and _same_text(t, documents[q].text) for q, t in texts.items()),
        problems=tuple(problems),
    )


# --- corpus


def _corpus(path: Path, problems: list[str]) -> tuple[Document, ...]:
    source = path / "corpus.jsonl"
    if source.exists():
        corpus = tuple(_document(source, line, row) for line, row in _rows(source))
    elif (source := path / "documents").is_dir():
        loaded = list(load_folder(source))
        skipped = (item for item in loaded if isinstance(item, Skipped))
        problems.extend(f"{source / item.path} is left out: {item.reason}." for item in skipped)
        corpus = tuple(item for item in loaded if isinstance(item, Document))
    else:
        raise UserError(f"The dataset {path} has neither corpus.jsonl nor documents/: add one of them.")
    if not corpus:
        raise UserError(f"The corpus {source} is empty: add documents.")
    first: dict[str, str] = {}
    empty = [document.id for document in corpus if not document.text]
    repeated = [d.id for d in corpus if d.text and first.setdefault(d.text, d.id) != d.id]
    if empty:
        problems.append(f"{source} has no text for {_named(empty)}.")
    if repeated:
        problems.append(f"{source} repeats the text of an earlier document in {_named(repeated)}.")
    return corpus


def _document(file: Path, line: int, row: Mapping) -> Document:
    title = row.get("title") or ""
    if not isinstance(title, str):
        raise UserError(f'{file}, line {line}: "title" must be a string: correct it.')
    return Document(id=row["_id"], path=row["_id"], text=f"{title} {row['text']}".strip(), title=title)


# --- queries


@dataclass(frozen=True, slots=True)
class _Query:
    id: str
    text: str
    answers: tuple[str, ...]
    answerable: bool


def _query(file: Path, line: int, row: Mapping) -> _Query:
    if not row["text"].strip():
        raise UserError(f'{file}, line {line}: the query "{row["_id"]}" is empty: write it or remove it.')
    metadata = row.get("metadata") or {}
    fields = {**metadata, **row} if isinstance(metadata, dict) else row
    answers, answerable = fields.get("answers") or [], fields.get("answerable", True)
    if not isinstance(answers, list) or not all(isinstance(answer, str) for answer in answers):
        raise UserError(f'{file}, line {line}: "answers" must be a list of strings: correct it.')
    if not isinstance(answerable, bool):
        raise UserError(f'{file}, line {line}: "answerable" must be true or false: correct it.')
    return _Query(row["_id"], row["text"], tuple(answers), answerable)


def _same_text(query: str, document: str) -> bool:
    """A query that was made from a document is its text, with or without the title."""
    words, passage = " ".join(query.lower().split()), " ".join(document.lower().split())
    return bool(words) and passage.endswith(words)


# --- judgements


def _qrels(
    file: Path, queries: Collection[str], documents: Collection[str], strict: bool, problems: list[str]
) -> dict[str, dict[str, int]]:
    if not file.exists():
        found = ", ".join(sorted(other.stem for other in file.parent.glob("*.tsv"))) or "none"
        raise UserError(f"{file} is missing: add it, or choose a split that is there ({found}).")
    lines = _lines(file)
    if next(lines, (1, ""))[1].split("\t") != _HEADER:
        raise UserError(f"{file} must begin with the line {' '.join(_HEADER)}, with tabs between: add it.")
    qrels: dict[str, dict[str, int]] = {}
    dangling, repeated = [], []
    for line, content in lines:
        query, document, grade = _judgement(file, line, content)
        if query not in queries:
            dangling.append(f'query "{query}" (line {line})')
        elif document not in documents:
            dangling.append(f'document "{document}" (line {line})')
        elif (known := qrels.get(query, {}).get(document)) is None:
            qrels.setdefault(query, {})[document] = grade
        elif known != grade:
            raise UserError(f'{file}, line {line} grades "{document}" {grade} after {known}: keep one.')
        else:
            repeated.append(f"line {line}")
    if dangling and strict:
        raise UserError(
            f"{file} judges the unknown {_named(dangling)}: remove this or load with dataset.strict=false."
        )
    if dangling:
        problems.append(f"{file} judges the unknown {_named(dangling)}, which is left out.")
    if repeated:
        problems.append(f"{file} repeats earlier judgements in {_named(repeated)}.")
    if not qrels:
        raise UserError(f"{file} judges no query: add judgements.")
    if hopeless := [query for query, judged in qrels.items() if max(judged.values()) <= 0]:
        problems.append(f"{file} has no relevant document for {_named(hopeless)}, which count as 0.")
    return qrels


def _judgement(file: Path, line: int, content: str) -> tuple[str, str, int]:
    fields = content.split("\t")
    if len(fields) != 3 or not all(field.strip() for field in fields):
        raise UserError(f"{file}, line {line} is not query id, tab, document id, tab, score: correct it.")
    try:
        return fields[0], fields[1], int(fields[2])
    except ValueError as error:
        raise UserError(f'{file}, line {line}: score "{fields[2]}" is not an integer: correct it.') from error


# --- files


def _rows(file: Path) -> Iterator[tuple[int, dict]]:
    """(line from 1, row) of a JSON lines file whose rows have a unique, non-empty "_id" and a "text"."""
    seen: dict[str, int] = {}
    for line, content in _lines(file):
        try:
            row = json.loads(content)
        except json.JSONDecodeError as error:
            raise UserError(f"{file}, line {line} is not valid JSON ({error.msg}): correct it.") from error
        if not isinstance(row, dict) or not all(isinstance(row.get(key), str) for key in ("_id", "text")):
            raise UserError(f'{file}, line {line} has no strings "_id" and "text": correct it.')
        if not row["_id"].strip():
            raise UserError(f'{file}, line {line} has an empty "_id": give it one.')
        if (first := seen.setdefault(row["_id"], line)) != line:
            raise UserError(f'{file}, line {line} repeats the id "{row["_id"]}" of line {first}: remove one.')
        yield line, row


def _lines(file: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, content) of the lines that are not blank."""
    try:
        with open(file, encoding="utf-8-sig") as stream:
            yield from ((n, line.rstrip("\n")) for n, line in enumerate(stream, 1) if line.strip())
    except UnicodeDecodeError as error:
        raise UserError(f"{file} is not valid UTF-8 ({error.reason}): convert it.") from error
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): put it there.") from error


def _named(ids: Sequence[str]) -> str:
    more = f" and {len(ids) - _NAMED} more" if len(ids) > _NAMED else ""
    return ", ".join(ids[:_NAMED]) + more
