"""scripts/bench.py: a table, one JSON line that ends stdout, and files; growth."""

import json
from dataclasses import dataclass
from pathlib import Path

import bench
import numpy as np
import pytest
import scipy.stats
from omegaconf import OmegaConf

from rag.bench import page, peak_throughput
from rag.bench.growth import passages, power_law, series
from rag.bench.record import bench_json, read_records
from rag.bench.timing import Row
from rag.runtime.machine.measurement import Spread
from rag.types import UserError


@dataclass(frozen=True)
class Fake:
    repeats: int = 3

    def run(self) -> list[Row]:
        return [Row(f"{self.repeats} repeats", {"ms": 1.0}, {"peer": {"ms": 2.0}}, {"peer": 2.0})]


@pytest.fixture
def fast_peaks(monkeypatch):
    monkeypatch.setattr(peak_throughput, "GEMM_SIZES", (64,))
    monkeypatch.setattr(peak_throughput, "READ_BYTES", (1 << 18,))
    monkeypatch.setattr(peak_throughput, "SECONDS", 0.0)


@pytest.fixture
def run(tmp_path, monkeypatch, fast_peaks):
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
    peak = record["machine"]["peaks"]["gemm_flops"] / 1e9
    assert lines[0].startswith(f"peaks: {peak:.4g} GFLOP/s of float32 matrix products, ")
    assert record["command"] == "python scripts/bench.py bench=fake bench.path=.../corpus"
    assert len(record["load_before"]) == len(record["machine"]["load_average"]) == 3


@dataclass(frozen=True)
class Impossible:
    def run(self) -> list[Row]:
        return [Row("too fast", {"float32 GFLOP/s": 1e12})]


def test_a_share_above_its_peak_ends_a_benchmark_after_its_table(run, tmp_path, capsys):
    with pytest.raises(RuntimeError, match="too fast: 1e\\+12 float32 GFLOP/s are"):
        run(bench={"_target_": f"{__name__}.Impossible"})
    out = capsys.readouterr().out
    assert "too fast" in out and "without the shares" in out and "{" not in out
    assert not (tmp_path / "run").exists()


def test_the_line_is_added_and_table_and_picture_are_replaced(run, tmp_path, capsys):
    for _ in range(2):
        run(keep=str(tmp_path / "results"), name="other")
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    for folder in (tmp_path / "run", tmp_path / "results"):
        assert sorted(path.name for path in folder.iterdir()) == ["other.jsonl", "other.md", "other.png"]
        assert (folder / "other.jsonl").read_text().splitlines() == printed
        records = read_records(folder / "other.jsonl")
        assert records == [json.loads(line) for line in printed]
        assert (folder / "other.md").read_text() == page.markdown("other", records, "other.png")
        assert (folder / "other.png").read_bytes().startswith(b"\x89PNG")


def test_a_table_in_markdown():
    rows = [
        Row("a|b", {"ms": Spread(12.345, 11.0, 13.0)}, {"torch": {"ms": 8.1}}, {"torch": 0.66}),
        Row("c", {"ms": 2000.4}),
    ]
    peaks = {"gemm_flops": 2e11, "read_bytes_per_s": 3e10, "int8_ops": 1e12}
    record = json.loads(
        bench_json("attention", rows, peaks, command="python x.py", load_before=[0.5, 1.0, 1.5])
    )
    title, run, table = page.markdown("attention", [record]).split("\n\n")
    assert title == "# attention"
    assert table.splitlines() == [
        "| case | ours: ms | torch: ms | ratio to: torch |",
        "| --- | ---: | ---: | ---: |",
        "| a\\|b | 12.35 [11, 13] | 8.1 | 0.66 |",
        "| c | 2,000 | - | - |",
    ]
    assert run.startswith("`python x.py`: 20")
    assert "peaks 200 float32, 1,000 int8 billion operations/s, 30 GB/s" in run
    assert "load average 0.5 before, " in run


def test_without_peers_there_is_no_picture_of_ratios():
    assert page.ratios([Row("c", {"ms": 1.0})]) is None


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


def test_growth_leaves_out_what_would_take_too_long(configured, capsys):
    growth = configured("growth", seconds=10)
    rows = growth._rows("attention", (4, 1, 2), lambda size: [float(size**2)] * 3)
    assert [row.case for row in rows] == ["attention: 1", "attention: 2", "attention, fitted"]
    assert rows[-1].ours == {"exponent": pytest.approx(2), "standard error": pytest.approx(0), "theory": 2}
    assert "attention: 4 is left out, it would take about 16 s" in capsys.readouterr().err
    found = series("attention", rows)
    assert (found.sizes, found.seconds, found.theory) == ([1, 2], [1.0, 4.0], 2)
    assert growth.picture(rows).startswith(b"\x89PNG")
    assert growth.picture([]) is None


def test_growth_measures_each_of_its_series(configured, embedder_of):
    sizes = {"tokens": (64, 128), "vectors": (500, 1000), "chunks": (3, 6)}
    growth = configured("growth", **sizes, words=3, dim=8, head_dim=8, repeats=1, embedder=embedder_of)
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
