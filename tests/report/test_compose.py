"""The further tables of a report say what the result folders hold."""

import json

from rag.report import compose, results
from rag.report.page import Bullets, Details, Paragraph, Picture
from tests.report.result_folders import HOSTILE, column, fail, hidden, rows_of, save, tables


def test_further_tables_show_what_the_files_hold(blocks):
    found = tables(blocks)
    assert rows_of(found["Every measure"])["better, k=10"]["MAP"].endswith(" ▲")
    [intervals] = hidden(blocks)["Every measure with its interval and its difference to the baseline"]
    assert any(
        row[:2] == ["MAP", "better, k=10"] and row[3].startswith("+0.0500 [+0.0") and row[3].endswith("] ▲")
        for row in intervals.rows
    )
    answers = {row[1]: row[2] for row in found["Answers"].rows}
    assert set(answers) == {"retrieved", "closed book"}
    lost = rows_of(found["Error breakdown: F1"])["better, k=10"]
    assert lost["lost: retrieval miss"] == "0.2500 [0.2300, 0.2700]"
    assert lost["lost: truncation"] == "-0.0500 [-0.0700, -0.0300]"
    assert lost["F1, oracle"] == "0.6000"
    tuned = rows_of(found["Tuning"])["better, k=10"]
    assert (tuned["nested"], tuned["naive"], tuned["optimism"]) == ("0.4987", "0.5201", "+0.0214")
    assert tuned["naive choice"] == "weight=0.75"
    assert rows_of(found["Cost"])["base, k=10"]["query p50"] == "4 ms"
    [cached] = hidden(blocks)["What was cached from earlier runs"]
    assert ["base, k=10", "embed", "30", "40"] in cached.rows
    environment = dict(found["How this was measured"].rows)
    assert environment == {
        "commit": "abc123",
        "cpu": "Abacus 9",
        "versions": "jax 0.10.2",
        "date": "2026-01-02",
    }
    method = next(b.text for b in blocks if isinstance(b, Paragraph) and b.text.startswith("Intervals:"))
    assert "95%" in method and "1,000 resamples" in method and "seed 7" in method


def test_settings_that_all_share_are_hidden(blocks):
    [shared] = hidden(blocks)["Settings that all share"]
    assert ["retriever.depth", "100"] in shared.rows
    assert "prompt" not in str(shared.rows)


def test_each_query_is_one_click_away(blocks, runs):
    """Its text, its relevant documents, and what each system found; those that differ most come first."""
    shown = {name: inner for name, inner in hidden(blocks).items() if name.startswith("q")}
    assert len(shown) == 60
    spread = [float(name.rpartition("differs by ")[2].rstrip(")")) for name in shown]
    assert spread == sorted(spread, reverse=True)
    name = next(name for name in shown if name.startswith(f"q3: {HOSTILE} 3 ("))
    relevant, table = shown[name]
    assert relevant.text == "Relevant: d3 (2)"
    rows = rows_of(table)
    assert rows["base, k=10"]["nDCG@10"] == f"{runs[0].per_query['nDCG@10']['q3']:.4f}"
    assert rows["base, k=10"]["the first 10 documents with their scores"] == "d4 1.5, d3 ✓2 0"
    assert rows["better, k=10"]["the first 10 documents with their scores"] == ""


def test_settings_that_differ_are_shown_and_others_not(blocks):
    table = tables(blocks)["Settings that differ"]
    assert list(table.header) == ["#", "label", "prompt", "retriever._target_"]
    cells = {row[1]: row[2:] for row in table.rows}
    prompt, target = cells["retriever=better,k=10"]
    assert target == "Better"
    assert "better" in prompt  # shortened, all prompts would look alike
    assert "/tmp/" not in str(table.rows)


def test_a_page_of_failures_alone_is_still_a_page(tmp_path):
    fail(tmp_path / "a", "r=x", "No luck.")
    blocks = compose.page(*results.read([tmp_path]))
    assert [block.items for block in blocks if isinstance(block, Bullets)] == [["r=x failed: No luck."]]
    assert not any(isinstance(block, Picture) for block in blocks)


def test_runs_without_a_query_in_common_are_said_to_have_none(tmp_path):
    save(tmp_path / "a", "r=a", {"MAP": {"1": 0.5, "2": 0.6}})
    save(tmp_path / "b", "r=b", {"MAP": {"3": 0.5, "4": None}})
    blocks = compose.page(*results.read([tmp_path]))
    (notes,) = [block.items for block in blocks if isinstance(block, Bullets)]
    assert notes == ["b has no query in common with the baseline, so nothing compares them."]


def test_a_long_query_is_cut(tmp_path):
    save(tmp_path / "a", "retriever=a", {"nDCG@10": column([0.1, 0.2])})
    query = {"query": "q0", "text": "x" * 100_000, "relevant": {}}
    (tmp_path / "a" / "queries.jsonl").write_text(json.dumps(query) + "\n")
    details = [block for block in compose.page(*results.read([tmp_path])) if isinstance(block, Details)]
    [summary] = [block.summary for block in details if block.summary.startswith("q0: ")]
    assert len(summary) < 350
