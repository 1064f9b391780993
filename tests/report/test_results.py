"""Result folders that are malformed, of an earlier version or missing are refused by name."""

import pytest

from rag.report import results
from rag.types import UserError
from tests.report.result_folders import save


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("metrics.json", "", r"metrics\.json is not JSON"),
        ("metrics.json", "{", r"metrics\.json is not JSON"),
        ("metrics.json", "[1]", r"metrics\.json holds no JSON object"),
        ("metrics.json", '{"label": "x"}', r"metrics\.json is not as it should be \(it has no 'dataset'\)"),
        ("per_query.jsonl", "", r"per_query\.jsonl is empty"),
        ("per_query.jsonl", "{}\n", r"per_query\.jsonl, line 1 .*no 'query'"),
        (
            "per_query.jsonl",
            '{"query": "a", "MAP": 1}\n{"query": "a", "MAP": 1}',
            r"line 2 gives query 'a' a second",
        ),
        ("per_query.jsonl", '{"query": "a", "MAP": NaN}', r"line 1 is not JSON \(NaN is no number\)"),
        (
            "per_query.jsonl",
            '{"query": "a", "MAP": "1"}',
            r"line 1 is not as it should be \(MAP: input should be a valid num",
        ),
        (
            "per_query.jsonl",
            '{"query": "a", "MAP": true}',
            r"line 1 is not as it should be \(MAP: input should be a valid num",
        ),
        ("per_query.jsonl", '{"query": "a"}', r"per_query\.jsonl names no measure"),
        ("config.yaml", "a: [", r"config\.yaml is not YAML"),
        ("config.yaml", "words", r"config\.yaml holds no settings"),
        ("costs.json", "{}", r"costs\.json is not as it should be \(it has no 'stages'\)"),
        ("error_breakdown.json", '{"measure": 3}', r"error_breakdown\.json is not as it should be"),
        ("tuning.json", '{"family": "x"}', r"tuning\.json is not as it should be"),
    ],
)
def test_a_malformed_file_is_one_sentence_naming_it(tmp_path, name, content, sentence):
    folder = save(tmp_path / "run", "x", {"MAP": {"1": 0.5}})
    (folder / name).write_text(content)
    with pytest.raises(UserError, match=sentence) as raised:
        results.read([tmp_path])
    assert str(folder / name) in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("name", ["ledger.json", "losses.json"])
def test_a_result_of_an_earlier_version_is_one_sentence(tmp_path, name):
    folder = save(tmp_path / "run", "x", {"MAP": {"1": 0.5}})
    (folder / name).write_text("{}")
    with pytest.raises(
        UserError, match=f"{folder / name} was written by an earlier version: run that evaluation"
    ):
        results.read([tmp_path])


def test_a_path_without_results_is_named(tmp_path):
    with pytest.raises(UserError, match=f"No metrics.json and no failure.json is below {tmp_path}"):
        results.read([tmp_path])
    with pytest.raises(UserError, match=f"There is no {tmp_path}/x"):
        results.read([tmp_path / "x"])
    save(tmp_path / "run", "x", {"MAP": {"1": 0.5}})
    (tmp_path / "run" / "per_query.jsonl").unlink()
    with pytest.raises(UserError, match=r"Cannot read .*per_query\.jsonl"):
        results.read([tmp_path])
