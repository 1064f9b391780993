"""Damaged JSON and YAML files give an error of one sentence that names the file, whatever the damage."""

import copy
import json
from pathlib import Path

import numpy as np
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from rag.evaluate.datasets.files import TextRow, json_rows
from rag.evaluate.datasets.spans import load_spans
from rag.evaluate.datasets.squad import load_squad
from rag.generate.ollama import OllamaGenerator
from rag.report import compose, plots, results
from rag.retrieve.transform.parse import lines
from rag.runtime.records import parse_json, parse_yaml
from rag.types import UserError
from tests.generate.test_ollama import answer, line, said, server
from tests.report.result_folders import better, costs, save
from tests.trials import tries

DEEP = 200_000
NO_JSON = {
    "nothing": "",
    "brackets": "[" * DEEP,
    "objects": '{"a":' * DEEP,
    "closed brackets": '{"a":' + "[" * DEEP + "]" * DEEP + "}",
    "doubled name": '{"query": "a", "query": "b"}',
    "doubled inside": '{"query": "a", "x": [{"b": 1, "b": 2}]}',
    "not a number": '{"query": NaN}',
    "digits": '{"query": ' + "9" * 5000 + "}",
    "half a character": '{"query": "\\ud800"}',
    "cut off": '{"query": "a"',
}


@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_what_is_no_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert "\n" not in str(error.value)


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.text(),
        lambda x: st.lists(x) | st.dictionaries(st.text(), x),
    )
)
@tries(30, 5_000)
def test_json_is_what_it_was(value):
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value, ensure_ascii=False).encode()) == value


# --- result files


@pytest.fixture
def folder(tmp_path) -> Path:
    """Return a result folder with every file."""
    scores = {"MAP": {"1": 0.5, "2": 0.25}}
    config = {"retriever": {"_target_": "rag.x", "depth": 100}, "stop": ["a", "b"], "seed": 3}
    return save(
        tmp_path / "run", "r=x", scores, config=config, costs=costs(0.004), **better({}, np.array([0.5]))
    )


JSON_FILES = ("metrics.json", "error_breakdown.json", "tuning.json", "costs.json", "per_query.jsonl")


def read_refused(folder: Path, name: str) -> str:
    with pytest.raises(UserError) as raised:
        results.read([folder])
    sentence = str(raised.value)
    assert str(folder / name) in sentence and "\n" not in sentence and len(sentence) < 1000
    return sentence


@pytest.mark.parametrize("name", JSON_FILES)
@pytest.mark.parametrize("text", NO_JSON.values(), ids=NO_JSON)
def test_a_damaged_result_is_one_sentence(folder, name, text):
    (folder / name).write_text(text)
    read_refused(folder, name)


@pytest.mark.parametrize("name", JSON_FILES)
def test_a_result_that_cannot_be_read_is_one_sentence(folder, name):
    (folder / name).write_bytes(b"\xff\xfe{}")
    read_refused(folder, name)
    (folder / name).unlink()
    (folder / name).mkdir()
    read_refused(folder, name)


def test_a_damaged_failure_is_one_sentence(folder):
    (folder / "metrics.json").unlink()
    for text in (*NO_JSON.values(), "{}", '{"label": 1, "error": "x"}'):
        (folder / "failure.json").write_text(text)
        read_refused(folder, "failure.json")


WRONG = [None, True, -1, 10**400, float("inf"), "", "x", "\ud800", [], {}, [[]], {"a": {"b": {"c": {}}}}]


def paths_in(value: object, way: tuple = ()) -> list[tuple]:
    """Return the paths to all inner values of a JSON value."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [way] + [path for key, item in inner for path in paths_in(item, (*way, key))]


def put(value: object, way: tuple, new: object) -> object:
    """Return the value with the inner value at a path replaced; `...` removes it."""
    if not way:
        return new
    value = copy.copy(value)
    if new is ... and len(way) == 1:
        del value[way[0]]
    else:
        value[way[0]] = put(value[way[0]], way[1:], new)
    return value


@given(data=st.data())
@tries(60, 10_000)
def test_whatever_is_put_into_a_result_there_is_a_page_or_a_sentence(tmp_path_factory, data):
    tmp = tmp_path_factory.mktemp("hostile")
    folder = save(
        tmp / "a", "r=a", {"MAP": {"1": 0.5, "2": 0.2}}, costs=costs(0.004), **better({}, np.array([0.5]))
    )
    save(tmp / "b", "r=b", {"MAP": {"1": 0.4, "2": 0.3}})
    name = data.draw(st.sampled_from(JSON_FILES))
    text = (folder / name).read_text()
    value = json.loads(text.splitlines()[0] if name.endswith("l") else text)
    way = data.draw(st.sampled_from([path for path in paths_in(value) if path]))
    wrong = put(value, way, data.draw(st.sampled_from([..., *WRONG])))
    (folder / name).write_text(json.dumps(wrong).replace("Infinity", "1e999") + "\n")
    with pytest.MonkeyPatch.context() as patch:
        for figure in ("forest", "pareto", "win_loss", "error_breakdown"):
            patch.setattr(plots, figure, lambda *_, **__: bytes(24))
        sentence = ""
        try:
            compose.write(tmp / "page", compose.page(*results.read([tmp])))
        except UserError as error:
            sentence = str(error)
    assert "\n" not in sentence and len(sentence) < 1000


NO_YAML = {
    "brackets": "a: " + "[" * 100_000,
    "braces": "{a: " * 100_000,
    "indents": "\n".join(" " * i + "a:" for i in range(2_000)),
    "laughs": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "itself": "a: &a {b: *a}",
    "anchor and merge": "a: &a {b: 1}\nc:\n  <<: *a",
    "python": "a: !!python/object/apply:os.system [ls]",
    "tag": "a: !!bool maybe",
    "timestamp tag": "a: !!timestamp x",
    "date": "a: 2026-99-99",
    "digits": "a: " + "9" * 5000,
    "doubled name": "a: 1\na: 2",
    "doubled inside": "a: [{b: 1, b: 2}]",
    "name of a list": "? [a]\n: b",
    "name of a number": "1: b",
    "documents": "a: 1\n---\nb: 2",
    "control": "a: \x00",
    "open": "a: [",
    "list": "[1, 2]",
    "text": "words",
}


@pytest.mark.parametrize("text", NO_YAML.values(), ids=NO_YAML)
def test_a_damaged_configuration_is_one_sentence(folder, text):
    (folder / "config.yaml").write_text(text)
    read_refused(folder, "config.yaml")


@given(
    st.dictionaries(
        st.text(st.characters(codec="utf-8")),
        st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    )
)
@tries(50, 5_000)
def test_yaml_is_what_it_was(value):
    assert parse_yaml(yaml.safe_dump(value)) == value


# --- questions and datasets


@pytest.mark.parametrize(
    "text", [text for text in NO_JSON.values() if text], ids=[name for name in NO_JSON if name != "nothing"]
)
def test_a_damaged_dataset_is_one_sentence(tmp_path, text):
    file = tmp_path / "rows.jsonl"
    file.write_text('{"_id": "a", "text": "b"}\n' + text)
    with pytest.raises(UserError, match=r"rows\.jsonl, line 2 is not JSON"):
        list(json_rows(file, TextRow))
    file.write_text(text)
    with pytest.raises(UserError, match=r"rows\.jsonl is not JSON"):
        load_squad(file)
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wiki.md").write_text("A tide.")
    quoted = text.replace('"', '""')
    (tmp_path / "questions_df.csv").write_text(f'question,references,corpus_id\nWhat?,"{quoted}",wiki\n')
    if len(text) < 100_000:  # csv has a limit of its own
        with pytest.raises(UserError, match=r"line \d+ is not as it should be \(references: "):
            load_spans(tmp_path)
    else:
        with pytest.raises(UserError, match=r"is not valid CSV"):
            load_spans(tmp_path)


@pytest.mark.parametrize("key", ["document", "quote", "start", "end"])
@pytest.mark.parametrize(
    "wrong",
    [[1], {"a": 1}, 10**400, "[" * 300, json.loads("[" * 700 + "]" * 700)],
    ids=["list", "object", "digits", "text", "deep"],
)
def test_evidence_of_any_type_is_one_sentence(tmp_path, key, wrong):
    span = {"document": "wiki.md", "start": 0, "end": 3} | {key: wrong}
    (tmp_path / "corpora").mkdir()
    (tmp_path / "corpora" / "wiki.md").write_text("A tide.")
    row = {"_id": "q", "text": "What?", "evidence": [span]}
    (tmp_path / "questions.jsonl").write_text(json.dumps(row))
    with pytest.raises(
        UserError, match=r"evidence that is not there|line 1 is not .*\(evidence\.0\."
    ) as error:
        load_spans(tmp_path, questions="questions.jsonl")
    assert len(str(error.value)) < 500


# --- what a model or a server wrote


@given(
    st.text(st.sampled_from('[]{}",:\\ud80a1\n '))
    | st.builds(str.__mul__, st.sampled_from(["[", '["', '{"a":', "- "]), st.integers(0, 2_000))
)
@tries(100, 20_000)
def test_whatever_a_model_writes_gives_texts(raw):
    assert all(isinstance(text, str) for text in lines(raw))


def test_brackets_of_a_model_give_texts():
    assert all(isinstance(text, str) for text in lines("[" * DEEP + "]" * DEEP))


@pytest.mark.parametrize(
    "sent",
    [
        *(text.encode() + b"\n" for text in NO_JSON.values() if text),
        *map(
            line,
            ({"message": "a"}, {"message": {"content": [1]}}, {"done": 1}, {"done": True, "eval_count": "5"}),
        ),
        *map(line, ({"done": True, "eval_count": -1}, {"done": True, "eval_duration": 10**400}, "text", 3)),
        b"\xff\xfe\n",
    ],
)
def test_whatever_a_server_sends_is_one_sentence(sent):
    with server(said("a"), sent) as (url, _), pytest.raises(UserError, match=r"protocol") as error:
        answer(url)
    assert "\n" not in str(error.value) and len(str(error.value)) < 500


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{", b"[" * DEEP, b'{"error": {"a": 1}}', b'{"models": [{"name": []}]}']
)
def test_whatever_a_server_sends_instead_of_its_models_is_one_sentence(body, monkeypatch):
    monkeypatch.setattr("tests.generate.test_ollama.line", lambda _: body)
    with server() as (url, _), pytest.raises(UserError, match=r"protocol|has no model"):
        _ = OllamaGenerator(url=url).fingerprint
    with server(body or b" ", status=500) as (url, _), pytest.raises(UserError, match=r"HTTP status 500"):
        answer(url)
