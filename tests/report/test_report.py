"""The report over made-up result folders: what it says is what the folders hold, and nothing else gets in."""

import io
import json
import math
import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import hydra
import numpy as np
import pytest
import report as script
import yaml
from launch import CONF
from PIL import Image
from quoting import quote

from rag.report import compose, leaderboard, plots, results
from rag.report import page as pages
from rag.report.page import Bullets, Heading, Paragraph, Picture, Table
from rag.report.plots import Mark
from rag.types import UserError

HOSTILE = "<b>bold</b> | *x* & $y$ [z](http://example.org)"
DATASET = {"name": "seals", "fingerprint": "f" * 64, "queries": 60, "limit": None, "seed": 0}
STATISTICS = {"confidence": 0.95, "resamples": 1000, "seed": 7}


def save(folder: Path, label: str, scores: dict[str, dict[str, float | None]], **extra) -> Path:
    """A result folder as an evaluation leaves it; `scores` is measure -> query -> value."""
    folder.mkdir(parents=True)
    dataset = DATASET | extra.pop("dataset", {})
    known = {name: [v for v in column.values() if v is not None] for name, column in scores.items()}
    means = {name: math.fsum(values) / len(values) for name, values in known.items()}
    metrics = {
        "label": label,
        "key": str(folder),
        "dataset": dataset,
        "means": means,
        "intervals": {name: [mean - 0.0123, mean + 0.0234] for name, mean in means.items()},
        "statistics": STATISTICS,
        "warnings": extra.pop("warnings", []),
    }
    (folder / "metrics.json").write_text(json.dumps(metrics | extra.pop("metrics", {})))
    queries = dict.fromkeys(query for column in scores.values() for query in column)
    rows = [{"query": q} | {name: column.get(q) for name, column in scores.items()} for q in queries]
    (folder / "per_query.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, content in extra.items():
        text = yaml.safe_dump(content) if name == "config" else json.dumps(content)
        (folder / f"{name}.{'yaml' if name == 'config' else 'json'}").write_text(text)
    return folder


def fail(folder: Path, label: str, error: str) -> None:
    folder.mkdir(parents=True)
    (folder / "failure.json").write_text(json.dumps({"label": label, "overrides": [], "error": error}))


def column(values: np.ndarray, queries: range | None = None) -> dict[str, float]:
    return {f"q{q}": float(value) for q, value in zip(queries or range(len(values)), values, strict=True)}


def costs(p50: float | None, **more) -> dict:
    environment = {"commit": "abc123", "cpu": "Abacus 9", "versions": {"jax": "0.10.2"}, "date": "2026-01-02"}
    stages = {"embed": {"seconds": 1.5, "items": 40, "reused": 30}}
    return {"stages": stages, "query_p50_s": p50, "environment": environment, **more}


@pytest.fixture(scope="module")
def home(tmp_path_factory) -> Path:
    """A sweep: a baseline, a clearly better, a clearly worse and an equal system, a sample, a failure; two datasets."""
    home = tmp_path_factory.mktemp("sweep = one, two")
    rng = np.random.default_rng(0)
    base = rng.uniform(0.3, 0.6, 60)
    noise = rng.normal(0, 0.05, 60)
    noise -= noise.mean()  # a difference of exactly nothing
    rows = {"base": base, "better": base + 0.1 + noise, "worse": base - 0.1 + noise, "equal": base + noise}
    for place, (name, values) in enumerate(rows.items()):
        scores = {"nDCG@10": column(values), "MAP": column(values / 2)}
        more = {}
        if name == "better":
            more = better(scores, values)
        config = {"retriever": {"_target_": f"rag.x.{name.title()}", "depth": 100, "path": f"/tmp/{name}"}}
        config |= {"seed": 3, "prompt": f"{'word ' * 30}{name}{' word' * 30}"}
        save(
            home / str(place),
            f"retriever={name},k=10",
            scores,
            config=config,
            costs=costs(0.004 * 3**place),
            **more,
        )
    sample = range(0, 60, 3)
    scores = {"nDCG@10": column(rows["better"][sample], sample)}
    drawn = {"limit": 20, "seed": 5, "queries": 20, "fingerprint": "a" * 64}
    save(home / "10", f"retriever=sampled,k='{HOSTILE}'", scores, dataset=drawn)
    save(home / "11", "retriever=other", {"Recall@5": column(base)}, dataset={"name": "krill"})
    fail(home / "12", "retriever=broken", "There is no model M: give a path.")
    return home


def better(scores: dict, values: np.ndarray) -> dict:
    """What the better system's folder holds beside its scores: answers, an error breakdown, tuning, a warning."""
    scores["retrieved/F1"], scores["closed_book/F1"] = column(values / 3), column(values / 9)
    errors = {"retrieval miss": 0.25, "truncation": -0.05, "distraction": 0.1, "reader": 0.4}
    fold = {"parameters": {"weight": 0.7}, "train": 0.5123, "test": 0.4987, "queries": 30}
    return {
        "warnings": ["Only few queries were asked."],
        "error_breakdown": {
            "measure": "F1",
            "n": 60,
            "ceiling": 1.0,
            "scores": {"retrieved": 0.3, "oracle": 0.6},
            "errors": errors,
            "intervals": {cause: [error - 0.02, error + 0.02] for cause, error in errors.items()},
        },
        "tuning": {
            "family": "convex",
            "measure": "nDCG@10",
            "folds": [fold, fold],
            "nested": 0.4987,
            "naive": 0.5201,
            "naive_parameters": {"weight": 0.75},
            "optimism": 0.0214,
        },
    }


@pytest.fixture(scope="module")
def runs(home):
    return results.read([home])[0]


@pytest.fixture(scope="module")
def blocks(home):
    return compose.page(*results.read([home]), baseline="base")


@pytest.fixture(scope="module")
def output(blocks, tmp_path_factory) -> Path:
    output = tmp_path_factory.mktemp("page")
    compose.write(output, blocks)
    return output


def tables(blocks) -> dict[str, Table]:
    """The first table below each heading of the first dataset."""
    found, title = {}, ""
    for block in blocks:
        if isinstance(block, Heading):
            title = block.text
        elif isinstance(block, Table):
            found.setdefault(title, block)
    return found


def rows_of(table: Table) -> dict[str, dict[str, str]]:
    """System -> heading -> cell (the first of headings that repeat)."""
    place = list(table.header).index("system")
    return {row[place]: dict(reversed(list(zip(table.header, row, strict=True)))) for row in table.rows}


# --- the leaderboard


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
    assert rows["equal, k=10"]["difference"].startswith(("+0.0000", "-0.0000"))
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


def test_further_tables_show_what_the_files_hold(blocks):
    found = tables(blocks)
    measures = rows_of(found["Every measure"])["better, k=10"]
    assert measures["difference"] == "+0.0500 ▲"
    answers = {row[1]: row[2] for row in found["Answers"].rows}
    assert set(answers) == {"retrieved", "closed book"}
    lost = rows_of(found["Error breakdown: F1"])["better, k=10"]
    assert lost["lost: retrieval miss"] == "0.2500 [0.2300, 0.2700]"
    assert lost["lost: truncation"] == "-0.0500 [-0.0700, -0.0300]"
    assert lost["F1, oracle"] == "0.6000"
    tuned = rows_of(found["Tuning"])["better, k=10"]
    assert (tuned["nested"], tuned["naive"], tuned["optimism"]) == ("0.4987", "0.5201", "+0.0214")
    assert tuned["naive choice"] == "weight=0.75"
    assert rows_of(found["Cost"])["base, k=10"]["cached from earlier runs"] == "embed 30 of 40"
    environment = dict(found["How this was measured"].rows)
    assert environment == {
        "commit": "abc123",
        "cpu": "Abacus 9",
        "versions": "jax 0.10.2",
        "date": "2026-01-02",
    }
    method = next(b.text for b in blocks if isinstance(b, Paragraph) and b.text.startswith("Intervals:"))
    assert "95%" in method and "1,000 resamples" in method and "seed 7" in method


def test_settings_that_differ_are_shown_and_others_not(blocks):
    table = tables(blocks)["Settings that differ"]
    assert list(table.header) == ["#", "label", "prompt", "retriever._target_"]
    cells = {row[1]: row[2:] for row in table.rows}
    prompt, target = cells["retriever=better,k=10"]
    assert target == "Better"
    assert "better" in prompt  # shortened, all prompts would look alike
    assert "/tmp/" not in str(table.rows)


# --- the files


class Reader(HTMLParser):
    """Collects tags, text and references; knows that every tag is closed in order."""

    def __init__(self):
        super().__init__()
        self.tags, self.open, self.references, self.words = [], [], [], []

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.references += [value for name, value in attributes if name in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open[-1:] != ["style"]:
            self.words.append(data)


def test_the_html_stands_alone(output):
    text = (output / "report.html").read_text()
    reader = Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == []
    assert not {"script", "link", "iframe", "b"} & set(reader.tags)
    assert all(r.startswith(("data:image/png;base64,", "#s")) for r in reader.references)
    assert sum(r.startswith("data:") for r in reader.references) == 5
    style = re.search(r"<style>(.*?)</style>", text, re.S)[1]
    assert "url(" not in style and "@import" not in style
    assert f"sampled, k='{HOSTILE}'" in "".join(reader.words)  # as typed, once unescaped


def test_the_markdown_says_the_same_and_names_its_pictures(output, blocks):
    text = (output / "report.md").read_text()
    names = re.findall(r"^!\[[^\]]*\]\(([^)]*)\)$", text, re.M)
    assert len(names) == 5
    assert all((output / name).is_file() for name in names)
    assert "<b>" not in text
    assert r"&lt;b&gt;bold&lt;/b&gt; \| \*x\* &amp; \$y\$ [z\](http" in text
    for block in blocks:
        if isinstance(block, Table):
            assert f"| {block.rows[0][0]}" in text.replace("**", "").replace("\\", "")
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    board = lines[: 2 + 5]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in board}) == 1


def test_pictures_are_drawn(output):
    found = sorted(output.glob("*.png"))
    assert {path.stem.partition("-seals-")[2] for path in found} >= {
        "intervals",
        "pareto",
        "queries",
        "error-breakdown-f1",
    }
    for path in found:
        pixels = np.asarray(Image.open(path).convert("L"), float)
        assert min(pixels.shape) >= 200
        assert pixels.std() > 5
        assert (pixels < 128).mean() > 0.001  # there is ink
        inner = pixels[len(pixels) // 4 : -len(pixels) // 4, pixels.shape[1] // 4 : -pixels.shape[1] // 4]
        assert inner.std() > 5


@pytest.mark.parametrize(
    "text", ["# x", "- x", "+ x", "1. x", "2) x", "===", "[ ] x", "_x_ and __y__", "`x`", "~~x~~"]
)
def test_marks_are_escaped_in_markdown(text):
    from markdown_it import MarkdownIt

    tokens = (
        MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(pages.markdown([Paragraph(text)]))
    )
    assert [token.type for token in tokens] == ["paragraph_open", "inline", "paragraph_close"]
    assert "".join(child.content for child in tokens[1].children) == text
    assert {child.type for child in tokens[1].children} <= {"text", "text_special"}


# --- figures


def mark(label: str, mean: float, seconds: float, **more) -> Mark:
    return Mark(label, mean, mean - 0.01, mean + 0.01, more.pop("significance", "open"), seconds, **more)


def test_the_front_is_of_those_that_none_beats():
    marks = [
        mark("fast", 0.3, 0.001),
        mark("slow and worse", 0.29, 0.002),
        mark("good", 0.5, 0.01),
        mark("as good, slower", 0.5, 0.02),
        mark("twin of good", 0.5, 0.01),
        mark("sample", 0.9, 0.0001, sample=True),
    ]
    assert [marks[i].label for i in plots.front(marks)] == ["fast", "good", "twin of good"]
    assert [marks[i].label for i in plots.front(marks, lower=True)] == ["fast", "slow and worse"]


def test_a_figure_takes_any_label():
    labels = ["$x_{$", "^_\\", "emoji-free " * 20, "two\nlines"]
    marks = [mark(label, 0.1 * i, 10.0**i) for i, label in enumerate(labels, 1)]
    for png in (plots.forest(marks, "$m_", 0.9), plots.pareto(marks, "$m_", 0.9)):
        assert Image.open(io.BytesIO(png)).size[0] == 1840


def test_no_state_of_pyplot_is_touched():
    assert "matplotlib.pyplot" not in sys.modules
    assert "rag.report.plots" in sys.modules


# --- which run is the baseline, and what rows are called


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


# --- what is refused, by name


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


# --- the script


def run_script(*overrides: str) -> None:
    with hydra.initialize_config_dir(str(CONF), version_base="1.3"):
        script.main(hydra.compose("report", list(overrides)))


def test_the_script_writes_beside_the_runs(tmp_path, capsys):
    folder = tmp_path / "runs = one, two"
    save(folder / "a", "r=a", {"MAP": {"1": 0.5, "2": 0.6}})
    fail(folder / "b", "r=b", "No luck.")
    run_script(f"runs={quote(str(folder))}")
    out = capsys.readouterr().out
    assert "failed: r=b: No luck." in out
    assert f"1 finished evaluation, 1 failed -> {folder}/report.html" in out
    assert "0.5500" in (folder / "report.md").read_text()


def test_the_script_takes_a_list_of_files_and_an_output(tmp_path):
    first, second = (save(tmp_path / name, f"r={name}", {"MAP": {"1": 0.5, "2": 0.6}}) for name in "ab")
    run_script(
        f"runs=[{first},{second / 'per_query.jsonl'}]", f"output={tmp_path}/out", "baseline=b", "measure=MAP"
    )
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| **baseline** |" in text
    assert "the baseline, b," in text.replace("The difference is to ", "")


@pytest.mark.parametrize("name", ["a = b, c", "[x", "[x, y]", "it's", " "])
def test_runs_may_be_any_text(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    save(Path(name), "r=a", {"MAP": {"1": 0.5}})
    assert script.locations(name) == [Path(name)]


def test_runs_may_be_a_list_as_text(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert script.locations("[a/b=1, 'c, d', 007]") == [Path("a/b=1"), Path("c, d"), Path("007")]
    for wrong in ("[a", "[]", ""):
        with pytest.raises(UserError, match="runs"):
            script.locations(wrong)


def test_an_output_that_cannot_be_is_named(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"Cannot write .*file/report\.md .*: choose output=DIR\."):
        compose.write(tmp_path / "file", [Heading(1, "x")])
