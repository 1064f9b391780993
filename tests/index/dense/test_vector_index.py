"""The indexes beside the exact one: what they find against DenseIndex and float64, and proofs."""

from dataclasses import FrozenInstanceError
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag import native
from rag.index.dense import VectorIndex, audit, binary, cost, int8
from rag.index.dense import exact as exact_index
from rag.index.dense.binary import Binary, BinaryIndex
from rag.index.dense.exact import DenseIndex, Exact
from rag.index.dense.int8 import Int8Index, Int8Scan, Proofs
from rag.index.dense.matryoshka import Matryoshka, MatryoshkaIndex
from rag.types import UserError
from tests.ops.test_topk import on_cpu
from tests.reference import top_k_oracle

OPTIONS = [Exact(), Int8Scan(), Binary(sample=32, k=5), Matryoshka(dims=16)]


def _units(rows: int, dim: int = 48, seed: int = 0) -> np.ndarray:
    """Unit vectors in a few dozen clusters, as texts come in topics."""
    rng = np.random.default_rng([seed, rows])
    topics = np.random.default_rng(9).standard_normal((40, dim))
    vectors = topics[rng.integers(40, size=rows)] + rng.standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def _integers(rows: int, dim: int = 4) -> np.ndarray:
    return np.random.default_rng(rows).integers(-2, 3, (rows, dim)).astype(np.float32)


def _exact(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


@pytest.fixture
def scanning(monkeypatch):
    """Small indexes scan, though for them it is not expected to pay."""
    monkeypatch.setattr(cost, "pays", lambda *args: True)


# --- every index --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", OPTIONS)
def test_every_index_is_built_from_its_options(options):
    vectors = _units(3000)
    index = options.build(vectors)
    assert isinstance(index, VectorIndex)
    assert len(index) == 3000
    assert index.nbytes >= vectors.nbytes
    assert isinstance(hash(options), int)
    with pytest.raises(FrozenInstanceError):
        options.candidates = 1


@on_cpu
@pytest.mark.parametrize("options", OPTIONS)
def test_scores_are_those_of_the_exact_index(options, scanning):
    """Whatever finds a row, its cosine is the one number that DenseIndex gives it, in every batch."""
    vectors, queries = _units(5000), _units(40, seed=1)
    scores, ids = DenseIndex(vectors).search(queries, 50)
    index = options.build(vectors)
    for count in (1, 5, 40):
        found, rows = index.search(queries[:count], 10)
        assert (found.dtype, rows.dtype) == (np.float32, np.int32)
        assert found.shape == rows.shape == (count, 10)
        assert np.all(np.diff(found, axis=1) <= 0)
        for q in range(count):
            known = dict(zip(ids[q].tolist(), scores[q].tolist(), strict=True))
            shared = [
                (row, score)
                for row, score in zip(rows[q].tolist(), found[q].tolist(), strict=True)
                if row in known
            ]
            assert len(shared) >= 5
            assert all(known[row] == score for row, score in shared)


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("count", [0, 1, 3, 40])
def test_small_indexes_are_exact(options, count):
    """Where the candidates would be most of the rows, ties and all."""
    vectors, queries = _integers(200, 16), _integers(count + 1000, 16)[:count]
    scores, ids = options.build(vectors).search(queries, 7)
    expected = top_k_oracle(_exact(queries, vectors), 7)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])


@pytest.mark.parametrize("options", OPTIONS)
def test_an_empty_index_finds_nothing(options):
    index = options.build(np.zeros((0, 16), np.float32))
    assert index.search(_integers(1, 16), 3)[1].shape == (1, 0)


@pytest.mark.parametrize("options", OPTIONS)
def test_bad_queries_are_refused(options):
    index = options.build(_units(300))
    with pytest.raises(UserError, match="have 47 dimensions and the index has 48"):
        index.search(_units(2)[:, :47], 3)
    with pytest.raises(UserError, match="NaN or infinity"):
        index.search(np.full((1, 48), np.nan, np.float32), 3)
    with pytest.raises(UserError, match="k of 1 or more"):
        index.search(_units(2), 0)


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Int8Scan(candidates=0), "candidates=0"),
        (lambda: Binary(recall=1.0), "recall=1.0"),
        (lambda: Binary(sample=0), "sample=0"),
        (lambda: Binary(k=0), "k=0"),
        (lambda: Matryoshka(dims=0), "dims=0"),
        (lambda: Matryoshka(candidates=0), "candidates=0"),
        (lambda: Matryoshka(dims=49).build(_units(10)), "dims is 49 and the vectors have 48"),
    ],
)
def test_bad_options_are_refused(make, setting):
    with pytest.raises(UserError, match=setting):
        make()


# --- the scan that proves -----------------------------------------------------------------------------------


@pytest.mark.parametrize("k", [1, 10, 40])
@pytest.mark.parametrize("count", [1, 2, 7, 16, 30])
def test_the_int8_scan_is_exact_and_says_so(count, k, scanning):
    vectors, queries = _units(12000), _units(count, seed=1)
    index = Int8Index(vectors, Int8Scan(64))
    assert index.path(count, k) == ("scan" if count <= int8.most_queries(48) else "exact")
    scores, ids, proven = index.search_with_proof(queries, k)
    expected = DenseIndex(vectors).search(queries, k)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])
    assert proven.shape == (count,)
    assert proven.mean() > 0.5 or count > int8.most_queries(48)


@pytest.mark.parametrize("by_native", [False, True])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 300.0])
def test_the_bound_holds(scale, by_native):
    """In float64: no row of a group scores more than the group's bound and the query's slack say."""
    if by_native and not native.has_tiles(64):
        pytest.skip("no AMX, or no C++ compiler")
    vectors, queries = _units(4096, 64) * np.float32(scale), _units(3, 64, seed=5) * np.float32(7)
    vectors[5] = 0
    index = Int8Index(vectors)
    operands = index._queries(queries)
    bounds, slack = np.asarray(int8._bounds(index._codes, operands, by_native)), np.asarray(operands.slack)
    best = _exact(queries, vectors).reshape(3, -1, 16).max(axis=2)
    assert np.all(best <= bounds + slack[:, None])
    typical = np.median(bounds - best) / (scale * 7)
    assert 0 < typical < 0.02  # a bound that proves something is close, too


def test_what_cannot_be_proven_is_searched_exactly(scanning):
    """A thousand copies of a row, scattered: no scan tells them apart, and the lowest rows must win."""
    vectors, queries = _units(8000), _units(4, seed=2)
    copies = np.arange(3, 8000, 7)
    vectors[copies] = queries[0]
    _, ids, proven = Int8Index(vectors).search_with_proof(queries, 10)
    assert not proven[0]
    np.testing.assert_array_equal(ids[0], copies[:10])
    np.testing.assert_array_equal(ids, DenseIndex(vectors).search(queries, 10)[1])


def test_rows_past_the_last_whole_tile_are_scanned_too(scanning):
    vectors, queries = _units(4101, 64), _units(5, 64, seed=2)
    queries[0] = vectors[-1]
    _, ids, proven = Int8Index(vectors).search_with_proof(queries, 10)
    assert proven.any() and ids[0, 0] == 4100
    np.testing.assert_array_equal(ids, DenseIndex(vectors).search(queries, 10)[1])


def test_batches_that_the_scan_is_slow_for_are_not_scanned(scanning):
    vectors, queries = _units(8000), _units(40, seed=2)
    _, ids, proven = Int8Index(vectors).search_with_proof(queries, 10)
    assert not proven.any()
    np.testing.assert_array_equal(ids, DenseIndex(vectors).search(queries, 10)[1])


# --- the approximate ones -----------------------------------------------------------------------------------


def test_the_estimate_is_nearly_without_bias():
    """Against float64, over rows of a corpus with a strong mean: the error is centred, and far below the spread."""
    vectors, query = _units(4000, 384) + np.float32(0.05), _units(1, 384, seed=4)[0]
    index = BinaryIndex(vectors)
    estimates = np.asarray(
        binary._estimates(index._bits, index._factors, jnp.asarray(query), index._rotation)
    )
    exact = _exact(query[None], vectors - vectors.mean(axis=0))[0]
    error = estimates - exact
    assert abs(error.mean()) < 0.1 * error.std()
    assert np.corrcoef(estimates, exact)[0, 1] > 0.7
    slope = np.polyfit(exact, estimates, 1)[0]
    assert slope == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("dim", [5, 31, 32, 33, 100])
def test_words_hold_the_signs(dim):
    bits = np.random.default_rng(dim).integers(0, 2, dim).astype(bool)
    words = np.asarray(binary._words(jnp.asarray(bits)))
    assert len(words) == -(-dim // 32)
    np.testing.assert_array_equal(np.unpackbits(words.view(np.uint8), bitorder="little")[:dim], bits)
    assert np.unpackbits(words.view(np.uint8)).sum() == bits.sum()


@pytest.mark.parametrize("recall", [0.8, 0.99])
def test_the_recall_that_was_asked_for(recall, scanning):
    """On queries that the calibration has not seen, counted here and by the audit."""
    vectors, queries = _units(20000), _units(200, seed=6)
    index = BinaryIndex(vectors, Binary(recall=recall, sample=64))
    expected = top_k_oracle(_exact(queries, vectors), 10)[1]
    assert index.path(1, 10) == "scan"
    found = np.concatenate([index.search(query[None], 10)[1] for query in queries])
    counted = np.mean(
        [len(set(a) & set(b)) / 10 for a, b in zip(found.tolist(), expected.tolist(), strict=True)]
    )
    assert counted >= recall
    audited = audit.audit(index, index.exact, queries, 10)
    assert audited.recall == pytest.approx(counted, abs=2e-3)
    assert audited.at_least < audited.recall
    assert (audited.queries, audited.k) == (200, 10)
    assert index.candidates(10) < 5000


def test_more_recall_takes_more_candidates_and_so_do_more_results():
    vectors = _units(20000)
    counts = [
        BinaryIndex(vectors, Binary(recall=recall, sample=64)).candidates(10) for recall in (0.5, 0.999)
    ]
    assert counts[0] < counts[1]
    index = BinaryIndex(vectors, Binary(sample=64))
    assert index.candidates(5) <= index.candidates(50)


def test_each_number_of_results_is_calibrated_once(monkeypatch, scanning):
    calibrated = []
    calibrate = BinaryIndex._calibrate
    monkeypatch.setattr(BinaryIndex, "_calibrate", lambda self, k: calibrated.append(k) or calibrate(self, k))
    index = BinaryIndex(_units(2000), Binary(sample=16, k=10))
    for k in (3, 10, 3, 10):
        index.search(_units(1), k)
    assert calibrated == [10, 3]


def test_a_whole_prefix_finds_all_and_a_short_one_less():
    vectors, queries = _units(5000), _units(100, seed=7)
    indexes = [MatryoshkaIndex(vectors, Matryoshka(dims, 20)) for dims in (4, 24, 48)]
    recalls = [audit.audit(index, index.exact, queries, 10).recall for index in indexes]
    assert recalls[0] < recalls[1] < recalls[2] == 1.0


def test_the_prefix_scan_renormalises():
    """A row whose prefix is short but points the query's way is a candidate."""
    vectors = np.zeros((2000, 8), np.float32)
    vectors[:, 1] = 1
    vectors[77] = [0.1, 0, 0, 0, 0, 0, 0, 0.99499]
    query = np.array([[0.9, 0, 0, 0, 0, 0, 0, 0.43589]], np.float32)
    _, ids = MatryoshkaIndex(vectors, Matryoshka(dims=2, candidates=1)).search(query, 1)
    np.testing.assert_array_equal(ids, [[77]])


@on_cpu
def test_the_scan_multiplies_integers():
    """The compiled scan holds one int8 x int8 product of all rows, and never their floats."""
    vectors = _units(4096, 64)
    index = Int8Index(vectors)
    program = jax.jit(partial(int8._bounds, by_native=False))
    text = program.lower(index._codes, index._queries(vectors[:4])).compile().as_text()
    assert "s8[4096,64]" in text
    assert "f32[4096,64]" not in text


# --- what is expected to pay --------------------------------------------------------------------------------


def test_the_cheaper_way_is_taken_and_always_the_same(monkeypatch):
    """Counted, not timed: scans where there are many rows and few queries, and where few candidates will do."""
    index = BinaryIndex(_units(3000), Binary(sample=8))
    found = index.candidates(10)
    assert [index.path(count, 10) for count in (0, 1, 40)] == ["exact"] * 3  # too small an index
    monkeypatch.setattr(BinaryIndex, "__len__", lambda self: 200_000)
    for candidates, counts in ((16, (1, 8, 16)), (1024, (1, 4)), (16384, ())):
        monkeypatch.setattr(BinaryIndex, "candidates", lambda self, k, n=candidates: n)
        paths = {count: index.path(count, 10) for count in (1, 2, 4, 8, 16, 32, 64)}
        scanned = [count for count, path in paths.items() if path == "scan"]
        assert set(scanned) <= {1, 2, 4, 8, 16}
        assert scanned == sorted(paths)[: len(scanned)]  # more queries never bring the scan back
        assert (len(scanned) > 0) == bool(counts)
    assert found >= 10


def test_scans_that_prove_little_are_given_up(monkeypatch):
    """Whether it is the index's own vectors that say so, or the queries that are asked; the results stay the same."""
    monkeypatch.setattr(int8, "_scan_cost", lambda *args: 0.1)
    monkeypatch.setattr(int8, "_GROUP_COST", 0)
    vectors, queries = _units(4000), _units(200, seed=3)
    index = Int8Index(vectors)
    expected = index.exact.search(queries[:4], 10)
    assert index.path(4, 10) == "scan"
    assert index.proofs(10).share > 0.9
    monkeypatch.setattr(
        Int8Index,
        "_scan",
        lambda self, asked, k, groups: (*self.exact.search(asked, k), np.zeros(len(asked), bool)),
    )
    for _ in range(20):
        found = index.search(queries[:4], 10)
        np.testing.assert_array_equal(found[1], expected[1])
    assert index.path(4, 10) == "exact"
    copies = Int8Index(np.tile(_units(1), (8000, 1)))  # no scan tells copies apart
    assert copies.path(1, 10) == "exact"


@on_cpu
def test_the_exact_index_says_what_it_multiplies(monkeypatch):
    index = DenseIndex(_units(5000))
    assert index.path(4, 10) == "exact"
    monkeypatch.setattr(exact_index, "cpu_flags", lambda: ("amx_bf16",))
    assert [index.product_dtype(count, 10) for count in (1, 31, 32, 1024)] == ["float32"] * 2 + [
        "bfloat16"
    ] * 2
    assert index.product_dtype(32, 100) == "float32"  # too few rows for groups
    monkeypatch.setattr(exact_index, "cpu_flags", lambda: ("avx2",))
    assert index.product_dtype(32, 10) == "float32"


def test_queries_that_float32_does_not_hold_are_refused():
    with pytest.raises(UserError, match="NaN or infinity"):
        DenseIndex(_units(20)).search(np.full((1, 48), 1e300), 3)


@pytest.mark.parametrize("tiles", [False, True])
def test_few_dimensions_are_not_scanned_in_8_bits(tiles, monkeypatch):
    """What a row costs beside its products does not shrink with them: at 16 dimensions a scan was slower (LOG.md)."""
    monkeypatch.setattr("rag.index.dense.int8.native.has_tiles", lambda dim: tiles)

    class Large(Int8Index):
        def __len__(self):
            return 200_000

        def proofs(self, k):
            return Proofs(groups=20, proven=32, asked=32)

    ways = [Large(_units(64, dim=dim)).path(1, 10) for dim in (8, 16, 384)]
    assert ways == ["exact", "exact", "scan"]
