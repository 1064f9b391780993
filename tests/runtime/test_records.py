"""JSON that does not fit its schema gives an error of one sentence with the position."""

import pytest
from pydantic import Field

from rag.runtime.records import OpenRecord, Record, parse_json, read_json, read_record
from rag.types import UserError


class Inner(Record):
    size: int


class Outer(Record):
    name: str
    inner: list[Inner] = Field(default_factory=list)


class Open(OpenRecord):
    name: str


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("", "Expecting value"),
        ("{", "Expecting property name"),
        ("NaN", "NaN is no number"),
        ("[-Infinity]", "-Infinity is no number"),
        ('{"a": {"b": 1, "c": 2, "b": 1}}', "'b' occurs twice"),
        ("[" * 200_000, "nested too deep"),
        ('{"a":' * 200_000, "nested too deep"),
    ],
)
def test_what_is_no_json(tmp_path, text, reason):
    with pytest.raises(ValueError, match=reason):
        parse_json(text)
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=rf"file\.json is not JSON \(.*{reason}.*\): write it again\.$"):
        read_json(path, "write it again")


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("{}", "it has no 'name'"),
        ('{"name": 3}', "name: input should be a valid string"),
        (
            '{"name": "a", "inner": [{"size": 1}, {"size": 1.5}]}',
            "inner.1.size: input should be a valid integer",
        ),
        ('{"name": "a", "inner": [{"size": true}]}', "inner.0.size: input should be a valid integer"),
        ('{"name": "a", "inner": [{}]}', "it has no 'inner.0.size'"),
        ('{"name": "a", "more": 1}', "it has 'more', which is unknown"),
    ],
)
def test_what_does_not_fit_the_schema(tmp_path, text, reason):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(UserError, match=r"file\.json is not as it should be") as error:
        read_record(path, Outer, "write it again")
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


def test_what_fits(tmp_path):
    path = tmp_path / "file.json"
    path.write_text('{"name": "a", "inner": [{"size": 1}]}')
    assert read_record(path, Outer, "") == Outer(name="a", inner=[Inner(size=1)])
    path.write_text('{"name": "a", "more": [1]}')
    assert read_record(path, Open, "").model_extra == {"more": [1]}


def test_other_files(tmp_path):
    with pytest.raises(FileNotFoundError):
        read_json(tmp_path / "nowhere", "write it again")
    with pytest.raises(UserError, match=r"Cannot read .*Is a directory.*: write it again\."):
        read_json(tmp_path, "write it again")
    (tmp_path / "list").write_text("[1]")
    with pytest.raises(UserError, match="list holds no JSON object: write it again"):
        read_json(tmp_path / "list", "write it again")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(UserError, match="bytes is not JSON"):
        read_json(tmp_path / "bytes", "write it again")


def test_a_name_that_occurs_twice_is_found_in_linear_time():
    """A list of names that is searched for each of them took 36 s for 60,000."""
    text = "{" + ",".join(f'"{i}": 0' for i in range(200_000)) + ', "199999": 1}'
    with pytest.raises(ValueError, match="'199999' occurs twice"):
        parse_json(text)
