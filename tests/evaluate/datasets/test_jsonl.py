"""JSON lines of questions with their contexts become a checked Dataset."""

import json

import pytest

from rag.evaluate.datasets.jsonl import load_jsonl
from rag.types import UserError


def write(tmp_path, *rows) -> str:
    file = tmp_path / "some.jsonl"
    file.write_text(
        "".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows), encoding="utf-8"
    )
    return str(file)


ROW = {"question": "What eats fish?", "context": "A seal eats fish.", "answers": ["A seal"]}


def test_json_lines_are_a_dataset(tmp_path):
    other = {"id": "x", "question": "Who sings?", "context": ROW["context"], "answers": [], "source": "ours"}
    third = ROW | {
        "question": "What flies?",
        "context": "A gull flies.",
        "answers": ["gull", "A gull"],
        "title": "Gulls",
    }
    data = load_jsonl(write(tmp_path, ROW, "", other, third))
    assert data.name == "some" and data.queries == {"1": "What eats fish?", "4": "What flies?"}
    assert [(d.text, d.title) for d in data.corpus] == [("A seal eats fish.", ""), ("A gull flies.", "Gulls")]
    assert data.qrels == {"1": {data.corpus[0].id: 1}, "4": {data.corpus[1].id: 1}}
    assert data.answers == {"1": ("A seal",), "4": ("gull", "A gull")}
    assert data.unanswerable_queries == {"x": "Who sings?"}
    assert len(load_jsonl(write(tmp_path, ROW, third), limit=1).queries) == 1


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (["{"], r"line 1 is not JSON"),
        ([ROW, {"question": "Who?", "answers": []}], r"line 2 .*\(it has no 'context'"),
        ([ROW | {"answers": [" "]}], r"line 1 .*answers\.0: it is empty"),
        ([ROW | {"answers": "A seal"}], r"line 1 .*answers: input should be a valid list"),
        ([ROW | {"id": "a"}, ROW | {"id": "a"}], r'repeats the question id "a"'),
        ([ROW | {"answers": []}], "has no question with an answer"),
        ([], "has no question with an answer"),
    ],
)
def test_a_fault_in_json_lines_is_one_sentence(tmp_path, rows, message):
    with pytest.raises(UserError, match=message):
        load_jsonl(write(tmp_path, *rows))


def test_a_missing_file_is_one_sentence(tmp_path):
    with pytest.raises(UserError, match=r"none\.jsonl cannot be read"):
        load_jsonl(tmp_path / "none.jsonl")
