"""Evaluation sets are checked on load: every fault is named with its file, line and id."""

import dataclasses
import json

import pytest

from rag.evaluate.datasets import load_beir
from rag.types import Document, UserError

CORPUS = [
    {"_id": "d1", "title": "Tides", "text": "The tide turns twice."},
    {"_id": "d2", "title": "", "text": "Ice floats.", "metadata": {"url": "x"}},
    {"_id": "d3", "text": "Wind is air."},
]
QUERIES = [
    {"_id": "q1", "text": "What turns twice?", "answers": ["The tide", "tide"]},
    {"_id": "q2", "text": "What floats?", "metadata": {"answers": ["Ice"]}},
    {"_id": "q3", "text": "Who knows?", "answerable": False},
]
QRELS = ["q1\td1\t2", "q1\td2\t0", "q2\td2\t1"]
HEADER = "query-id\tcorpus-id\tscore"


def jsonl(rows) -> str:
    return "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows)


@pytest.fixture
def write(tmp_path):
    def write(corpus=CORPUS, queries=QUERIES, qrels=QRELS, header=HEADER, split="test"):
        (tmp_path / "qrels").mkdir(exist_ok=True)
        (tmp_path / "corpus.jsonl").write_text(jsonl(corpus), encoding="utf-8")
        (tmp_path / "queries.jsonl").write_text(jsonl(queries), encoding="utf-8")
        (tmp_path / "qrels" / f"{split}.tsv").write_text("\n".join([header, *qrels]) + "\n", encoding="utf-8")
        return tmp_path

    return write


def test_a_beir_folder(write):
    path = write()
    dataset = load_beir(path)
    assert dataset.name == path.name
    assert dataset.corpus == (
        Document(id="d1", path="d1", text="Tides The tide turns twice.", title="Tides"),
        Document(id="d2", path="d2", text="Ice floats.", title=""),
        Document(id="d3", path="d3", text="Wind is air.", title=""),
    )
    assert dataset.queries == {"q1": "What turns twice?", "q2": "What floats?"}
    assert dataset.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert dataset.answers == {"q1": ("The tide", "tide"), "q2": ("Ice",)}
    assert dataset.unjudged == {"q3": "Who knows?"}
    assert dataset.unanswerable == {"q3"}
    assert not dataset.drop_self_hits
    assert dataset.problems == ()
    with pytest.raises(dataclasses.FrozenInstanceError):
        dataset.name = "other"


def test_a_folder_of_files_may_be_the_corpus(write):
    path = write(qrels=["q1\ttides.md\t1", "q2\tice/ice.txt\t1"])
    (path / "corpus.jsonl").unlink()
    (path / "documents" / "ice").mkdir(parents=True)
    (path / "documents" / "tides.md").write_text("# Tides\n\nThe tide turns twice.\n")
    (path / "documents" / "ice" / "ice.txt").write_text("Ice floats.\n")
    (path / "documents" / "noise.bin").write_bytes(b"\0\1")
    dataset = load_beir(path)
    assert {document.id: document.text for document in dataset.corpus} == {
        "ice/ice.txt": "Ice floats.",
        "tides.md": "# Tides\n\nThe tide turns twice.",
    }
    assert len(dataset.problems) == 1
    assert "noise.bin is left out" in dataset.problems[0]


def test_other_splits_blank_lines_and_a_byte_order_mark(write):
    path = write(
        split="dev", queries=["\ufeff" + json.dumps(QUERIES[0]), "", QUERIES[1]], qrels=[*QRELS, "", ""]
    )
    assert list(load_beir(path, "dev").queries) == ["q1", "q2"]
    with pytest.raises(UserError, match=r"test\.tsv is missing.*\(dev\)"):
        load_beir(path)


def test_text_of_any_script_survives(write):
    odd = "Ein Tidenhub \u2028 von 1,3 m 🌊 \u00a0 \\n \x85 end"
    path = write(
        corpus=[{"_id": "d1", "text": odd}, *CORPUS[1:]], queries=[{"_id": "q1", "text": odd}, *QUERIES[1:]]
    )
    dataset = load_beir(path)
    assert dataset.corpus[0].text == odd
    assert dataset.queries["q1"] == odd


def test_what_is_odd_but_tolerable_is_listed(write):
    corpus = [
        *CORPUS,
        {"_id": "e1", "title": "", "text": ""},
        {"_id": "e2", "text": " \n"},
        {"_id": "r1", "title": "Tides", "text": "The tide turns twice."},
    ]
    dataset = load_beir(write(corpus=corpus, qrels=[*QRELS, "q2\td2\t1"], queries=QUERIES))
    assert [problem.split(" ", 1)[1] for problem in dataset.problems] == [
        "has no text for e1, e2.",
        "repeats the text of an earlier document in r1.",
        "repeats earlier judgements in line 5.",
    ]
    assert len(dataset.corpus) == 6


def test_a_query_with_irrelevant_judgements_only_stays_and_is_listed(write):
    dataset = load_beir(write(qrels=["q1\td1\t0", "q1\td2\t-1", "q2\td2\t1"]))
    assert dataset.qrels["q1"] == {"d1": 0, "d2": -1}
    assert "no relevant document for q1" in dataset.problems[0]


def test_judgements_of_unknown_ids_are_errors_or_with_strict_off_left_out(write):
    path = write(qrels=[*QRELS, "q2\tgone\t1", "nobody\td1\t1"])
    both = r'document "gone" \(line 5\), query "nobody" \(line 6\)'
    with pytest.raises(UserError, match=both):
        load_beir(path)
    dataset = load_beir(path, strict=False)
    assert dataset.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert len(dataset.problems) == 1
    assert "left out" in dataset.problems[0]


def test_long_lists_of_faults_are_cut(write):
    path = write(qrels=[*QRELS, *(f"q1\tgone{i}\t1" for i in range(9))])
    with pytest.raises(UserError, match=r'"gone4" \(line 9\) and 4 more') as error:
        load_beir(path)
    assert "gone5" not in str(error.value)


def test_queries_that_are_documents_make_self_hits(write):
    own = {
        "_id": "d1",
        "text": "the  tide TURNS twice.",
    }  # ArguAna's queries are documents without their title
    dataset = load_beir(write(queries=[own, QUERIES[1]], qrels=["d1\td2\t1", "q2\td2\t1"]))
    assert dataset.drop_self_hits
    chance = {
        "_id": "d1",
        "text": "What turns twice?",
    }  # Cranfield's queries and documents are both numbered from 1
    assert not load_beir(write(queries=[chance, QUERIES[1]], qrels=["d1\td2\t1", "q2\td2\t1"])).drop_self_hits


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": [*CORPUS, CORPUS[0]]}, r'corpus\.jsonl, line 4 repeats the id "d1" of line 1'),
        ({"queries": [QUERIES[0], *QUERIES]}, r'queries\.jsonl, line 2 repeats the id "q1" of line 1'),
        ({"corpus": [CORPUS[0], "{broken"]}, r"corpus\.jsonl, line 2 is not valid JSON"),
        ({"corpus": ["[1]"]}, r'corpus\.jsonl, line 1 has no strings "_id" and "text"'),
        ({"corpus": [{"_id": 1, "text": "x"}]}, r'corpus\.jsonl, line 1 has no strings "_id" and "text"'),
        ({"corpus": [{"_id": "d1"}]}, r'corpus\.jsonl, line 1 has no strings "_id" and "text"'),
        ({"corpus": [{"_id": " ", "text": "x"}]}, r'corpus\.jsonl, line 1 has an empty "_id"'),
        ({"corpus": [{"_id": "d1", "text": "x", "title": 3}]}, r'corpus\.jsonl, line 1: "title" must be'),
        ({"corpus": []}, r"corpus\.jsonl is empty"),
        ({"queries": [{"_id": "q1", "text": " "}]}, r'queries\.jsonl, line 1: the query "q1" is empty'),
        (
            {"queries": [{**QUERIES[0], "answers": "tide"}]},
            r'queries\.jsonl, line 1: "answers" must be a list',
        ),
        ({"queries": [{**QUERIES[0], "answers": [1]}]}, r'queries\.jsonl, line 1: "answers" must be a list'),
        ({"queries": [{**QUERIES[0], "answerable": "no"}]}, r'queries\.jsonl, line 1: "answerable" must be'),
        (
            {"queries": [{**QUERIES[0], "answerable": False}]},
            r'"q1" of .* is flagged unanswerable but judged',
        ),
        ({"header": "q1\td1\t1"}, r"test\.tsv must begin with the line query-id corpus-id score"),
        ({"qrels": ["q1 d1 1"]}, r"test\.tsv, line 2 is not query id, tab"),
        ({"qrels": ["q1\t0\td1\t1"]}, r"test\.tsv, line 2 is not query id, tab"),
        ({"qrels": ["q1\t\t1"]}, r"test\.tsv, line 2 is not query id, tab"),
        ({"qrels": [*QRELS, "q1\td1\t0.5"]}, r'test\.tsv, line 5: score "0\.5" is not an integer'),
        ({"qrels": [*QRELS, "q1\td1\t1"]}, r'test\.tsv, line 5 grades "d1" 1 after 2'),
        ({"qrels": []}, r"test\.tsv judges no query"),
    ],
)
def test_what_would_make_figures_wrong_is_an_error_with_file_line_and_id(write, change, message):
    queries = change.get("queries", QUERIES)
    if any(isinstance(row, dict) and len(queries) == 1 for row in queries):
        change = {"qrels": ["q1\td1\t1"], **change}
    path = write(**change)
    with pytest.raises(UserError, match=message) as error:
        load_beir(path)
    assert str(path) in str(error.value)


def test_missing_and_unreadable_files_are_named(write, tmp_path):
    with pytest.raises(UserError, match=r"There is no folder .*nowhere"):
        load_beir(tmp_path / "nowhere")
    path = write()
    (path / "queries.jsonl").write_bytes(b'{"_id": "q1", "text": "\xff"}\n')
    with pytest.raises(UserError, match=r"queries\.jsonl is not valid UTF-8"):
        load_beir(path)
    (path / "queries.jsonl").unlink()
    with pytest.raises(UserError, match=r"queries\.jsonl cannot be read"):
        load_beir(path)
    (path / "corpus.jsonl").unlink()
    with pytest.raises(UserError, match=r"neither corpus\.jsonl nor documents/"):
        load_beir(path)
