"""scripts/bench.py: a table, one JSON line that ends stdout, and files; and what the benchmarks of answers compare."""

import json
import sys
from dataclasses import astuple, dataclass
from pathlib import Path

import bench
import numpy as np
import pytest
import scipy.stats
from omegaconf import OmegaConf
from readme import ROOT, TABLES, included

from rag.bench import generate, page, peak_throughput
from rag.bench.evaluation import EvaluationBenchmark
from rag.bench.generate import GenerateBenchmark, work_of
from rag.bench.growth import GrowthBenchmark, passages, power_law, series
from rag.bench.peers.llama_cpp import LlamaCppGenerator, open_llama_cpp, requantised
from rag.bench.pipeline import PipelineBenchmark, StageClock
from rag.bench.pipeline import rows as pipeline_rows
from rag.bench.quality import QualityBenchmark
from rag.bench.questions import QuestionSet, another_use, joined, messages
from rag.bench.reading import MEASURES, ReadingBenchmark, ReadingOutcome, Task, _LlamaCpp, rows
from rag.bench.record import bench_json
from rag.bench.timing import Row
from rag.evaluate.statistics import Statistics
from rag.generate.local import LocalGenerator
from rag.prompt import PromptTemplate
from rag.runtime.measurement import Spread
from rag.types import Document, Message, UserError
from tests import tiny, tiny_encoder


@dataclass(frozen=True)
class Fake:
    repeats: int = 3

    def run(self) -> list[Row]:
        return [Row(f"{self.repeats} repeats", {"ms": 1.0}, {"peer": {"ms": 2.0}}, {"peer": 2.0})]


@pytest.fixture
def small_roofs(monkeypatch):
    monkeypatch.setattr(peak_throughput, "GEMM_SIZES", (64,))
    monkeypatch.setattr(peak_throughput, "READ_BYTES", (1 << 18,))
    monkeypatch.setattr(peak_throughput, "SECONDS", 0.0)


@pytest.fixture
def run(tmp_path, monkeypatch, small_roofs):
    """bench.main as Hydra would call it: run(**settings) -> the run's folder."""
    folder = tmp_path / "run"
    monkeypatch.setattr(bench, "run_dir", lambda: folder)
    monkeypatch.setattr(
        bench, "overrides", lambda: ["bench=fake", "bench.path=/home/me/corpus", "keep=there"]
    )

    def main(**settings) -> Path:
        fake = {"_target_": f"{__name__}.Fake", "repeats": 5}
        bench.main(OmegaConf.create({"bench": fake, "keep": None, "name": None, **settings}))
        return folder

    return main


def test_the_last_line_is_the_record(run, capsys):
    run()
    lines = capsys.readouterr().out.splitlines()
    record = json.loads(lines[-1])
    assert record["bench"] == "test_bench"
    assert record["machine"]["versions"]["jax"]
    assert record["rows"] == [
        {"case": "5 repeats", "ours": {"ms": 1.0}, "peers": {"peer": {"ms": 2.0}}, "ratio": {"peer": 2.0}}
    ]
    assert any("5 repeats" in line for line in lines[:-1])
    roof = record["machine"]["roofs"]["gemm_flops"] / 1e9
    assert lines[0].startswith(f"roofs: {roof:.4g} GFLOP/s of float32 matrix products, ")
    assert record["command"] == "python scripts/bench.py bench=fake bench.path=.../corpus"
    assert len(record["load_before"]) == len(record["machine"]["load_average"]) == 3


@dataclass(frozen=True)
class Impossible:
    def run(self) -> list[Row]:
        return [Row("too fast", {"float32 GFLOP/s": 1e12})]


def test_a_share_above_its_roof_ends_a_benchmark_after_its_table(run, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="too fast: 1e\\+12 float32 GFLOP/s are"):
        run(bench={"_target_": f"{__name__}.Impossible"})
    out = capsys.readouterr().out
    assert "too fast" in out and "without the shares" in out and "{" not in out
    assert not (tmp_path / "run").exists()


def test_the_line_is_added_and_table_and_picture_are_replaced(run, tmp_path, capsys):
    for _ in range(2):
        run(keep=str(tmp_path / "kept"), name="other")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    for folder in (tmp_path / "run", tmp_path / "kept"):
        assert sorted(path.name for path in folder.iterdir()) == ["other.jsonl", "other.md", "other.png"]
        assert (folder / "other.jsonl").read_text().splitlines() == printed
        assert (folder / "other.md").read_text() == page.markdown(json.loads(printed[-1]))
        assert (folder / "other.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_in_markdown():
    rows = [
        Row("a|b", {"ms": Spread(12.345, 11.0, 13.0)}, {"torch": {"ms": 8.1}}, {"torch": 0.66}),
        Row("c", {"ms": 2000.4}),
    ]
    roofs = {"gemm_flops": 2e11, "read_bytes_per_s": 3e10, "int8_ops": 1e12}
    record = json.loads(
        bench_json("attention", rows, roofs, command="python x.py", load_before=[0.5, 1.0, 1.5])
    )
    said, table = page.markdown(record).split("\n\n")
    assert table.splitlines() == [
        "| case | ours: ms | torch: ms | ratio to: torch |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 12.35 [11, 13] | 8.1 | 0.66 |",
        "| c | 2,000 | - | - |",
    ]
    assert said.startswith("`python x.py`: 20")
    assert "roofs 200 float32, 1,000 int8 billion operations/s, 30 GB/s" in said
    assert "load average 0.5 before, " in said


def test_without_peers_there_is_no_picture_of_ratios():
    assert page.ratios([Row("c", {"ms": 1.0})]) is None


# --- README's tables


def test_readme_takes_each_table_between_its_marks(tmp_path):
    (tmp_path / "search-1M.md").write_text("| new |\n")
    text = "a\n<!-- bench:search-1M -->\n| old |\n<!-- /bench:search-1M -->\nb\n"
    new = included(text, tmp_path)
    assert new == "a\n<!-- bench:search-1M -->\n\n| new |\n\n<!-- /bench:search-1M -->\nb\n"
    assert included(new, tmp_path) == new
    with pytest.raises(FileNotFoundError, match=r"other\.md"):
        included(text.replace("search-1M", "other"), tmp_path)


def test_readmes_tables_are_the_kept_ones_and_these_the_records():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert included(readme) == readme, "run python scripts/readme.py"
    for path in TABLES.glob("*.jsonl"):
        record = json.loads(path.read_text().splitlines()[-1])
        assert path.with_suffix(".md").read_text() == page.markdown(record), path.name


# --- growth


def test_a_power_law_is_found():
    sizes = [10, 100, 1000, 10_000]
    law = power_law(sizes, [3e-4 * size**1.5 for size in sizes])
    assert law.exponent == pytest.approx(1.5)
    assert law.scale == pytest.approx(3e-4)
    assert law.error == pytest.approx(0, abs=1e-9)
    noisy = power_law(sizes, [2.0, 9.0, 150.0, 900.0])
    fit = scipy.stats.linregress(np.log(sizes), np.log([2.0, 9.0, 150.0, 900.0]))
    assert (noisy.exponent, noisy.error) == pytest.approx((fit.slope, fit.stderr))
    with pytest.raises(UserError, match="two sizes"):
        power_law([5, 5], [1.0, 2.0])


def test_growth_leaves_out_what_would_take_too_long(capsys):
    growth = GrowthBenchmark(seconds=10)
    rows = growth._rows("attention", (4, 1, 2), lambda size: [float(size**2)] * 3)
    assert [row.case for row in rows] == ["attention: 1", "attention: 2", "attention, fitted"]
    assert rows[-1].ours == {"exponent": pytest.approx(2), "standard error": pytest.approx(0), "theory": 2}
    assert "attention: 4 is left out, it would take about 16 s" in capsys.readouterr().err
    found = series("attention", rows)
    assert (found.sizes, found.seconds, found.theory) == ([1, 2], [1.0, 4.0], 2)
    assert growth.picture(rows).startswith(b"\x89PNG")
    assert growth.picture([]) is None


def test_growth_measures_each_of_its_series(embedder_of):
    growth = GrowthBenchmark(
        (64, 128), (500, 1000), (3, 6), words=3, dim=8, head_dim=8, repeats=1, embedder=embedder_of
    )
    rows = growth.run()
    cases = [row.case for row in rows]
    for name, sizes in {
        "attention": (64, 128),
        "search": (500, 1000),
        "ingest": (3, 6),
        "write": (3, 6),
    }.items():
        assert [f"{name}: {size:,}" for size in sizes] == [
            case for case in cases if case.startswith(f"{name}: ")
        ]
        assert f"{name}, fitted" in cases
    assert len(set(passages(50, 3, seed=1))) == 50


# --- from a question to its answer


def test_clocks_become_a_row_for_each_of_ours():
    clocks = {
        "int8, reuse none": [
            StageClock(0.1, 1.0, 0.01, 1000, 64),
            StageClock(0.3, 1.2, 0.02, 900, 64),
            StageClock(0.2, 1.1, 0.03, 950, 64),
        ],
        "int8, reuse chunk": [StageClock(0.05, 0.5, 0.01, 1000, 64)] * 3,
        PEER: [StageClock(0.4, 2.2, 0.01, 1000, 64)] * 3,
    }
    plain, chunk = pipeline_rows(clocks, list(clocks)[:2])
    assert astuple(plain.ours["first token ms"]) == pytest.approx((200, 100, 300))
    assert plain.ours["prompt tokens"].median == 950
    assert plain.peers == chunk.peers
    assert plain.ratio == {f"{PEER}, first": pytest.approx(2.0), f"{PEER}, last": pytest.approx(2.0)}
    assert chunk.ratio == {f"{PEER}, first": pytest.approx(8.0), f"{PEER}, last": pytest.approx(4.4)}


def test_documents_of_one_title_are_joined():
    documents = [
        Document("a", "a", "one", "T"),
        Document("b", "b", "two", "T"),
        Document("c", "c", "x"),
        Document("d", "d", "y"),
    ]
    assert [(d.id, d.text) for d in joined(documents)] == [("a", "one\n\ntwo"), ("c", "x"), ("d", "y")]


def test_another_use_has_the_passages_in_another_order(small):
    questions = QuestionSet(
        PromptTemplate("{context}\n{question}", passage="[{n}] {text}"),
        small["path"],
        passage_tokens=None,
        embedder=small["embedder"],
    )
    search, asked = questions.load()
    reader = questions.reader(LocalGenerator(small["weights"], "float32"), 4)
    [message] = messages(asked[0], search, reader)
    [other] = another_use(asked[0], search, reader)
    *passages_of, question = message.content.splitlines()
    assert question == asked[0] not in other.content
    assert sorted(filter(None, passages_of)) == sorted(filter(None, other.content.splitlines()[:-1]))
    assert other.content.split("]")[0] != message.content.split("]")[0]  # another passage comes first


def test_pipeline_without_the_peer(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # importing it raises ImportError
    questions = QuestionSet(
        PromptTemplate("{context}\n{question}", "{text}"),
        small["path"],
        passage_tokens=8,
        embedder=small["embedder"],
    )
    options = {"weights": small["weights"], "dtypes": ("float32",), "kv_reuse": ("none",), "new_tokens": 3}
    [row] = PipelineBenchmark(questions, **options, repeats=2, warmup=1).run()
    assert row.case == "float32, reuse none"
    assert 0 < row.ours["first token ms"].median < row.ours["last token ms"].median
    assert not row.peers and not row.ratio
    assert f"{PEER} is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="only 3 questions"):
        PipelineBenchmark(questions, **options, repeats=3, warmup=1).run()


def test_evaluation_without_the_peer(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    questions = QuestionSet(
        PromptTemplate("{context}\n{question}", "{text}"),
        small["path"],
        passage_tokens=None,
        embedder=small["embedder"],
    )
    [row] = EvaluationBenchmark(questions, small["weights"], ("float32",), count=1, max_new_tokens=3).run()
    assert row.ours["answers/s"] == pytest.approx(1 / row.ours["seconds"])
    assert not row.peers
    assert f"{PEER} is not installed" in capsys.readouterr().err
    with pytest.raises(UserError, match="needs 4 questions"):
        EvaluationBenchmark(questions, small["weights"], count=2).run()


# --- tokens a second


def test_generate_without_the_peer(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)
    questions = QuestionSet(PromptTemplate("{question}"), small["path"], embedder=small["embedder"])
    bench = GenerateBenchmark(
        questions, small["weights"], ("float32",), (5,), (3, 5), 4, speculative=(), repeats=2
    )
    monkeypatch.setattr(generate, "_TOKEN_IDS", (0, 20))
    rows = bench.run()
    assert [row.case for row in rows] == [
        "prefill 5, float32",
        "decode at 3, float32",
        "decode at 5, float32",
    ]
    assert all(row.ours["tokens/s"].low > 0 and not row.peers for row in rows)
    assert f"{PEER} is not installed" in capsys.readouterr().err


def test_the_work_of_a_model_leaves_out_what_a_token_does_not_read():
    model = tiny.tiny_model()
    config = model.config
    m, f = config.hidden_size, config.intermediate_size
    head = m // config.num_attention_heads
    layer = 2 * m * m + 2 * m * head * config.num_key_value_heads + 3 * m * f
    norms = (2 * config.num_hidden_layers + 1) * m
    work = work_of(model, "float32")
    assert work.flop == 2 * config.num_hidden_layers * layer
    assert work.nbytes == 4 * (config.num_hidden_layers * layer + norms + config.vocab_size * m)
    assert work.products(5) == ("float32 GFLOP/s", work.flop)


def test_tokens_that_are_missing_are_told():
    with pytest.raises(RuntimeError, match="3 tokens were written instead of 4"):
        generate.timed(lambda prompt, budget: iter([1, 2]), [1], 4)


PEER = "llama-cpp-python"
TASKS = [
    Task((Message("user", "Who?"),), ("a red fox",)),
    Task((Message("user", "Where?"),), ("on ice", "ice")),
    Task((Message("user", "How many?"),), ("7",)),
    Task((Message("user", "When?"),), ("in May",)),
]
OURS = ReadingOutcome(["The red fox.", "on thin ice", " 7", "June"], [-1.0, -2.0, -3.0, -4.0], 2.0, 1.0, 0.5)
THEIRS = ReadingOutcome(["A red fox", "water", "7", "in May"], [-2.0, -2.5, -3.0, -4.5], 6.0, 3.0)


def test_reading_compares_question_by_question():
    *measured, effort = rows(TASKS, {"ours": OURS, PEER: THEIRS}, Statistics(resamples=1000))
    assert [row.case for row in measured] == [f"{name}, 4 questions" for name in MEASURES]
    means = {row.case.split(",")[0]: (row.ours["mean"], row.peers[PEER]["mean"]) for row in measured}
    assert means["EM"] == pytest.approx((2 / 4, 3 / 4))
    # "on thin ice" is 4/5 of "on ice"
    assert means["F1"] == pytest.approx(((1 + 4 / 5 + 1 + 0) / 4, 3 / 4))
    assert means["contains"] == pytest.approx((3 / 4, 3 / 4))
    assert means["log-likelihood"] == pytest.approx((-2.5, -3.0))
    for row in measured:
        mine, its = row.ours, row.peers[PEER]
        assert mine["low"] <= mine["mean"] <= mine["high"]
        assert its["ours minus it, mean"] == pytest.approx(mine["mean"] - its["mean"])
        assert its["ours minus it, low"] <= its["ours minus it, mean"] <= its["ours minus it, high"]
    # three differences of one sign: of the eight patterns of signs, two are as far from 0
    assert measured[-1].peers[PEER]["p"] == pytest.approx(2 / 8)
    assert effort.ours == {"answering s": 2.0, "scoring s": 1.0, "of these compiling s": 0.5}
    assert effort.peers[PEER] == {"answering s": 6.0, "scoring s": 3.0, "answers that differ": 3}
    assert effort.ratio == {PEER: 3.0}


@pytest.fixture
def embedder_of(tmp_path) -> str:
    """An encoder of the smallest size."""
    encoder = tiny_encoder.write_checkpoint(tmp_path / "encoder")
    tiny_encoder.write_sentence_files(encoder, {"pooling_mode_mean_tokens": True})
    return str(encoder)


@pytest.fixture
def small(tmp_path, embedder_of) -> dict:
    """A dataset, a reader and an encoder of the smallest size, as options of Reading."""
    data, reader = tmp_path / "data", tmp_path / "reader"
    (data / "qrels").mkdir(parents=True)
    reader.mkdir()
    tiny.write_checkpoint(reader)
    texts = {"seal": "a seal eats fish", "gull": "a gull nests on a cliff", "whale": "a whale eats krill"}
    corpus = [{"_id": name, "text": text} for name, text in texts.items()]
    queries = [
        {"_id": f"q {name}", "text": f"{name} does?", "answers": [text]} for name, text in texts.items()
    ]
    for file, lines in (("corpus", corpus), ("queries", queries)):
        (data / f"{file}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    judged = "".join(f"q {name}\t{name}\t1\n" for name in texts)
    (data / "qrels" / "test.tsv").write_text("query-id\tcorpus-id\tscore\n" + judged)
    return {"path": str(data), "weights": str(reader), "embedder": embedder_of}


def test_reading_without_the_peer_leaves_its_columns_empty(small, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "llama_cpp", None)  # importing it raises ImportError
    reading = ReadingBenchmark(
        **small, max_new_tokens=4, prompt=PromptTemplate("{context}\n{question}", "{text}"), questions=3, k=1
    )
    *measured, effort = reading.run()
    assert [row.case for row in measured] == [f"{name}, 3 questions" for name in MEASURES]
    assert not any(row.peers or row.ratio for row in [*measured, effort])
    assert measured[-1].ours["mean"] < 0  # a logarithm of a probability
    assert f"{PEER} is not installed" in capsys.readouterr().err


def test_quality_compares_each_setting_with_the_first(small, tmp_path):
    prompt = PromptTemplate("{context}\n{question}", "{text}")
    reading = ReadingBenchmark(**small, max_new_tokens=4, prompt=prompt, questions=3, k=2)
    reuse = {"kv_reuse": "chunk", "kv_path": str(tmp_path / "kv")}
    # Every token of a passage anew is a reading of all.
    settings = {"plain": {}, "again": {}, "all anew": reuse | {"kv_recompute": 1000}, "chunk": reuse}
    first, again, anew, chunk = QualityBenchmark(reading, settings).run()
    assert [row.case for row in (first, chunk)] == ["plain, 3 questions", "chunk, 3 questions"]
    assert "mean KL" not in first.ours and first.ours["log-likelihood"] < 0
    for same, by in ((again, 1e-6), (anew, 1e-3)):  # what stands before the passages is kept in float16
        assert same.ours["mean KL"] == pytest.approx(0, abs=by) and same.ours["same best token"] == 1
        assert same.ours["change of log-likelihood"].median == pytest.approx(0, abs=100 * by)
    assert chunk.ours["mean KL"] > anew.ours["mean KL"]
    change = chunk.ours["change of log-likelihood"]
    assert change.low <= change.median <= change.high
    assert change.median == pytest.approx(chunk.ours["log-likelihood"] - first.ours["log-likelihood"])
    with pytest.raises(UserError, match=r"bench\.settings is empty"):
        QualityBenchmark(reading, {})


@pytest.mark.parametrize("wrong", [{"questions": 1}, {"k": 0}])
def test_reading_says_what_cannot_be(wrong):
    [name] = wrong
    with pytest.raises(UserError, match=rf"Reading\.{name}="):
        ReadingBenchmark("x", PromptTemplate("{question}"), **wrong)


@pytest.mark.weights
def test_llama_cpp_answers_and_scores_from_the_same_prompt(generator_weights):
    """Scoring first, or twice, changes neither; the likelihood is ours up to llama.cpp's 8-bit activations."""
    pytest.importorskip("llama_cpp")
    ours = LocalGenerator(str(generator_weights), "float32")
    question = [Message("user", "Tides follow the moon. What do tides follow?")]
    peer = _LlamaCpp.open(str(generator_weights), 128)
    peer.read(ours.tokenizer.chat(question))
    first = peer.answer(ours.tokenizer, 8, ())
    gold = ours.tokenizer.encode("the moon", special=False)
    scored = peer.log_likelihood(gold)
    assert peer.answer(ours.tokenizer, 8, ()) == first != ""
    assert peer.log_likelihood(gold) == pytest.approx(scored, abs=1e-4)
    [expected] = ours.log_likelihood([(question, "the moon")])
    assert scored == pytest.approx(expected.total, abs=0.2 * len(gold))
    assert np.isfinite(scored)


@pytest.mark.weights
def test_llama_cpp_stands_where_the_pipeline_has_a_generator(generator_weights, tmp_path, monkeypatch):
    """It writes what bench=reading's does, reset or not, and to the budget where no token ends it."""
    pytest.importorskip("llama_cpp")
    ours = LocalGenerator(str(generator_weights), "float32")
    question = [Message("user", "Tides follow the moon. What do tides follow?")]
    peer = _LlamaCpp.open(str(generator_weights), 128)
    peer.read(ours.tokenizer.chat(question))
    expected = peer.answer(ours.tokenizer, 24, ())
    for reuse in (False, True):
        its = LlamaCppGenerator(
            open_llama_cpp(generator_weights, 128, reuse=reuse), ours, ours.tokenizer.eos_ids
        )
        for _ in range(
            1 if reuse else 2
        ):  # a prompt kept whole is read again by its last token only: another rounding
            *pieces, usage = its.stream(question, max_new_tokens=24)
            assert "".join(pieces) == expected != ""
            assert usage.prompt_tokens == ours.prompt_tokens(question)
    monkeypatch.setenv("RAG_CACHE", str(tmp_path))
    smaller = requantised(generator_weights, "Q4_0")
    assert smaller.is_relative_to(tmp_path) and smaller == requantised(generator_weights, "Q4_0")
    assert 0 < smaller.stat().st_size < generator_weights.stat().st_size
    *_, usage = LlamaCppGenerator(open_llama_cpp(smaller, 128), ours).stream(question, max_new_tokens=50)
    assert usage.new_tokens == 50
