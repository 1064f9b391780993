"""Evaluation sets are checked on load: every fault is named with its file, line and id."""

import dataclasses
import json

import pytest

from rag.evaluate.datasets.beir import load_beir
from rag.evaluate.datasets.questions import Evidence
from rag.evaluate.datasets.sample import load_sample
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


def test_faults_that_change_no_figure_are_listed_as_problems(write):
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


def test_a_query_without_a_relevant_document_is_evaluated_and_listed_as_a_problem(write):
    dataset = load_beir(write(qrels=["q1\td1\t0", "q1\td2\t-1", "q2\td2\t1"]))
    assert dataset.qrels["q1"] == {"d1": 0, "d2": -1}
    assert "no relevant document for q1" in dataset.problems[0]


def test_judgements_of_unknown_ids_are_errors_or_left_out_without_strict(write):
    path = write(qrels=[*QRELS, "q2\tgone\t1", "nobody\td1\t1"])
    both = r'document "gone" \(line 5\), query "nobody" \(line 6\)'
    with pytest.raises(UserError, match=both):
        load_beir(path)
    dataset = load_beir(path, strict=False)
    assert dataset.qrels == {"q1": {"d1": 2, "d2": 0}, "q2": {"d2": 1}}
    assert len(dataset.problems) == 1
    assert "left out" in dataset.problems[0]


def test_a_long_list_of_faults_is_shortened(write):
    path = write(qrels=[*QRELS, *(f"q1\tgone{i}\t1" for i in range(9))])
    with pytest.raises(UserError, match=r'"gone4" \(line 9\) and 4 more') as error:
        load_beir(path)
    assert "gone5" not in str(error.value)


def test_queries_that_are_documents_do_not_find_themselves(write):
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


def test_one_query_that_ends_like_the_document_of_its_id_is_no_document(write):
    """Otherwise the document that answers would be taken from every query, and every measure be 0."""
    end = {"_id": "d1", "text": "twice."}
    relevant = load_beir(write(queries=[end, QUERIES[1]], qrels=["d1\td1\t1", "q2\td2\t1"]))
    assert not relevant.drop_self_hits  # it is judged to answer
    part_of_a_word = {"_id": "d1", "text": "ice."}
    assert not load_beir(
        write(queries=[part_of_a_word, QUERIES[1]], qrels=["d1\td2\t1", "q2\td2\t1"])
    ).drop_self_hits
    other = {"_id": "d2", "text": "Where do gulls sleep?"}
    one_of_two = load_beir(write(queries=[end, other], qrels=["d1\td2\t1", "d2\td1\t1"]))
    assert not one_of_two.drop_self_hits and not one_of_two.problems


@pytest.mark.parametrize("grade", ["10001", "-10001", "4294967296", "9" * 18])
def test_grades_that_trec_eval_cannot_count_are_errors(write, grade):
    with pytest.raises(UserError, match="use grades up to 10,000"):
        load_beir(write(qrels=[f"q1\td1\t{grade}", "q2\td2\t1"]))


@pytest.mark.parametrize("grade", ["1_0", "٣", "1.0", "9" * 19, ""])
def test_a_grade_that_is_no_integer_is_an_error(write, grade):
    with pytest.raises(UserError, match="qrels"):
        load_beir(write(qrels=[f"q1\td1\t{grade}", "q2\td2\t1"]))


def test_an_id_that_trec_eval_would_cut_is_an_error(write):
    cut = {"_id": "q\0b", "text": "What turns?"}
    with pytest.raises(UserError, match=r"has U\+0000 in the id 'q\\x00b'"):
        load_beir(write(queries=[cut, *QUERIES]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"corpus": [*CORPUS, CORPUS[0]]}, r'corpus\.jsonl, line 4 repeats the id "d1" of line 1'),
        ({"queries": [QUERIES[0], *QUERIES]}, r'queries\.jsonl, line 2 repeats the id "q1" of line 1'),
        ({"corpus": [CORPUS[0], "{broken"]}, r"corpus\.jsonl, line 2 is not JSON"),
        ({"corpus": ["[1]"]}, r"corpus\.jsonl, line 1 holds no JSON object"),
        (
            {"corpus": [{"_id": 1, "text": "x"}]},
            r"corpus\.jsonl, line 1 .*\(_id: input should be a valid string",
        ),
        ({"corpus": [{"_id": "d1"}]}, r"corpus\.jsonl, line 1 .*\(it has no 'text'"),
        ({"corpus": [{"_id": " ", "text": "x"}]}, r"corpus\.jsonl, line 1 .*\(_id: it is empty"),
        (
            {"corpus": [{"_id": "d1", "text": "x", "title": 3}]},
            r"corpus\.jsonl, line 1 .*\(title: input should be",
        ),
        ({"corpus": []}, r"corpus\.jsonl is empty"),
        ({"queries": [{"_id": "q1", "text": " "}]}, r"queries\.jsonl, line 1 .*\(text: it is empty"),
        (
            {"queries": [{**QUERIES[0], "answers": "tide"}]},
            r"queries\.jsonl, line 1 .*\(answers: input should be a valid list",
        ),
        ({"queries": [{**QUERIES[0], "answers": [1]}]}, r"queries\.jsonl, line 1 .*\(answers\.0: input"),
        (
            {"queries": [{**QUERIES[0], "answers": ["x", " "]}]},
            r"line 1 .*\(answers\.1: it is empty",
        ),
        (
            {"queries": [{**QUERIES[0], "evidence": "d1"}]},
            r"line 1 .*\(evidence: input should be a valid list",
        ),
        ({"queries": [{**QUERIES[0], "evidence": [3]}]}, r"\(evidence\.0: input should be a JSON object"),
        (
            {"queries": [{**QUERIES[0], "evidence": [{"quote": "tide"}]}]},
            r"it has no 'evidence\.0\.document'",
        ),
        (
            {"queries": [{**QUERIES[0], "evidence": [{"document": "d1", "start": False, "end": 3}]}]},
            r"\(evidence\.0\.start: input should be a valid integer",
        ),
        (
            {"queries": [*QUERIES[:2], {**QUERIES[2], "evidence": [{"document": "d1", "quote": "tide"}]}]},
            r'line 3: query "q3" is flagged unanswerable but has evidence',
        ),
        ({"queries": [{**QUERIES[0], "answerable": "no"}]}, r"queries\.jsonl, line 1 .*\(answerable: input"),
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
def test_a_malformed_row_is_an_error_with_file_line_and_id(write, change, message):
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


# --- evidence, samples, fingerprints


def with_evidence(*items):
    return [{**QUERIES[0], "evidence": list(items)}, *QUERIES[1:]]


def test_evidence_is_found_in_the_text_as_loaded(write):
    items = [
        {"document": "d1", "quote": "tide turns"},
        {"document": "d1", "start": 0, "end": 5},
        {"document": "d2", "quote": "Ice", "start": 0, "end": 3},
        {"document": "d1", "quote": "Tides"},  # the second span again
    ]
    dataset = load_beir(write(queries=with_evidence(*items)))
    assert dataset.evidence == {"q1": (Evidence("d1", 10, 20), Evidence("d1", 0, 5), Evidence("d2", 0, 3))}
    assert dataset.corpus[0].text[10:20] == "tide turns"
    [problem] = dataset.problems
    assert "does not judge the evidence of q1 relevant" in problem  # d2 has grade 0


def test_a_quote_from_a_file_is_found_after_cleaning(write):
    quote = "caf\u0065\u0301\u00a0noir"
    path = write(
        queries=with_evidence({"document": "a.txt", "quote": quote}), qrels=["q1\ta.txt\t1", "q2\ta.txt\t1"]
    )
    (path / "corpus.jsonl").unlink()
    (path / "documents").mkdir()
    (path / "documents" / "a.txt").write_text(f"One\r\n{quote} two", encoding="utf-8", newline="")
    [span] = load_beir(path).evidence["q1"]
    assert load_beir(path).corpus[0].text[span.start : span.end] == "caf\u00e9 noir"


@pytest.mark.parametrize(
    ("item", "message"),
    [
        ({"document": "d9", "quote": "tide"}, r'the unknown document "d9" \(line 1, query "q1"\)'),
        ({"document": "d1", "quote": "moon"}, r'"moon", which does not occur once in document "d1"'),
        ({"document": "d1", "quote": "t"}, r'"t", which does not occur once in document "d1"'),
        ({"document": "d1", "quote": " "}, r'an empty quote of document "d1"'),
        ({"document": "d1"}, r"the span None to None of the 27 characters"),
        ({"document": "d1", "start": 5, "end": 5}, r"the span 5 to 5 of the 27 characters"),
        ({"document": "d1", "start": 0, "end": 28}, r"the span 0 to 28 of the 27 characters"),
        ({"document": "d1", "start": -1, "end": 3}, r"the span -1 to 3 of the 27 characters"),
        ({"document": "d1", "start": 0, "end": 4, "quote": "Ice"}, r"not the text from 0 to 4 of"),
    ],
)
def test_evidence_that_is_not_in_its_document_is_an_error_or_left_out_without_strict(write, item, message):
    path = write(queries=with_evidence(item, {"document": "d1", "quote": "twice"}))
    with pytest.raises(UserError, match=r"queries\.jsonl gives evidence that is not there: .*" + message):
        load_beir(path)
    dataset = load_beir(path, strict=False)
    assert dataset.evidence == {"q1": (Evidence("d1", 21, 26),)}
    assert len(dataset.problems) == 1
    assert "left out" in dataset.problems[0]


def many(count):
    queries = [{"_id": f"q{i}", "text": f"Question {i}?", "answers": [f"{i}"]} for i in range(count)]
    queries += [{"_id": f"u{i}", "text": f"Unknown {i}?", "answerable": False} for i in range(count // 5)]
    return queries, [f"q{i}\td1\t1" for i in range(count)]


def test_a_sample_does_not_depend_on_the_order_of_the_queries(write):
    queries, qrels = many(40)
    whole = load_beir(write(queries=queries, qrels=qrels))
    sample = whole.sample(10, seed=3)
    assert len(sample.queries) == len(sample.qrels) == 10
    assert sample.corpus == whole.corpus
    assert (sample.limit, sample.seed, whole.limit) == (10, 3, None)
    assert [q for q in whole.queries if q in sample.queries] == list(sample.queries)  # in file order
    assert len(sample.unanswerable_queries) == len(sample.unanswerable) == 2  # a quarter of 8
    assert sample.unjudged == sample.unanswerable_queries
    assert sample.answers.keys() == sample.queries.keys()
    turned = load_beir(write(queries=queries[::-1], qrels=qrels[::-1]), limit=10, seed=3)
    assert turned.queries == sample.queries
    assert turned.unanswerable == sample.unanswerable
    assert whole.sample(10, seed=4).queries != sample.queries
    assert sample.queries.items() <= whole.sample(11, seed=3).queries.items()
    assert whole.sample(40) is whole.sample(None) is whole


@pytest.mark.parametrize("limit", [0, -1, True])
def test_a_sample_of_no_query_is_an_error(write, limit):
    with pytest.raises(UserError, match=rf"limit={str(limit).lower()} "):
        load_beir(write(), limit=limit)


def test_every_query_is_drawn_about_as_often(write):
    queries, qrels = many(10)
    whole = load_beir(write(queries=queries, qrels=qrels))
    drawn = [query for seed in range(300) for query in whole.sample(3, seed).queries]
    counts = {query: drawn.count(query) for query in whole.queries}
    assert all(60 <= count <= 120 for count in counts.values()), counts  # 90 expected, deviation 8


def test_the_fingerprint_depends_on_contents_not_on_paths(write, tmp_path_factory):
    fingerprint = load_beir(write()).fingerprint
    assert len(fingerprint) == 64
    elsewhere = tmp_path_factory.mktemp("other")
    for file in ("corpus.jsonl", "queries.jsonl"):
        (elsewhere / file).write_bytes((write() / file).read_bytes())
    (elsewhere / "qrels").mkdir()
    (elsewhere / "qrels" / "dev.tsv").write_bytes((write() / "qrels" / "test.tsv").read_bytes())
    assert load_beir(elsewhere, "dev").fingerprint == fingerprint
    changes = [
        {"corpus": [*CORPUS[:2], {"_id": "d3", "text": "Wind is air!"}]},
        {"corpus": CORPUS[::-1]},
        {"queries": [{**QUERIES[0], "text": "What?"}, *QUERIES[1:]]},
        {"queries": [{**QUERIES[0], "answers": ["tide"]}, *QUERIES[1:]]},
        {"queries": with_evidence({"document": "d1", "quote": "tide"})},
        {"queries": [*QUERIES[:2], {**QUERIES[2], "text": "Who knows it?"}]},
        {"qrels": [*QRELS[:2], "q2\td2\t2"]},
    ]
    changed = [load_beir(write(**change)).fingerprint for change in changes]
    assert len({fingerprint, *changed}) == len(changes) + 1
    assert load_beir(write()).sample(1).fingerprint != fingerprint


def test_the_sample_set_needs_no_path():
    dataset = load_sample()
    assert (len(dataset.corpus), len(dataset.queries), len(dataset.unanswerable_queries)) == (34, 90, 10)
    assert len(load_sample(limit=9).queries) == 9
