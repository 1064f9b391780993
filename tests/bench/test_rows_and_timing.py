"""Alternating timings, and the rows of a benchmark as a table and a JSON line. No test asserts a duration."""

import json
import math

import jax
import jax.numpy as jnp
import pytest

from rag.bench.record import bench_json, print_table, rows_of
from rag.bench.timing import Row, alternate, compiled_temp_bytes, ratio
from rag.runtime.machine.measurement import Spread, Timing

ROWS = [
    Row(
        "T=512 [causal]",
        {"ms": 12.3456, "MiB": 13},
        {"torch": {"ms": 8.1}, "xla": {"ms": 98765.4}},
        {"torch": 0.66},
    ),
    Row("a case with a long name, T=4096", {"ms": 1.5}, {"torch": {"ms": 3.0}}, {"torch": 2.0}),
]


def test_functions_take_turns_and_warm_ups_are_not_timed():
    calls = []
    timings = alternate({"a": lambda: calls.append("a"), "b": lambda: calls.append("b")}, repeats=3, warmup=2)
    assert calls == ["a", "b"] * 5
    assert timings.keys() == {"a", "b"}
    assert timings["a"].repeats == 3
    assert 0 < timings["a"].minimum <= timings["a"].median <= timings["a"].maximum


def test_whatever_a_call_returns_is_waited_for():
    waited = []

    class Slow:
        def block_until_ready(self):
            waited.append(1)
            return self

    alternate({"tree": lambda: {"a": [Slow(), 3, None], "b": jnp.ones(2)}}, repeats=2, warmup=0)
    assert len(waited) == 2


def test_ratio_above_one_means_ours_is_faster():
    assert ratio(Timing(1.0, 1.0, 1.0, 3), Timing(2.0, 0.1, 9.0, 3)) == 2.0


def test_a_timing_in_another_unit_and_as_a_rate():
    timing = Timing(0.5, 0.25, 2.0, 3)
    assert timing.times(1000) == Spread(500.0, 250.0, 2000.0)
    assert timing.rate(10) == Spread(20.0, 5.0, 40.0)
    assert Spread.of([3, 1, 2, 10]) == Spread(2.5, 1.0, 10.0)


def test_compiled_temp_bytes_sees_an_intermediate():
    x = jnp.ones((256, 256))
    two = compiled_temp_bytes(lambda x: (x @ x) @ x, x)
    assert two >= x.nbytes
    assert compiled_temp_bytes(lambda x: x + 1, x) < x.nbytes


def test_the_table_shows_every_figure_uncut(capsys):
    print_table(ROWS, title="attention")
    lines = capsys.readouterr().out.splitlines()
    row = next(line for line in lines if "T=512" in line)
    assert [cell.strip() for cell in row.strip("\u2502").split("\u2502")] == [
        "T=512 [causal]", "12.35", "13", "8.1", "98,765", "0.66",
    ]  # fmt: skip
    other = next(line for line in lines if "a case with a long name, T=4096" in line)
    assert [cell.strip() for cell in other.strip("\u2502").split("\u2502")][1:] == ["1.5", "-", "3", "-", "2"]


def test_the_json_line():
    line = bench_json("attention", ROWS, {"gemm_flops": 2e9})
    assert "\n" not in line
    record = json.loads(line)
    assert record.keys() == {"bench", "machine", "rows"}
    assert record["bench"] == "attention"
    assert record["machine"]["peaks"] == {"gemm_flops": 2e9}
    assert record["machine"]["device"] == jax.devices()[0].device_kind
    assert record["rows"][0] == {
        "case": "T=512 [causal]",
        "ours": {"ms": 12.3456, "MiB": 13},
        "peers": {"torch": {"ms": 8.1}, "xla": {"ms": 98765.4}},
        "ratio": {"torch": 0.66},
    }


def test_rows_come_back_from_their_line():
    rows = [*ROWS, Row("c", {"ms": Spread(2.0, 1.0, 3.0)}, {"x": {"ms": Spread(5.0, 4.0, 6.0)}})]
    assert rows_of(json.loads(bench_json("x", rows, {}))) == rows


def test_facts_of_the_run_are_in_the_line():
    assert json.loads(bench_json("x", [], {}, command="python x"))["command"] == "python x"


def test_a_spread_in_the_table(capsys):
    print_table([Row("c", {"ms": Spread(1234.5, 1.0, 2000.0)})])
    assert "1,234 [1, 2,000]" in capsys.readouterr().out


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        bench_json("attention", [Row("x", {"ms": math.nan})], {})
