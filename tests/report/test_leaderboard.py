"""Leaderboards: their figures, their baseline, and the names of their rows."""

import json

import numpy as np
import pytest

from rag.report import compose, leaderboard, results
from rag.report.page import Bullets
from rag.types import UserError
from tests.report.result_folders import column, rows_of, save, tables


def test_the_leaderboard_shows_the_figures_of_the_folders(home, blocks):
    board = tables(blocks)["seals"]
    rows = rows_of(board)
    for place, name in enumerate(("base", "better", "worse", "equal")):
        metrics = json.loads((home / str(place) / "metrics.json").read_text())
        mean, (low, high) = metrics["means"]["nDCG@10"], metrics["intervals"]["nDCG@10"]
        assert rows[f"{name}, k=10"]["nDCG@10"] == f"{mean:.4f} [{low:.4f}, {high:.4f}]"
        assert rows[f"{name}, k=10"]["queries"] == "60"
        assert rows[f"{name}, k=10"]["query p50"] == ("4 ms", "12 ms", "36 ms", "108 ms")[place]
    shown = [float(row[3].split()[0]) for row in board.rows]
    assert shown == sorted(shown, reverse=True)
    assert [row[0] for row in board.rows] == ["1", "2", "3", "4", "5"]


def test_a_clear_difference_is_marked_and_none_is_not(blocks):
    rows = rows_of(tables(blocks)["seals"])
    assert rows["better, k=10"]["significant"] == "▲ better"
    assert rows["worse, k=10"]["significant"] == "▼ worse"
    assert rows["equal, k=10"]["significant"] == "no"
    assert rows["base, k=10"]["significant"] == "baseline"
    assert rows["better, k=10"]["difference"].startswith("+0.1000 [+0.0")
    assert rows["equal, k=10"]["difference"].startswith("+0.0000")
    assert float(rows["equal, k=10"]["p"]) > 0.9
    for name in ("better", "worse"):  # 1000 resamples find nothing as far off; four comparisons
        assert rows[f"{name}, k=10"]["p"] == f"{1 / 1001:.4f}"
        assert rows[f"{name}, k=10"]["p (Holm)"] in (f"{4 / 1001:.4f}", f"{3 / 1001:.4f}")


def test_the_smallest_detectable_difference_is_of_the_paired_test(runs, blocks):
    base, equal = (runs[place].per_query["nDCG@10"] for place in (0, 3))
    differences = np.array([equal[query] - base[query] for query in base])
    from scipy import stats

    expected = (stats.t.ppf(0.975, 59) + stats.t.ppf(0.8, 59)) * differences.std(ddof=1) / np.sqrt(60)
    assert rows_of(tables(blocks)["seals"])["equal, k=10"]["detectable"] == f"{expected:.4f}"


def test_a_sample_says_so_and_is_compared_on_the_queries_both_have(runs, blocks):
    base, sample = runs[0].per_query["nDCG@10"], runs[4].per_query["nDCG@10"]
    common = [base[query] for query in sample]
    row = next(row for name, row in rows_of(tables(blocks)["seals"]).items() if name.startswith("sampled"))
    assert row["queries"] == "20 of 60 (sample, seed 5)"
    difference = np.mean(list(sample.values())) - np.mean(common)
    assert row["difference"].startswith(f"{difference:+.4f} [")
    text = " ".join(item for block in blocks if isinstance(block, Bullets) for item in block.items)
    assert f"on the 20 queries that both have, where the baseline has {np.mean(common):.4f}" in text


def test_a_sample_joins_the_set_that_has_its_queries_and_no_other(tmp_path):
    whole = {f"q{i}": i / 10 for i in range(10)}
    for name, part in (("a", list(whole)[:4]), ("b", ["q1", "z"])):
        scores = {"MAP": dict.fromkeys(part, 0.5)}
        save(tmp_path / name, f"r={name}", scores, dataset={"limit": len(part), "fingerprint": name})
    save(tmp_path / "c", "r=c", {"MAP": whole}, dataset={"fingerprint": "c"})
    save(tmp_path / "d", "r=d", {"MAP": whole}, dataset={"fingerprint": "d"})
    found = leaderboard.leaderboards(results.read([tmp_path])[0])
    assert [{run.label for run in table.runs} for table in found] == [{"r=a", "r=c"}, {"r=b"}, {"r=d"}]
    assert len({table.dataset for table in found}) == 3


def test_datasets_never_share_a_table(blocks):
    found = tables(blocks)
    assert "other" not in str(found["seals"].rows)
    assert [row[1] for row in found["krill"].rows] == ["retriever=other"]
    assert found["krill"].header[3] == "Recall@5"


def test_warnings_failures_and_hints_are_sentences(blocks):
    sentences = [item for block in blocks if isinstance(block, Bullets) for item in block.items]
    assert "retriever=broken failed: There is no model M: give a path." in sentences
    assert "better, k=10: Only few queries were asked." in sentences
    hint = next(
        sentence for sentence in sentences if sentence.startswith("Not significantly different from base")
    )
    assert "equal, k=10 (" in hint and "detectable from" in hint
    assert "better" not in hint
    assert 'No run here is called "base": the first, retriever=other, is the baseline instead.' in sentences


@pytest.mark.parametrize("wanted", ["retriever=better,k=10", "better, k=10", "better", "bett", "1"])
def test_a_baseline_goes_by_label_name_folder_or_part(runs, wanted):
    first = leaderboard.leaderboards(runs, wanted)[0]
    assert first.baseline.label == "retriever=better,k=10"
    assert first.comparison(first.baseline) is None


def test_a_baseline_goes_by_path_and_is_the_first_run_otherwise(home, runs):
    assert leaderboard.leaderboards(runs, str(home / "2"))[0].baseline.label == "retriever=worse,k=10"
    assert leaderboard.leaderboards(runs)[0].baseline.label == "retriever=base,k=10"


@pytest.mark.parametrize(
    ("wanted", "sentence"),
    [
        (
            "nothing",
            r"No run is called baseline=nothing: choose one of retriever=base,k=10, retriever=better,k=10",
        ),
        ("e", r"baseline=e could be any of retriever=base,k=10, .*: write one of them in full\."),
    ],
)
def test_a_baseline_that_is_none_or_several_is_refused(runs, wanted, sentence):
    with pytest.raises(UserError, match=sentence):
        leaderboard.leaderboards(runs, wanted)


def test_the_main_measure_can_be_chosen_and_must_be_there(runs):
    runs = runs[:4]
    assert leaderboard.leaderboards(runs, measure="MAP")[0].measure == "MAP"
    with pytest.raises(UserError, match=r"No run on seals has measure=P@1: choose one of nDCG@10, MAP"):
        leaderboard.leaderboards(runs, measure="P@1")


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        (["data=x,r=a", "data=x,r=b"], ["a", "b"]),
        (["r=a", "r=b,x.limit=5"], ["a", "b, limit=5"]),
        (["r=a,x.size=5", "r=a,y.size=5"], ["x.size=5", "y.size=5"]),
        (["r=a", "r=a,k=3"], ["r=a", "r=a,k=3"]),
        (["k=[1,2],r=a", "k=[1,3],r=a"], ["[1,2]", "[1,3]"]),
        (["only=one"], ["only=one"]),
        (["plain", "words, too"], ["plain", "words, too"]),
        (["r=a x.limit=5", "r='b, c' x.limit=7"], ["a, limit=5", "'b, c', limit=7"]),
        (["defaults", "r=a"], ["defaults", "r=a"]),
    ],
)
def test_names_are_what_tells_labels_apart(tmp_path, labels, names):
    for number, label in enumerate(labels):
        save(tmp_path / str(number), label, {"MAP": {"1": 0.5, "2": 0.25}})
    table = leaderboard.leaderboards(results.read([tmp_path])[0])[0]
    assert [table.names[label] for label in labels] == names


def test_a_repeated_evaluation_counts_once_and_equal_labels_are_told_apart(tmp_path):
    same = {"metrics": {"key": "k1"}}
    for number in (1, 2, 10):
        save(
            tmp_path / f"a{number}",
            "r=x",
            {"MAP": {"1": 0.5, "2": number / 10}},
            **(same if number < 10 else {}),
        )
    runs, _ = results.read([tmp_path, tmp_path / "a1"])
    assert [run.label for run in runs] == ["r=x (a1)", "r=x (a10)"]


# --- two files by hand


def test_two_files_by_hand_are_compared(tmp_path):
    rng = np.random.default_rng(1)
    base = rng.uniform(0.2, 0.5, 40)
    for name, values in (("old", base), ("new", base + 0.2 + rng.normal(0, 0.01, 40))):
        rows = [json.dumps({"query": q, "MAP": v}) for q, v in column(values).items()]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    runs, _ = results.read([tmp_path / "old.jsonl", tmp_path / "new.jsonl"])
    (table,) = leaderboard.leaderboards(runs, "old")
    assert [run.label for run in table.runs] == ["new", "old"]
    assert table.runs[1].means["MAP"] == pytest.approx(base.mean(), abs=1e-12)
    low, high = table.runs[1].intervals["MAP"]
    assert low < base.mean() < high
    assert table.significance(table.runs[0]) == "better"
    assert table.comparison(table.runs[0]).difference == pytest.approx(0.2, abs=0.01)


def test_less_of_a_rate_of_errors_is_better(tmp_path):
    """False abstention: the run with the lower rate comes first, stands as better, and wins its questions."""
    name, queries = "retrieved/false abstention", range(40)
    careful = {
        "answers": column(np.zeros(40)),
        "declines": column(np.array([i % 4 != 0 for i in queries], float)),
    }
    for label, values in careful.items():
        save(tmp_path / label, label, {name: values, "retrieved/abstention recall": values})
    runs, _ = results.read([tmp_path])
    (table,) = leaderboard.leaderboards(runs, "declines", name)
    assert [run.label for run in table.runs] == ["answers", "declines"]
    assert table.significance(table.runs[0]) == "better"
    assert table.comparison(table.runs[0]).difference == pytest.approx(-0.75)
    (other,) = leaderboard.leaderboards(runs, "declines", "retrieved/abstention recall")
    assert [run.label for run in other.runs] == ["declines", "answers"]
    assert other.significance(other.runs[1]) == "worse"
    answered = tables(compose.page(runs, [], "declines", name))["Answers"]
    assert list(answered.header) == [
        "system",
        "passages shown",
        "false abstention (lower is better)",
        "abstention recall",
    ]
