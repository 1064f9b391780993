"""Cached results are computed once for each batch, under the right key; none is half-written or outdated."""

import io
import json
import os
import subprocess
import sys
import tempfile
import textwrap
from contextlib import redirect_stderr
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.runtime.cache.folder import entry_name
from rag.runtime.cache.memo import Memo
from rag.runtime.checksums import read_verified
from tests.damage import drawn_damage
from tests.trials import tries


class Counting:
    """It doubles numbers, and counts how often it was called."""

    def __init__(self):
        self.batches = []

    def __call__(self, items):
        self.batches.append(list(items))
        return [2 * item for item in items]


@pytest.fixture
def double():
    return Counting()


def test_results_come_in_order_and_batches_are_computed_once(tmp_path, double):
    memo = Memo(tmp_path)
    assert memo.map("double", "v1", [3, 1, 2], double, batch=2) == [6, 2, 4]
    assert double.batches == [[3, 1], [2]]
    assert Memo(tmp_path).map("double", "v1", [3, 1, 2], double, batch=2) == [6, 2, 4]
    assert len(double.batches) == 2
    cost = memo.costs["double"]
    assert (cost.items, cost.reused) == (3, 0)


def test_another_key_stage_or_item_is_another_result(tmp_path, double):
    requests = [("a", "1", [1]), ("a", "2", [1]), ("b", "1", [1]), ("a", "1", [2]), ("a", "1", ["1"])]
    for stage, meaning, items in requests:
        Memo(tmp_path).map(stage, meaning, items, double)
    assert len(double.batches) == 5


def test_a_longer_request_reuses_the_batches_that_are_the_same(tmp_path, double):
    Memo(tmp_path).map("double", "v", list(range(4)), double, batch=2)
    memo = Memo(tmp_path)
    assert memo.map("double", "v", list(range(6)), double, batch=2) == [0, 2, 4, 6, 8, 10]
    assert double.batches[2:] == [[4, 5]]
    assert memo.costs["double"].reused == 4


def test_a_failing_batch_leaves_the_earlier_ones_and_nothing_of_its_own(tmp_path, double):
    def fail_at_three(items):
        if 3 in items:
            raise RuntimeError("power cut")
        return double(items)

    with pytest.raises(RuntimeError, match="power cut"):
        Memo(tmp_path).map("s", "v", [1, 2, 3], fail_at_three, batch=1)
    assert Memo(tmp_path).map("s", "v", [1, 2, 3], double, batch=1) == [2, 4, 6]
    assert double.batches == [[1], [2], [3]]
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".tmp")]


def test_results_are_the_same_whether_computed_or_read(tmp_path):
    def tuples(items):
        return [(item, 0.1 + 0.2) for item in items]

    first = Memo(tmp_path).map("s", "v", ["x"], tuples)
    assert first == Memo(tmp_path).map("s", "v", ["x"], tuples) == [["x", 0.1 + 0.2]]


def test_a_dry_memo_counts_and_computes_nothing(tmp_path, double):
    Memo(tmp_path).map("s", "v", [1, 2], double, batch=2)
    dry = Memo(tmp_path, dry=True)
    assert dry.map("s", "v", [1, 2, 3], double, batch=2) == [2, 4, None]
    assert len(double.batches) == 1
    assert (dry.costs["s"].items, dry.costs["s"].reused) == (3, 2)


def test_the_time_of_a_stage_inside_another_is_its_own(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rag.bench.timing.time.perf_counter", lambda: now[0])
    memo = Memo(tmp_path)

    def inner(items):
        now[0] += 5
        return items

    def outer(items):
        now[0] += 1
        return memo.map("inner", "v", items, inner)

    memo.map("outer", "v", [1], outer)
    assert memo.costs["inner"].seconds == pytest.approx(5)
    assert memo.costs["outer"].seconds == pytest.approx(1)
    again = Memo(tmp_path)
    again.map("outer", "v", [1], outer)
    assert again.costs["outer"].seconds == pytest.approx(1)  # what it took when it was computed


def test_no_stored_seconds_are_negative(tmp_path, monkeypatch):
    """Not even if all of the time was spent compiling, and the two clocks round differently."""
    now, compiled = [0.1], [0.0]
    monkeypatch.setattr("rag.bench.timing.time.perf_counter", lambda: now[0])
    monkeypatch.setattr("rag.runtime.machine.clock.compile_seconds", lambda: compiled[0])
    memo = Memo(tmp_path)

    def compiling(items):
        now[0] += 0.2
        compiled[0] += 0.2
        return items

    def outer(items):
        now[0] += 0.1
        compiled[0] += 0.3  # another thread's, too
        return memo.map("inner", "v", items, compiling)

    memo.map("outer", "v", [1, 2, 3], outer, batch=1)
    stored = [json.loads(read_verified(path, entry_name(path))) for path in tmp_path.rglob("*.json")]
    assert len(stored) == 6
    assert all(one["seconds"] >= 0 and one["compile_s"] >= 0 for one in stored)
    for cost in memo.costs.values():
        assert cost.seconds == pytest.approx(0, abs=1e-12) and cost.compile_s > 0


def test_a_stage_that_loses_an_item_is_a_bug_and_caches_nothing(tmp_path):
    with pytest.raises(ValueError, match="1 results of 2"):
        Memo(tmp_path).map("s", "v", [1, 2], lambda items: items[:1])
    assert not list(tmp_path.rglob("*.json"))


def test_what_json_cannot_represent_is_not_cached(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        Memo(tmp_path).map("s", "v", [1], lambda items: [float("nan")])
    assert not list(tmp_path.rglob("*.json"))


@given(st.data())
@tries(30, 1000)
def test_a_damaged_batch_is_computed_again(data):
    with tempfile.TemporaryDirectory() as folder, redirect_stderr(io.StringIO()) as printed:
        double, memo = Counting(), Memo(Path(folder))
        memo.map("s", "v", [1, 2], double, batch=1)
        file = sorted(Path(folder).rglob("*.json"))[data.draw(st.integers(0, 1))]
        drawn_damage(file, data)
        assert Memo(Path(folder), dry=True).map("s", "v", [1, 2], double, batch=1).count(None) == 1
        again = Memo(Path(folder))
        assert again.map("s", "v", [1, 2], double, batch=1) == [2, 4]
        assert (len(double.batches), again.costs["s"].reused) == (3, 1)
        assert Memo(Path(folder)).map("s", "v", [1, 2], double, batch=1) == [2, 4]
        assert len(double.batches) == 3
    notices = printed.getvalue().splitlines()
    assert len(notices) == 2 and all(file.name in line and "made again" in line for line in notices)


def test_a_missing_batch_is_computed_again_without_a_word(tmp_path, double, capsys):
    Memo(tmp_path).map("s", "v", [1], double)
    next(tmp_path.rglob("*.json")).unlink()
    assert Memo(tmp_path).map("s", "v", [1], double) == [2]
    assert capsys.readouterr().err == ""


def test_two_processes_compute_each_batch_once(tmp_path):
    script = textwrap.dedent("""
        import sys, time
        from pathlib import Path
        from rag.runtime.cache.memo import Memo
        log = open(sys.argv[2], "a")
        def slow(items):
            log.write("x"); log.flush(); time.sleep(0.05)
            return items
        print(Memo(Path(sys.argv[1])).map("s", "v", list(range(20)), slow, batch=1))
    """)
    log, file = tmp_path / "log", tmp_path / "slowly.py"
    file.write_text(script)
    command = [sys.executable, str(file), str(tmp_path / "memo"), str(log)]
    environment = os.environ | {"PYTHONPATH": os.getcwd(), "RAG_CACHE": str(tmp_path / "cache")}
    processes = [subprocess.Popen(command, env=environment, stdout=subprocess.PIPE) for _ in range(2)]
    outputs = [json.loads(process.communicate(timeout=60)[0]) for process in processes]
    assert outputs == [list(range(20))] * 2
    assert log.read_text() == "x" * 20


def test_an_error_of_a_stage_is_passed_on_unchanged(tmp_path):
    def missing(items):
        raise FileNotFoundError(2, "No such file", "model.bin")

    with pytest.raises(FileNotFoundError, match=r"model\.bin"):
        Memo(tmp_path).map("s", "v", [1], missing)


def test_uncounted_time_is_not_the_stages_time(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr("rag.bench.timing.time.perf_counter", lambda: now[0])
    memo = Memo(tmp_path)

    def compute(items):
        with memo.uncounted():
            now[0] += 7
        now[0] += 1
        return items

    memo.map("s", "v", [1], compute)
    assert memo.costs["s"].seconds == pytest.approx(1)
