"""Peak rates and shares of them, by made-up timings; and that what an index says that it did is what it did."""

import math
import re

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag import native
from rag.bench import peak_throughput
from rag.bench.embed import operations
from rag.bench.generate import WeightsWork, work_of
from rag.bench.peak_throughput import best_peak, with_shares
from rag.bench.timing import Row
from rag.index.dense import cost
from rag.index.dense import exact as exact_index
from rag.index.dense.binary import Binary, BinaryIndex
from rag.index.dense.exact import DenseIndex
from rag.index.dense.int8 import Int8Index
from rag.index.dense.matryoshka import Matryoshka, MatryoshkaIndex
from rag.ops import linear
from rag.runtime.machine.measurement import READ_RATE, WORKING_SET, Spread, Timing, Work
from tests import tiny_models

SMALL, LARGE = 16 << 20, 64 << 20
PEAKS = {
    "gemm_flops": 2e11,
    "bf16_flops": 1e12,
    "int8_ops": 3e12,
    "read_bytes_per_s": 2e10,
    "read_bytes_per_s of 16 MiB": 5e10,
    "read_bytes_per_s of 64 MiB": 3e10,
}


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(peak_throughput, "GEMM_SIZES", (32, 64))
    monkeypatch.setattr(peak_throughput, "READ_BYTES", (1 << 16, 1 << 18))
    monkeypatch.setattr(peak_throughput, "SECONDS", 0.0)


@pytest.mark.parametrize(
    ("flags", "more"),
    [
        (("avx2", "fma"), set()),
        (("avx512_vnni",), {"int8_ops"}),
        (("amx_bf16", "amx_int8"), {"int8_ops", "bf16_flops"}),
        (("bf16", "i8mm"), {"int8_ops", "bf16_flops"}),
    ],
)
def test_peaks_are_rates_of_what_the_processor_multiplies(small, monkeypatch, flags, more):
    monkeypatch.setattr(peak_throughput, "cpu_flags", lambda: flags)
    monkeypatch.setattr(peak_throughput, "ACCELERATOR_SIZE", 128)
    found = peak_throughput.measure_peaks()
    read = {"read_bytes_per_s", "read_bytes_per_s of 0.0625 MiB", "read_bytes_per_s of 0.25 MiB"}
    on_cpu = jax.default_backend() == "cpu"
    assert found.keys() == {"gemm_flops"} | read | (more if on_cpu else {"int8_ops", "bf16_flops"})
    assert all(0 < rate < math.inf for rate in found.values())
    assert found["read_bytes_per_s"] == found["read_bytes_per_s of 0.25 MiB"]


def test_a_peak_is_the_fastest_call_of_the_fastest_program(small, monkeypatch):
    calls = []

    def fastest(call):
        calls.append(call)
        return 1.0 if len(calls) % 3 == 2 else 2.0

    monkeypatch.setattr(peak_throughput, "_fastest", fastest)
    assert peak_throughput.gemm_peak() == 2 * 64**3 / 1.0  # of the larger size
    assert len(calls) >= 4  # rows and columns of two sizes, and BLAS where there is one
    del calls[:]
    assert peak_throughput.read_peaks()["read_bytes_per_s"] == (1 << 18) / 1.0
    assert len(calls) == 6


def test_peaks_of_several_times_are_one():
    assert best_peak({"a": 1.0, "b": 5.0}, {"b": 4.0, "c": 2.0}) == {"a": 1.0, "b": 5.0, "c": 2.0}


def test_each_rate_is_compared_with_the_peak_of_its_type():
    timing = Timing(0.5, 0.25, 1.0, 3)
    work = Work(10**10, SMALL, float32=5 * 10**10, bfloat16=10**11, int8=6 * 10**11)
    [row] = with_shares([Row("a", {"ms": 1.0} | work.rates(timing), {"x": {"int8 GOP/s": 3.0}})], PEAKS)
    shares = {name: value for name, value in row.ours.items() if name.endswith("% of peak")}
    assert shares == {
        "GB/s read, % of peak": pytest.approx(40),  # of 16 MiB read again and again
        "float32 GFLOP/s, % of peak": pytest.approx(50),
        "bfloat16 GFLOP/s, % of peak": pytest.approx(20),
        "int8 GOP/s, % of peak": pytest.approx(40),
    }
    assert list(row.ours)[:4] == ["ms", "working set MB", "GB/s read", "GB/s read, % of peak"]
    assert row.ours["GB/s read"] == Spread(20.0, 10.0, 40.0)
    assert row.peers == {"x": {"int8 GOP/s": 3.0, "int8 GOP/s, % of peak": pytest.approx(0.1)}}


@pytest.mark.parametrize(
    ("size", "share"),
    [(SMALL - 1, None), (SMALL, 20), (LARGE - 1, 20), (LARGE, 100 / 3), (10 * LARGE, 100 / 3)],
)
def test_a_read_rate_is_compared_with_the_peak_of_an_array_no_larger(size, share):
    [row] = with_shares([Row("a", Work(10**10, size).rates(Timing(1.0, 1.0, 1.0, 1)))], PEAKS)
    assert row.ours.get("GB/s read, % of peak") == (None if share is None else pytest.approx(share))


@pytest.mark.parametrize(
    ("figures", "says"),
    [
        (
            {"float32 GFLOP/s": 211.0},
            r"case: 211 float32 GFLOP/s are 106% of gemm_flops, 200 billion a second",
        ),
        ({"bfloat16 GFLOP/s": Spread(1060.0, 1.0, 2000.0)}, r"1060 bfloat16 GFLOP/s are 106% of bf16_flops"),
        ({"int8 GOP/s": 4000.0}, r"4000 int8 GOP/s are 133% of int8_ops, 3000 billion"),
        ({WORKING_SET: 400.0, READ_RATE: 40.0}, r"40 GB/s read are 133% of read_bytes_per_s of 64 MiB"),
    ],
)
def test_a_share_above_its_peak_is_an_error(figures, says):
    for row in (Row("case", figures), Row("case", {}, {"peer": figures})):
        with pytest.raises(RuntimeError, match=says.replace("case:", "case(, peer)?:")):
            with_shares([row], PEAKS)


@given(st.floats(1e-3, 1e4), st.floats(1e6, 1e14))
def test_no_share_above_the_limit_is_ever_reported(rate, peak):
    rows = [Row("a", {"float32 GFLOP/s": rate})]
    if 100 * rate * 1e9 / peak > peak_throughput.MOST_PERCENT:
        with pytest.raises(RuntimeError, match="gemm_flops"):
            with_shares(rows, {"gemm_flops": peak})
    else:
        [row] = with_shares(rows, {"gemm_flops": peak})
        assert row.ours["float32 GFLOP/s, % of peak"] <= peak_throughput.MOST_PERCENT


def test_work_adds_up():
    one, other = Work(10, 10, float32=5), Work(6, 3, bfloat16=7, int8=1)
    assert one + other == Work(16, 10, 5, 7, 1)
    assert Work().rates(Timing(1.0, 1.0, 1.0, 1)) == {}


# --- what an index did

N, E = 6000, 32


@pytest.fixture(scope="module")
def vectors():
    rows = np.random.default_rng(0).standard_normal((N, E)).astype(np.float32)
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("count", [1, 7, 8, 9, 31, 32, 33, 200])
def test_exact_search_counts_each_scan_in_its_type(vectors, count, bf16, monkeypatch):
    """k is 10: 15 rows or groups of 8 are scored exactly, or 23 groups where rounding is to be proven harmless."""
    monkeypatch.setattr(exact_index, "cpu_flags", lambda: ("avx512_bf16",) if bf16 else ("avx2",))
    index, expected = DenseIndex(vectors), []
    for name in ("_search_in_full", "_prove"):
        way = getattr(index, name)
        monkeypatch.setattr(
            index, name, lambda q, k, way=way, name=name: expected.append(by(name, len(q))) or way(q, k)
        )

    def by(name: str, queries: int) -> Work:
        scan, size = 2 * N * E * queries, 4 * N * E
        if name == "_prove":
            return Work(size, size, bfloat16=scan) + scored(8 * 23, queries)
        if queries > 8:
            return Work(size, size, float32=scan) + scored(8 * 15, queries)
        few = scored(15, 1) if queries == 1 else Work()  # of several queries every score is exact
        return Work(size, size, float32=scan) + few

    index.search(vectors[:count] + 0.01, 10)
    assert index.work == sum(expected, Work())
    assert (index.work.bfloat16 > 0) == (bf16 and count >= 32)


def scored(rows: int, queries: int) -> Work:
    """Rows of E scored exactly for each query."""
    return Work(4 * E * rows * queries, 4 * E * rows, float32=2 * E * rows * queries)


def test_a_small_index_is_read_once_for_every_eight_queries(vectors):
    index = DenseIndex(vectors[:1000])  # too few rows for groups
    index.search(vectors[:20], 10)
    assert index.work == Work(3 * 4000 * E, 4000 * E, float32=40_000 * E)


def test_work_is_of_the_latest_search_and_of_all_its_batches(vectors, monkeypatch):
    index = DenseIndex(vectors)
    index.search(vectors[:3], 5)
    once = index.work
    index.search(vectors[:3], 5)
    assert index.work == once
    monkeypatch.setattr(exact_index, "_BATCH", 32)
    index.search(vectors[:64], 5)
    half = index.work
    index.search(vectors[:32], 5)
    assert half == index.work + index.work


@pytest.mark.parametrize("tiles", [False, True])
@pytest.mark.parametrize("count", [1, 2, 16])
def test_the_8_bit_scan_counts_its_codes_and_not_the_floats(vectors, count, tiles, monkeypatch):
    if tiles and not native.has_tiles(E * 2):
        pytest.skip("no AMX here")
    monkeypatch.setattr(cost, "pays", lambda *_: True)
    rows = np.concatenate([vectors, vectors], axis=1) / np.float32(2**0.5) if tiles else vectors
    index, dim = Int8Index(rows), rows.shape[1]
    _, _, proven = index.search_with_proof(rows[:count], 10)
    if index.path(count, 10) == "exact":  # too many for a scan without tiles
        assert index.work == index.exact.work and not tiles
        return
    again = Work() if proven.all() else index.exact.work
    scan, exact = 2 * N * dim * count, dim * 16 * index.proofs(10).groups
    digits = not tiles or count > 1  # one row is multiplied in float32 by what reads the tiles
    expected = {"int8": 2 * scan} if digits else {"float32": scan}
    assert (
        index.work
        == Work(N * (dim + 8), N * (dim + 8), **expected)
        + Work(4 * exact * count, 4 * exact, float32=2 * exact * count)
        + again
    )
    monkeypatch.setattr(index, "_scan", lambda queries, k, groups: _unproven(index, queries, k))
    index.search(rows[:count], 10)
    assert index.work == Work(7, 7) + index.exact.work  # the exact search after it counts too
    index.search(rows[:200], 10)
    assert index.work == index.exact.work


def _unproven(index, queries, k):
    index.work = Work(7, 7)
    return (
        np.zeros((len(queries), k), np.float32),
        np.zeros((len(queries), k), int),
        np.zeros(len(queries), bool),
    )


def test_the_1_bit_scan_counts_its_codes_once_a_query(vectors, monkeypatch):
    monkeypatch.setattr(cost, "pays", lambda scan, rows, queries: queries < 32)
    index = BinaryIndex(vectors, Binary(k=3, recall=0.5, sample=16))
    index.search(vectors[:5], 3)
    rows = index.candidates(3)
    assert index.work == Work(5 * 8 * N, 8 * N) + scored(rows, 5)  # a word and a factor a row
    index.search(vectors[:40], 3)
    assert index.work == index.exact.work


def test_a_matryoshka_scan_counts_its_first_dimensions(vectors, monkeypatch):
    monkeypatch.setattr(cost, "pays", lambda scan, rows, queries: queries < 32)
    index = MatryoshkaIndex(vectors, Matryoshka(dims=8, candidates=50))
    index.search(vectors[:5], 3)
    assert index.work.nbytes == 4 * (N * 8 + 50 * E * 5)
    assert index.work.float32 == 2 * 5 * (N * 8 + 50 * E)
    index.search(vectors[:40], 3)
    assert index.work == index.exact.work


# --- what the benchmarks count


def test_the_search_benchmark_counts_what_the_indexes_did(configured, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "faiss", None)
    monkeypatch.setattr(cost, "pays", lambda *_: True)
    options = {"vectors": (4096,), "dim": 64, "queries": (1, 2), "k": (10,), "checked": 2, "repeats": 1}
    rows = configured("search", **options).run()
    figures = {row.case.split("k=10 ")[1]: row.ours for row in rows}
    assert list(figures) == [f"queries={q} {way}" for q in (1, 2) for way in ("exact", "int8", "1 bit")]
    assert figures["queries=1 exact"]["working set MB"] == 4 * 4096 * 64 / 1e6
    assert figures["queries=2 int8"]["working set MB"] == pytest.approx(4096 * 72 / 1e6, rel=0.5)
    assert "int8 GOP/s" in figures["queries=2 int8"]
    assert all("int8 GOP/s" not in figures[f"queries={q} exact"] for q in (1, 2))


def test_the_generator_is_counted_in_the_type_that_it_multiplies_in(monkeypatch):
    model = tiny_models.tiny_decoder()
    assert work_of(model, "float32").products(100) == ("float32 GFLOP/s", work_of(model, "float32").flop)
    assert work_of(model, "bfloat16").products(100)[0] == "bfloat16 GFLOP/s"
    plain = WeightsWork(flop=10, nbytes=1, dtype="int8", width=64, native=False)
    monkeypatch.setattr(linear, "_multiplies", lambda *names: "bf16" in names)
    assert plain.products(1000) == ("bfloat16 GFLOP/s", 10)
    assert plain.products(100) == ("int8 GOP/s", 20)  # by two digits
    monkeypatch.setattr(linear, "_multiplies", lambda *names: False)
    assert plain.products(1000) == ("float32 GFLOP/s", 10)
    monkeypatch.setattr(native, "has_tiles", lambda width=64: True)
    assert WeightsWork(10, 1, "int8", 64, native=True).products(1000) == ("int8 GOP/s", 20)


def test_the_encoder_is_counted_in_the_type_that_it_multiplies_in(configured, monkeypatch):
    config = {"hidden_size": 64, "intermediate_size": 256, "num_hidden_layers": 2}

    projections, attention = operations([3, 5], config)
    assert projections == 2 * 2 * 8 * (4 * 64 * 64 + 2 * 64 * 256)
    assert attention == 2 * 2 * 2 * 64 * (9 + 25)
    benchmark = configured("embed")
    counted = lambda dtype: benchmark._work(config, dtype, [3, 5])  # noqa: E731
    assert counted("float32") == Work(float32=projections + attention)
    assert counted("bfloat16") == Work(bfloat16=projections, float32=attention)
    monkeypatch.setattr(native, "has_tiles", lambda width=64: True)
    assert counted("int8") == Work(int8=2 * projections, float32=attention)
    monkeypatch.setattr(native, "has_tiles", lambda width=64: False)
    monkeypatch.setattr(linear, "_multiplies", lambda *names: "bf16" in names)
    assert counted("int8") == Work(bfloat16=projections, float32=attention)


@pytest.mark.parametrize("flags", [(), ("avx512_vnni",), ("avx512_vnni", "amx_bf16")])
@pytest.mark.parametrize("rows", [1, 2, 128, 129])
def test_an_int8_weight_is_multiplied_in_the_type_that_product_type_returns(rows, flags, monkeypatch):
    monkeypatch.setattr(linear, "cpu_flags", lambda: flags)
    linear._multiplies.cache_clear()
    x, values, scale = np.ones((rows, 64), np.float32), np.ones((32, 64), np.int8), np.ones(32, np.float32)
    program = jax.jit(lambda x, values, scale: linear.linear(x, values, None, scale))
    text = program.trace(x, values, scale).lower(lowering_platforms=("cpu",)).as_text()
    kind = linear.product_type(rows, 64)
    linear._multiplies.cache_clear()
    operands = re.findall(r"dot_general.*: \(tensor<[\dx]*x(\w+)>, tensor<[\dx]*x(\w+)>\)", text)
    names = {"int8": "i8", "float32": "f32", "bfloat16": "bf16"}
    assert set(operands) == {(names[kind],) * 2}
