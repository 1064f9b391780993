"""Alternating timings, the environment record, benchmark rows. No test asserts a duration."""

import json
import math
import os
import pathlib
import subprocess
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.bench.record import bench_json, print_table, rows_of
from rag.bench.timing import Row, alternate, compiled_temp_bytes, ratio
from rag.runtime import clock as clocks
from rag.runtime import machine
from rag.runtime.clock import Clock, compile_seconds
from rag.runtime.machine import environment
from rag.runtime.measurement import Spread, Timing

ROWS = [
    Row(
        "T=512 [causal]",
        {"ms": 12.3456, "MiB": 13},
        {"torch": {"ms": 8.1}, "xla": {"ms": 98765.4}},
        {"torch": 0.66},
    ),
    Row("a case with a long name, T=4096", {"ms": 1.5}, {"torch": {"ms": 3.0}}, {"torch": 2.0}),
]


def test_rivals_take_turns_and_warmups_do_not_count():
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


def test_environment_says_what_ran_on_what():
    record = environment()
    assert json.loads(json.dumps(record)) == record
    assert record["versions"]["jax"] == jax.__version__
    assert record["versions"].keys() == {"jax", "jaxlib", "flax", "numpy"}
    assert record["device"] == jax.devices()[0].device_kind
    assert record["xla_flags"] == os.environ.get("XLA_FLAGS", "")
    assert record["cores"] == machine.cores() >= 1
    assert record["peak_memory_bytes"] > 10_000_000
    assert record["cpu_flags"] == sorted(set(record["cpu_flags"]))
    assert {"commit", "dirty", "python", "cpu", "load_average", "date"} <= record.keys()


def test_the_commit_is_this_checkouts():
    root = pathlib.Path(machine.__file__).parents[2]
    command = ["git", "-C", str(root), "rev-parse", "HEAD"]
    if not (root / ".git").exists() or subprocess.run(command, capture_output=True).returncode:
        assert environment()["commit"] is None
    else:
        assert (
            environment()["commit"] == subprocess.run(command, capture_output=True, text=True).stdout.strip()
        )
        assert environment()["dirty"] in (True, False)


def test_an_installed_copy_has_no_commit(tmp_path, monkeypatch):
    monkeypatch.setattr(
        machine, "__file__", str(tmp_path / "site-packages" / "rag" / "runtime" / "machine.py")
    )
    assert machine._revision() == {"commit": None, "dirty": None}


@pytest.mark.parametrize(
    ("cpuinfo", "name", "flags"),
    [
        (
            "model name\t: Xeon\nflags\t\t: fpu sse4_2 avx2 avx512f fma ht\n",
            "Xeon",
            ["avx2", "avx512f", "fma", "sse4_2"],
        ),
        ("processor : 0\nFeatures : fp asimd i8mm crc32\n", None, ["asimd", "i8mm"]),
    ],
)
def test_cpu_flags_of_x86_and_arm(monkeypatch, cpuinfo, name, flags):
    monkeypatch.setattr(pathlib.Path, "read_text", lambda self: cpuinfo)
    assert machine._cpu() == (name or machine.platform.machine(), tuple(flags))


def test_cpu_without_proc(monkeypatch):
    def no_proc(self):
        raise FileNotFoundError(self)

    monkeypatch.setattr(pathlib.Path, "read_text", no_proc)
    monkeypatch.setattr(
        machine, "_output", lambda *command: {3: "Apple M4", 4: "AVX1.0 FMA"}.get(len(command))
    )
    assert machine._cpu() == ("Apple M4", ("avx1.0", "fma"))
    monkeypatch.setattr(machine, "_output", lambda *command: None)
    assert machine._cpu() == (machine.platform.machine(), ())


def test_a_missing_or_failing_command_gives_none():
    assert machine._output("a-command-that-is-not-there") is None
    assert machine._output("false") is None
    assert machine._output("echo", "x") == "x"


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


def test_facts_of_the_run_stand_in_the_line():
    assert json.loads(bench_json("x", [], {}, command="python x"))["command"] == "python x"


def test_a_spread_in_the_table(capsys):
    print_table([Row("c", {"ms": Spread(1234.5, 1.0, 2000.0)})])
    assert "1,234 [1, 2,000]" in capsys.readouterr().out


def test_a_figure_that_is_no_number_is_refused():
    with pytest.raises(ValueError, match="JSON"):
        bench_json("attention", [Row("x", {"ms": math.nan})], {})


# --- seconds that went into making programs

_TICKS = 60


@given(st.lists(st.tuples(st.integers(0, _TICKS), st.integers(0, _TICKS)), max_size=40))
def test_the_union_of_intervals_counts_every_moment_once(intervals):
    union, covered = clocks.Intervals(), np.zeros(_TICKS, bool)
    for start, end in intervals:  # in any order, nested, overlapping, adjoining, empty, reversed
        union.add(float(start), float(end))
        covered[start:end] = True
        assert union.seconds == covered.sum()


class _Wall:
    """A clock of whole seconds in place of the wall clock."""

    now = 1000.0


@given(
    st.lists(
        st.tuples(
            st.sampled_from(["jaxpr_trace", "jaxpr_to_mlir_module", "backend_compile"]),
            st.integers(0, 9),  # ticks since the event before
            st.integers(-3, 40),  # its duration; the wall's clock that JAX reads may be set back
        ),
        max_size=30,
    )
)
def test_events_that_nest_never_take_longer_than_the_time_that_passed(events):
    with pytest.MonkeyPatch.context() as patch:
        heard, wall = [], _Wall()
        patch.setattr(jax.monitoring, "register_event_duration_secs_listener", heard.append)
        patch.setattr(clocks.time, "perf_counter", lambda: wall.now)
        clock = clocks._compile_clock.__wrapped__()
        covered = np.zeros(10 * len(events) + 1, bool)
        for name, passed, seconds in events:
            wall.now += passed
            heard[0](f"/jax/core/compile/{name}_duration", float(seconds), fun_name="f")
            heard[0](
                "/jax/compilation_cache/cache_retrieval_time_sec", float(seconds)
            )  # inside backend_compile
            end = int(wall.now - 1000)
            covered[max(0, end - seconds) : end] = True
            assert clock.seconds == covered.sum() <= end


def test_a_function_that_is_compiled_while_another_is_traced_counts_once():
    """A computation during tracing is compiled inside it, so the sum of all events is more than the time."""
    reported = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, seconds, **_: reported.append(seconds) if "/core/compile/" in event else None
    )

    @jax.jit
    def inner(x):
        return jnp.sin(x) @ jnp.cos(x)

    @jax.jit
    def outer(x):
        with jax.ensure_compile_time_eval():
            known = inner(jnp.ones((7, 7)))
        return inner(x * 3) + known

    x = jnp.ones((7, 7)).block_until_ready()
    begin, reported[:] = Clock.now(), []
    outer(x).block_until_ready()
    raw = compile_seconds() - begin.compiling
    taken = Clock.now() - begin
    assert 0 < raw <= taken.wall and raw == taken.compiling
    assert raw < sum(reported)
    assert taken.working == taken.wall - taken.compiling > 0
    begin = Clock.now()
    outer(x).block_until_ready()
    assert (Clock.now() - begin).compiling == 0


def test_threads_that_compile_at_once_spend_the_time_once():
    def compiled(size):
        jax.jit(lambda x: jnp.tanh(x) @ x)(np.ones((size, size), np.float32)).block_until_ready()

    threads = [threading.Thread(target=compiled, args=(size,)) for size in (31, 33)]
    begin = Clock.now()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    raw = compile_seconds() - begin.compiling
    assert 0 < raw <= Clock.now().wall - begin.wall


@given(*(st.floats(0, 1e6) for _ in range(4)))
def test_differences_of_clocks_are_never_negative(wall, compiling, later, more):
    taken = Clock(later, more) - Clock(wall, compiling)
    assert taken.wall >= 0 and taken.compiling >= 0 and taken.working >= 0
    if later >= wall and 0 <= more - compiling <= later - wall:
        assert taken == Clock(later - wall, more - compiling)
    sum_of = Clock(wall, compiling) + Clock(later, more)
    assert (sum_of.wall, sum_of.compiling) == (wall + later, compiling + more)
