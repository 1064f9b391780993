"""rag/bench/tables.py: every table of figures is what the records of results/bench make."""

import copy
import json
import shutil
from pathlib import Path

import pytest
import tables as script

from rag.bench import page, tables
from rag.bench.record import bench_json, read_records
from rag.bench.tables import NARROW, README_CASES, comparison, generated, narrow_table, readme_table
from rag.bench.timing import Row
from rag.runtime.machine.measurement import Spread
from rag.types import UserError

RECORDS = {path.stem: read_records(path) for path in sorted((script.ROOT / tables.RESULTS).glob("*.jsonl"))}


def test_each_file_has_the_tables_of_its_records():
    for path, text in generated(script.ROOT).items():
        assert path.read_text(encoding="utf-8") == text, f"{path}: run python scripts/tables.py"


def test_tables_are_at_most_six_columns_wide():
    lines = [line for name in NARROW for line in narrow_table(name, RECORDS).splitlines()]
    lines += readme_table(RECORDS).splitlines()
    assert max(line.count(" | ") + 1 for line in lines if line.startswith("|")) <= 6
    assert len(README_CASES) <= 14


ROW = Row(
    "int8",
    {
        "ms": Spread(2.0, 1.0, 3.0),
        "GB/s read, % of peak": 40.0,
        "int8 GOP/s, % of peak": Spread(62.5, 60.0, 70.0),
    },
    {
        "slow": {"ms": 8.0},
        "fast": {"ms": Spread(3.0, 2.0, 4.0)},
        "exact": {"ms": 1.0},
        "ours, in lax": {"ms": 1.0},
    },
    {"slow": 4.0, "fast": 1.5, "exact": 0.5, "ours, in lax": 0.5},
)


def test_a_case_is_compared_with_its_best_peer_and_its_nearest_peak():
    assert comparison(ROW, "ms", "") == ["2 [1, 3]", "3 fast", "1.5", "62% of int8"]
    assert comparison(Row("alone", {"ms": 2000.0}), "ms", "") == ["2,000", "-", "-", "-"]


def test_the_ratio_of_a_figure_is_found_by_its_name():
    row = Row("a", {"ms": 1.0}, {"x": {"ms": 2.0}, "y": {"ms": 3.0}}, {"x, first": 2.0, "y, first": 3.0})
    assert comparison(row, "ms", ", first") == ["1", "2 x", "2", "-"]


def on_another_machine(records: dict) -> dict:
    """Return the records with copies from a machine without AMX, on which every ratio is 9.99."""
    found = copy.deepcopy(records)
    for some in found.values():
        other = copy.deepcopy(some[-1])
        other["machine"] |= {"cpu": "AMD EPYC 9000", "cpu_flags": ["avx512f"]}
        for row in other["rows"]:
            row["ratio"] = dict.fromkeys(row["ratio"], 9.99)
        some.insert(0, other)
    return found


def test_a_second_kind_of_machine_gets_its_own_tables_and_a_column_in_readme():
    records = on_another_machine(RECORDS)
    both = narrow_table("search", records)
    assert both.count("| ours, ms |") == 2
    assert "2 cores of AMD EPYC 9000. [" in both and "2 cores of Intel Xeon with AMX. [" in both
    records = {name: [*some[1:], some[0]] for name, some in records.items()}  # the first kind comes first
    header, _, *lines = readme_table(records).splitlines()[2:]
    assert header.endswith("| share of peak | ratio, 2 cores of AMD EPYC 9000 |")
    assert len(lines) == len(README_CASES) and all(line.endswith("| 9.99 |") for line in lines)
    del records["search"][-1]  # the other machine's only record
    assert [line.endswith("| - |") for line in readme_table(records).splitlines()[4:]].count(True) == 2


def test_readme_takes_the_latest_record_that_has_the_case():
    records = copy.deepcopy(RECORDS)
    latest = copy.deepcopy(records["attention"][-1])
    latest["rows"] = [row for row in latest["rows"] if "backward" in row["case"]]
    latest["rows"][0] |= {
        "case": "B1 H9 K3 D64 T=2048 forward+backward",
        "ratio": {"torch": 7.77, "jax.nn": 8},
    }
    records["attention"].append(latest)
    before, after = (readme_table(some).splitlines() for some in (RECORDS, records))
    changed = [new for old, new in zip(before, after, strict=True) if old != new]
    assert len(changed) == 1 and "with backward" in changed[0] and "| 7.77 |" in changed[0]


def test_old_records_are_read_in_todays_words(tmp_path):
    row = Row("decode of answers, int8, drafting", {"bfloat16 GFLOP/s": 1.0, "GFLOP/s": 2.0})
    record = json.loads(
        bench_json("reading", [row], {}, command="python scripts/bench.py bench=reading bench.path=X")
    )
    for day, left in (
        ("2026-11-21", ["float32 GFLOP/s"]),
        ("2026-11-26", ["bfloat16 GFLOP/s", "float32 GFLOP/s"]),
    ):
        record["machine"]["date"] = day
        (tmp_path / "a.jsonl").write_text(json.dumps(record) + "\n")
        [found] = read_records(tmp_path / "a.jsonl")
        assert found["command"] == "python scripts/bench.py bench=question_answering bench.questions.path=X"
        assert found["rows"][0]["case"] == "decode of answers, int8, speculative"
        assert list(found["rows"][0]["ours"]) == left


@pytest.fixture
def copied(tmp_path) -> Path:
    """A folder with the repository's records and the documents that show them."""
    for path in (tables.RESULTS, tables.PERFORMANCE.parent):
        (tmp_path / path).mkdir(parents=True)
    for path in [tables.PERFORMANCE, tables.README, *(tables.RESULTS / f"{name}.jsonl" for name in RECORDS)]:
        shutil.copy(script.ROOT / path, tmp_path / path)
    return tmp_path


def test_tables_are_written_once(copied, monkeypatch, capsys):
    monkeypatch.setattr(script, "ROOT", copied)
    readme = copied / tables.README
    text = readme.read_text(encoding="utf-8")
    readme.write_text(text.replace("<!-- figures -->", "<!-- figures -->\nold figures"), encoding="utf-8")
    assert script.main() == 0
    assert "README.md: written" in capsys.readouterr().out
    assert readme.read_text(encoding="utf-8") == text
    assert script.main() == 0
    assert capsys.readouterr().out == "All tables are up to date.\n"


@pytest.mark.parametrize(
    ("path", "text", "sentence"),
    [
        (
            "docs/performance.md",
            "<!-- table:x -->\n<!-- /table:x -->\n",
            "marks the table 'x': choose one of first-tok",
        ),
        ("docs/performance.md", "no markers", "has no block for a table"),
        (
            "README.md",
            "no markers",
            "has no block for a table, figures: write its two markers, <!-- figures -->",
        ),
        ("results/bench/growth.jsonl", "", "has no record: run the benchmark with keep="),
        (
            "results/bench/attention.jsonl",
            None,
            "attention.jsonl is missing: run the benchmark with keep=results/bench",
        ),
    ],
)
def test_a_missing_part_is_one_sentence(copied, monkeypatch, capsys, path, text, sentence):
    monkeypatch.setattr(script, "ROOT", copied)
    if text is None:
        (copied / path).unlink()
    else:
        (copied / path).write_text(text)
    readme = (copied / tables.README).read_text()
    assert script.main() == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert (copied / tables.README).read_text() == readme
    assert not (copied / tables.RESULTS / "search.md").exists()  # nothing is written


DAMAGES = {
    "cut": lambda line: line[:-20],
    "binary": lambda line: b"\xff\x00" + line,
    "a list": lambda line: b"[1]",
    "no rows": lambda line: json.dumps(json.loads(line) | {"rows": []}).encode(),
    "a row of null": lambda line: json.dumps(json.loads(line) | {"rows": [None]}).encode(),
    "no machine": lambda line: json.dumps(json.loads(line) | {"machine": {}}).encode(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES)
def test_a_damaged_record_is_one_sentence_with_its_line(copied, monkeypatch, capsys, damage):
    monkeypatch.setattr(script, "ROOT", copied)
    path = copied / tables.RESULTS / "search.jsonl"
    first, *_ = path.read_bytes().splitlines()
    path.write_bytes(first + b"\n" + damage(first) + b"\n")
    assert script.main() == 2
    err = capsys.readouterr().err
    assert "search.jsonl, line 2" in err and "delete the line, or run the benchmark" in err
    assert err.count("\n") == 1


def test_every_narrow_table_has_its_markers(copied):
    path = copied / tables.PERFORMANCE
    path.write_text(path.read_text(encoding="utf-8").replace("<!-- table:embed -->", ""), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"performance\.md has no block for a table, table:embed: write its two"
    ):
        generated(copied)


def test_readme_names_a_case_that_no_record_has():
    records = RECORDS | {"embed": copy.deepcopy(RECORDS["embed"])}
    for record in records["embed"]:
        record["rows"] = []
    with pytest.raises(
        UserError,
        match=r"embed\.jsonl has no case 'float32, 1000 texts, .*: run the benchmark, or change README_CASES",
    ):
        readme_table(records)


def test_a_page_shows_the_latest_record_of_each_kind_of_machine():
    records = on_another_machine(RECORDS)["growth"]
    text = page.markdown("growth", records, "growth.png")
    assert text.startswith("# growth\n\n") and text.endswith("\n![growth](growth.png)\n")
    assert text.count("| case | ours: size |") == 2
    assert "AMD EPYC 9000, JAX" in text and "Intel Xeon with AMX, JAX" in text
