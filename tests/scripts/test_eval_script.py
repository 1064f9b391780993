"""scripts/eval.py: the files of a result, and its summary."""

import json

import eval as eval_script
import pytest
from sweep_summary import show_leaderboards

from rag.types import UserError
from tests.report.result_folders import save
from tests.scripts.commands import WORDS


@pytest.fixture
def beir(home):
    dataset = home / "beir"
    (dataset / "qrels").mkdir(parents=True, exist_ok=True)
    corpus = [
        {"_id": "d1", "title": "Seals", "text": "eat fish"},
        {"_id": "d2", "title": "", "text": "whales eat krill"},
    ]
    queries = [{"_id": "q1", "text": "fish"}, {"_id": "q2", "text": "krill whales"}]
    for name, rows in (("corpus", corpus), ("queries", queries)):
        (dataset / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq1\td1\t1\nq2\td1\t1\n")
    return dataset


@pytest.fixture
def evaluated(run_main, tmp_path, monkeypatch):
    """evaluated(*overrides) -> the folder of the results, after running the script."""

    def evaluated(*overrides):
        monkeypatch.setattr(eval_script, "run_dir", lambda: tmp_path)
        monkeypatch.setattr(eval_script, "overrides", lambda: list(overrides))
        monkeypatch.setattr(eval_script, "label", lambda: "this [one]")
        evaluated.out, evaluated.err = run_main(eval_script, *overrides)
        return tmp_path

    return evaluated


def test_eval_writes_what_other_programs_rely_on(beir, evaluated):
    folder = evaluated(f"dataset.path={beir}", *WORDS)
    assert "nDCG@10" in evaluated.out and "this [one]" in evaluated.out
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["MRR@10"] == metrics["means"]["MRR@10"] == pytest.approx((1 + 1 / 2) / 2)
    assert set(metrics["means"]) == {"nDCG@10", "Recall@100", "MRR@10", "MAP"}
    assert metrics["label"] == "this [one]"
    assert any("2 queries" in warning for warning in metrics["warnings"])
    costs = json.loads((folder / "costs.json").read_text())
    assert costs["query_p50_s"] > 0
    assert costs["index_bytes"] > 0
    rows = [json.loads(line) for line in (folder / "per_query.jsonl").read_text().splitlines()]
    assert [(row["query"], row["MRR@10"]) for row in rows] == [("q1", 1.0), ("q2", 0.5)]
    assert (folder / "run.trec").read_text().split()[:3] == ["q1", "Q0", "d1"]
    first = json.loads((folder / "queries.jsonl").read_text().splitlines()[0])
    assert first == {"query": "q1", "text": "fish", "relevant": {"d1": 1}}
    assert "2 of 2 queries judged" in evaluated.out
    assert "rag.embed.bag_of_words.BagOfWords" in (folder / "config.yaml").read_text()


def test_what_a_run_file_lacks_is_said_and_recorded_each_time(home, beir, evaluated):
    (home / "run.txt").write_text("q1 Q0 d9 1 2 x\nq1 Q0 d1 2 1 x\n")
    for _ in range(2):  # the second result is a cached one
        folder = evaluated(
            f"dataset.path={beir}", "retriever=run", f"retriever.path={home / 'run.txt'}", *WORDS
        )
        warnings = json.loads((folder / "metrics.json").read_text())["warnings"]
        for sentence in (
            "1 documents of the run are not in the corpus, such as 'd9'.",
            "1 of 2 queries are not in the run, such as 'q2'.",
        ):
            assert sentence in warnings
            assert sentence in evaluated.err.splitlines()


def test_a_cached_result_that_is_damaged_is_made_again(home, beir, evaluated, capsys):
    wanted = (f"dataset.path={beir}", *WORDS, "evaluation.probes=1")
    before = set((home / "cache" / "results").glob("*/metrics.json"))
    folder = evaluated(*wanted)
    [kept] = set((home / "cache" / "results").glob("*/metrics.json")) - before
    means = json.loads(kept.read_text())["means"]
    for text in ("", "[" * 200_000, kept.read_text().replace('"resamples": ', '"resamples": -')):
        kept.write_text(text)
        evaluated(*wanted)
        assert json.loads(kept.read_text())["means"] == means
    kept.with_name("costs.json").unlink()
    folder = evaluated(*wanted)
    assert json.loads((folder / "metrics.json").read_text())["means"] == means
    (folder / "run.trec").unlink()
    (folder / "run.trec").symlink_to("/proc/none/run.trec")
    with pytest.raises(UserError, match=r"Cannot copy .*: choose another with hydra\.run\.dir=DIR"):
        evaluated(*wanted)


def test_the_best_chunk_scores_for_its_document(beir, evaluated, tmp_path):
    words = ("chunker=fixed", "chunker.size=1", "chunker.overlap=0")
    evaluated(f"dataset.path={beir}", *WORDS, *words)
    first = (tmp_path / "run.trec").read_text().splitlines()[0].split()
    assert first[2] == "d1"
    assert float(first[4]) == pytest.approx(1.0)  # "fish" alone, of "Seals eat fish"


def test_one_long_document_does_not_crowd_the_others_out(home, evaluated, tmp_path):
    """Twenty chunks of one document score best; the other two documents are found all the same."""
    dataset = home / "long"
    (dataset / "qrels").mkdir(parents=True, exist_ok=True)
    texts = {"long": "krill " * 20, "a": "krill whale", "b": "krill seal ice"}
    rows = [json.dumps({"_id": name, "title": "", "text": text.strip()}) for name, text in texts.items()]
    (dataset / "corpus.jsonl").write_text("\n".join(rows))
    (dataset / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "krill"}))
    (dataset / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\nq\tb\t1\n")
    chunks = ("chunker=fixed", "chunker.size=1", "chunker.overlap=0", "evaluation.depth=3")
    evaluated(f"dataset.path={dataset}", *WORDS, *chunks)
    ranking = [line.split()[2] for line in (tmp_path / "run.trec").read_text().splitlines()]
    assert sorted(ranking) == ["a", "b", "long"]


def test_a_sweep_ends_with_its_leaderboard_and_the_command_of_its_report(tmp_path, capsys):
    folder = tmp_path / "a sweep"
    show_leaderboards(folder)
    assert capsys.readouterr().out == ""  # no job has ended well
    for number, value in enumerate((0.25, 0.5)):
        save(folder / str(number), f"r={number}[x]", {"MAP": {"1": value, "2": value}})
    show_leaderboards(folder)
    out = capsys.readouterr().out
    assert "seals, MAP (baseline: 0[x])" in out
    rows = [[cell.strip() for cell in line.split("│")] for line in out.splitlines() if line.startswith("│")]
    assert [(row[2], row[3][:6], row[4]) for row in rows] == [
        ("1[x]", "0.5000", "+0.2500"),
        ("0[x]", "0.2500", ""),
    ]
    assert out.splitlines()[-1].endswith(f"python scripts/report.py 'runs={folder}'")
