"""SQuAD files, spans over plain files, and ir_datasets (a stand-in of it) become the same checked Dataset."""

import csv
import io
import json
import sys
from types import SimpleNamespace

import pytest

from rag.evaluate.datasets.ir_datasets import load_ir_datasets
from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.datasets.spans import load_spans
from rag.evaluate.datasets.squad import load_squad
from rag.types import Document, UserError

# --- SQuAD

TIDES, ICE = "The tide turns twice a day. 🌊", "Eis schwimmt, weil es leichter ist als Wasser."


def asked(id, text, *answers, **more):
    return {
        "id": id,
        "question": text,
        "answers": [{"text": t, "answer_start": s} for t, s in answers],
        **more,
    }


def squad():
    return {
        "version": "v2.0",
        "data": [
            {
                "title": "The_Tides",
                "paragraphs": [
                    {
                        "context": TIDES,
                        "qas": [
                            asked("a", "How often?", ("twice", 15), ("twice a day", 15), ("twice", 15)),
                            asked("b", "Why?", is_impossible=True, plausible_answers=[]),
                            {"id": "g", "question": "Who?", "is_impossible": True},
                            asked("c", "What sign ends it?", ("🌊", 28)),
                        ],
                    },
                    {"context": ICE, "qas": [asked("d", "Was schwimmt?", ("Eis", 0), is_impossible=False)]},
                ],
            },
            {"paragraphs": [{"context": TIDES, "qas": [asked("e", "What turns?", ("The tide", 0))]}]},
        ],
    }


@pytest.fixture
def squad_file(tmp_path):
    def write(data):
        file = tmp_path / "tiny.json"
        file.write_text(data if isinstance(data, str) else json.dumps(data), encoding="utf-8")
        return file

    return write


def test_squad_contexts_are_documents_and_questions_judge_their_own(squad_file):
    dataset = load_squad(squad_file(squad()))
    tides, ice = "1-The_Tides-0", "1-The_Tides-1"
    assert dataset.name == "tiny"
    assert dataset.corpus == (
        Document(tides, tides, TIDES, "The Tides"),
        Document(ice, ice, ICE, "The Tides"),
    )
    assert dataset.queries == {
        "a": "How often?",
        "c": "What sign ends it?",
        "d": "Was schwimmt?",
        "e": "What turns?",
    }
    assert dataset.qrels == {"a": {tides: 1}, "c": {tides: 1}, "d": {ice: 1}, "e": {tides: 1}}
    assert dataset.answers == {"a": ("twice", "twice a day"), "c": ("🌊",), "d": ("Eis",), "e": ("The tide",)}
    assert dataset.evidence == {
        "a": (Evidence(tides, 15, 20),),
        "c": (Evidence(tides, 28, 29),),
        "d": (Evidence(ice, 0, 3),),
        "e": (Evidence(tides, 0, 8),),
    }
    assert dataset.unanswerable_queries == {"b": "Why?", "g": "Who?"}
    assert dataset.problems == ()
    assert len(load_squad(squad_file(squad()), limit=2, seed=1).queries) == 2


def test_a_squad_answer_at_another_position_is_an_error_or_gives_no_evidence_without_strict(squad_file):
    data = squad()
    data["data"][1]["paragraphs"][0]["qas"][0]["answers"][0]["answer_start"] = 3
    file = squad_file(data)
    with pytest.raises(
        UserError, match=r'tiny\.json gives answers that are not there: "The tide".*question "e"'
    ):
        load_squad(file)
    dataset = load_squad(file, strict=False)
    assert "e" in dataset.queries and "e" in dataset.answers and "e" not in dataset.evidence
    assert len(dataset.problems) == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: "{\n broken", r"tiny\.json is not JSON \(.*line 2"),
        (lambda d: [1], r"tiny\.json holds no JSON object"),
        (lambda d: {}, r"tiny\.json .*\(it has no 'data'"),
        (lambda d: {"data": [3]}, r"tiny\.json .*\(data\.0: input should be a JSON object"),
        (lambda d: {"data": [{"paragraphs": [{"qas": []}]}]}, r"it has no 'data\.0\.paragraphs\.0\.context'"),
        (
            lambda d: {"data": [{"paragraphs": [{"context": "x"}]}]},
            r"it has no 'data\.0\.paragraphs\.0\.qas'",
        ),
        (
            lambda d: {"data": [{"paragraphs": [{"context": "x", "qas": [{"id": 4}]}]}]},
            r"\.qas\.0\.id: input should be a valid string",
        ),
        (lambda d: {"data": [{"paragraphs": [{"context": "x", "qas": []}]}]}, r"judges no query"),
        (lambda d: {"data": []}, r"The corpus .*tiny\.json is empty"),
        (
            lambda d: {
                "data": [{"paragraphs": [{"context": TIDES, "qas": [asked("a", "?", ("The", True))]}]}]
            },
            r"\.qas\.0\.answers\.0\.answer_start: input should be a valid integer",
        ),
        *(
            (
                lambda d, row=row: {"data": [{"paragraphs": [{"context": "x", "qas": [row]}]}]},
                r'no "answers" for the question "h", which only a question with "is_impossible": true may',
            )
            for row in ({"id": "h", "question": "Who?"}, asked("h", "Who?"))
        ),
        (lambda d: {"data": d["data"] * 2}, r'repeats the question id "a", "b", "g"'),
        (
            lambda d: {"data": [{"paragraphs": [{"context": "x", "qas": [asked("a", " ", ("x", 0))]}]}]},
            r'The query "a" of tiny is empty',
        ),
    ],
)
def test_a_malformed_squad_file_is_an_error(squad_file, spoil, message):
    with pytest.raises(UserError, match=message):
        load_squad(squad_file(spoil(squad())))


def test_a_missing_squad_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"none\.json cannot be read \(No such file"):
        load_squad(tmp_path / "none.json")


# --- spans

LOG = "Ünïcode\r\nline two\rline three 🌊.\n\n\n\nThe  end is near.\n"  # nothing of this may be cleaned
WIKI = "A tide turns.\nIce floats."


def reference(text, content):
    start = text.index(content)
    return {"content": content, "start_index": start, "end_index": start + len(content)}


def rows():
    return [
        ("What is near?", [reference(LOG, "The  end"), reference(LOG, "🌊.\n")], "log"),
        ("What floats?", [reference(WIKI, "Ice")], "wiki"),
    ]


def csv_of(rows):
    text = io.StringIO(newline="")
    writer = csv.writer(text)
    writer.writerow(["question", "references", "corpus_id"])
    writer.writerows((question, json.dumps(found), corpus) for question, found, corpus in rows)
    return text.getvalue()


@pytest.fixture
def spans(tmp_path):
    def write(questions, name="questions_df.csv"):
        (tmp_path / "corpora").mkdir(exist_ok=True)
        (tmp_path / "corpora" / "log.md").write_bytes(LOG.encode())
        (tmp_path / "corpora" / "wiki.md").write_bytes(WIKI.encode())
        (tmp_path / name).write_bytes(questions.encode())
        return tmp_path

    return write


def test_chroma_spans_are_positions_in_the_text_as_it_is(spans):
    dataset = load_spans(spans(csv_of(rows())))
    texts = {document.id: document.text for document in dataset.corpus}
    assert texts == {"log.md": LOG, "wiki.md": WIKI}
    assert dataset.queries == {"0": "What is near?", "1": "What floats?"}
    assert dataset.qrels == {"0": {"log.md": 1}, "1": {"wiki.md": 1}}
    quotes = {q: [texts[e.document][e.start : e.end] for e in found] for q, found in dataset.evidence.items()}
    assert quotes == {"0": ["The  end", "🌊.\n"], "1": ["Ice"]}
    assert dataset.problems == ()
    assert list(load_spans(spans(csv_of(rows())), limit=1).qrels) in (["0"], ["1"])


def test_spans_from_json_lines_beside_the_documents(spans):
    lines = [
        {"_id": "x", "text": "Which two?", "answers": ["Ice"], "evidence": [
            {"document": "wiki.md", "quote": "Ice"}, {"document": "log.md", "start": 0, "end": 7}]},
        {"_id": "y", "text": "Who?", "answerable": False},
    ]  # fmt: skip
    path = spans("".join(json.dumps(row) + "\n" for row in lines), "corpora/questions.jsonl") / "corpora"
    (path / ".hidden").write_text("no")
    (path / "picture.png").write_bytes(b"\xff\xd8")
    dataset = load_spans(path, questions="questions.jsonl", documents=".")
    assert [document.id for document in dataset.corpus] == ["log.md", "wiki.md"]
    assert dataset.qrels == {"x": {"wiki.md": 1, "log.md": 1}}
    assert dataset.evidence == {"x": (Evidence("wiki.md", 14, 17), Evidence("log.md", 0, 7))}
    assert dataset.answers == {"x": ("Ice",)}
    assert dataset.unanswerable_queries == {"y": "Who?"}
    [problem] = dataset.problems
    assert "picture.png is left out" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda x: {**x, "start_index": 1},
            r'"Ice", which is not the text from 1 to 17',
        ),
        (lambda x: {**x, "end_index": 99}, r'the span 14 to 99 of the 25 characters of document "wiki\.md"'),
        (lambda x: {**x, "content": ""}, r"an empty quote"),
    ],
)
def test_chroma_spans_that_are_not_in_their_document_are_named(spans, change, message):
    first, (question, [found], corpus) = rows()
    path = spans(csv_of([first, (question, [change(found)], corpus)]))
    with pytest.raises(UserError, match=r"questions_df\.csv gives evidence that is not there: .*" + message):
        load_spans(path)
    dataset = load_spans(path, strict=False)
    assert list(dataset.queries) == ["0"] and dataset.unjudged == {"1": "What floats?"}
    assert len(dataset.problems) == 1


def test_faulty_span_files_are_named(spans, tmp_path):
    with pytest.raises(UserError, match=r"no folder .*corpora of documents"):
        load_spans(tmp_path)
    with pytest.raises(UserError, match=r'the unknown document "gone\.md" \(question 0\)'):
        load_spans(spans(csv_of([("?", [reference(WIKI, "Ice")], "gone")])))
    with pytest.raises(UserError, match=r"line 2 .*\(it has no 'corpus_id'"):
        load_spans(spans("question,references\na,[]\n"))
    with pytest.raises(UserError, match=r"line 2 .*\(references: Expecting value"):
        load_spans(spans("question,references,corpus_id\na,[,wiki\n"))
    with pytest.raises(UserError, match=r"line 2 .*\(it has no 'references\.0\.content'"):
        load_spans(spans("question,references,corpus_id\na,[{}],wiki\n"))
    with pytest.raises(UserError, match=r"is not valid CSV"):
        load_spans(spans('question,references,corpus_id\n"a'))
    with pytest.raises(UserError, match=r"judges no query"):
        load_spans(spans("question,references,corpus_id\n"))
    with pytest.raises(UserError, match=r"questions\.jsonl cannot be read"):
        load_spans(tmp_path, "questions.jsonl")


# --- ir_datasets


class Doc(SimpleNamespace):
    def default_text(self):
        return f"{getattr(self, 'title', '')} {self.text}"


class Query(SimpleNamespace):
    def default_text(self):
        return self.text


class Catalogued:
    """What the library's own sets look like from outside."""

    def __init__(self, qrels=True, docs=(), failure=None):
        self._qrels, self._docs, self._failure = qrels, docs, failure

    def has_docs(self):
        return True

    has_queries = has_docs

    def has_qrels(self):
        return self._qrels

    def docs_iter(self):
        if self._failure:
            raise self._failure
        yield Doc(doc_id="7", text="The tide turns.", title="Tides")
        yield Doc(doc_id="8", text="Ice floats.")
        yield from self._docs

    def queries_iter(self):
        return iter([Query(query_id="1", text="What turns?"), Query(query_id="2", text="What else?")])

    def qrels_iter(self):
        return iter([SimpleNamespace(query_id="1", doc_id="7", relevance=2, iteration="0")])


@pytest.fixture
def catalogue(monkeypatch):
    def install(**sets):
        monkeypatch.setitem(sys.modules, "ir_datasets", SimpleNamespace(load=lambda id: sets[id]))

    return install


def test_an_ir_dataset(catalogue):
    catalogue(tiny=Catalogued())
    dataset = load_ir_datasets("tiny")
    assert dataset.name == "tiny"
    assert dataset.corpus == (
        Document("7", "7", "Tides The tide turns.", "Tides"),
        Document("8", "8", "Ice floats.", ""),
    )
    assert dataset.queries == {"1": "What turns?"} and dataset.unjudged == {"2": "What else?"}
    assert dataset.qrels == {"1": {"7": 2}}


def test_an_ir_dataset_that_cannot_be_loaded_is_one_sentence(catalogue, monkeypatch):
    catalogue(
        bare=Catalogued(qrels=False),
        far=Catalogued(failure=ConnectionError("no route")),
        gone=Catalogued(failure=RuntimeError("All download sources failed")),
        twice=Catalogued(docs=[Doc(doc_id="7", text="again")]),
    )
    with pytest.raises(UserError, match=r"ir_datasets knows no set nothing"):
        load_ir_datasets("nothing")
    with pytest.raises(UserError, match=r"set bare has no qrels: choose an id"):
        load_ir_datasets("bare")
    with pytest.raises(UserError, match=r"set far cannot be fetched \(no route\): go online"):
        load_ir_datasets("far")
    with pytest.raises(UserError, match=r"set gone cannot be fetched \(All download"):
        load_ir_datasets("gone")
    with pytest.raises(UserError, match=r'set twice repeats the document "7"'):
        load_ir_datasets("twice")
    monkeypatch.setitem(sys.modules, "ir_datasets", None)  # as if not installed
    with pytest.raises(UserError, match=r"dataset\.id=far needs the library ir_datasets"):
        load_ir_datasets("far")
