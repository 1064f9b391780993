"""What the searches' proofs rest on, with vectors chosen against them: no term of a bound can be left out.

Each adversary hides the best row of a query where the cheap first pass does not see it: all that is lost to
rounding is lost to that row, as much as one term of the proof allows for. Decoys that score a little less fill the
groups that are looked at. A proof that forgets the term, or takes it too small, calls the decoys proven.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.index.dense import cost, exact, int8, refine
from rag.index.dense.binary import Binary, BinaryIndex
from rag.index.dense.exact import DenseIndex
from rag.index.dense.int8 import Int8Index, Int8Scan
from rag.index.dense.matryoshka import Matryoshka, MatryoshkaIndex
from rag.ops.linear import by_digits
from tests.ops.test_topk import on_cpu
from tests.reference import SEARCH_TOLERANCE, top_k_oracle

UNIT = np.float32(2.0**-12)  # of a row's 8 bits, when its largest entry is 127 of it: exact in float32


def _exact(queries: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


def _returned(vectors: np.ndarray, queries: np.ndarray) -> np.ndarray:
    """The score that a search returns for each query and row, whichever way it found them."""
    products = jax.jit(refine.products)
    few = [queries[start : start + 4] for start in range(0, len(queries), 4)]
    return np.concatenate(
        [np.asarray(products(vectors, np.resize(some, (4, some.shape[1])))).T[: len(some)] for some in few]
    )


def _reference(vectors: np.ndarray, queries: np.ndarray, k: int) -> tuple[np.ndarray, np.ndarray]:
    """The k best by the scores that are returned, every row of them: what "exact" means to the last bit."""
    every = _returned(vectors, queries)
    np.testing.assert_allclose(
        every, _exact(queries, vectors), atol=SEARCH_TOLERANCE * max(1, np.abs(every).max(initial=0))
    )
    return top_k_oracle(every, k)


def _assert_same(found, expected):
    np.testing.assert_array_equal(found[1], expected[1])
    np.testing.assert_array_equal(found[0], expected[0])


def _hide(hidden: np.ndarray, decoy: np.ndarray, other: np.ndarray, group: int, groups: int) -> np.ndarray:
    """A row of decoys in each of the first `groups` groups; the hidden row far behind them."""
    vectors = np.tile(other, (4096, 1)).astype(np.float32)
    vectors[np.arange(groups) * group + 3] = decoy
    vectors[3001] = hidden
    return vectors


def _assert_not_fooled(index: DenseIndex | Int8Index, query: np.ndarray, scan) -> None:
    """The hidden row wins, and a scan that misses it says that it proved nothing."""
    for count in (1, 2, 8):  # the products of one query are another program
        queries = np.tile(query, (count, 1))
        _, ids, proven = scan(queries)
        assert np.all((ids[:, 0] == 3001) | ~proven)
        np.testing.assert_array_equal(index.search(queries, 1)[1], 3001)


# --- 8 bits -------------------------------------------------------------------------------------------------


def _scan(index: Int8Index):
    return lambda queries: index._scan(queries, 1, groups=2)


@on_cpu
def test_what_8_bits_leave_out_of_a_row_may_all_be_the_querys(monkeypatch):
    """|q| |x - x'|: every entry of the row is just under half a step above its 8 bits, along the query."""
    monkeypatch.setattr(cost, "pays", lambda *args: True)
    query = np.ones((1, 64), np.float32)
    query[0, 0] = 0
    hidden, decoy, other = np.full((3, 64), 10, np.float32)
    hidden[1:] += 0.5 - 2.0**-10
    decoy[1:32] += 1  # 31 more in all, where the hidden row has 31.44
    hidden[0] = decoy[0] = other[0] = 127
    vectors = _hide(hidden * UNIT, decoy * UNIT, other * UNIT, 16, groups=2)
    index = Int8Index(vectors, Int8Scan(1))
    codes = np.asarray(index._codes.values)
    np.testing.assert_array_equal(codes[3001], other)  # all was lost
    np.testing.assert_array_equal(codes[3], decoy)
    _assert_not_fooled(index, query, _scan(index))


@on_cpu
def test_what_two_digits_leave_out_of_a_query_may_all_be_the_rows(monkeypatch):
    """|q - q'| |x'|: every entry but the largest is just under half a step of the second digit, along the row."""
    monkeypatch.setattr(cost, "pays", lambda *args: True)
    query = np.full((1, 384), (0.5 - 2.0**-8) / (127 * 254), np.float32)
    query[0, 0] = 1
    hidden = np.full(384, 127, np.float32)
    decoy = np.where(np.arange(384) == 0, 127, 114).astype(np.float32)
    other = np.where(np.arange(384) == 0, 100, 127).astype(np.float32)
    vectors = _hide(hidden * UNIT, decoy * UNIT, other * UNIT, 16, groups=2)
    index = Int8Index(vectors, Int8Scan(1))
    product = np.asarray(by_digits(jnp.asarray(query), jnp.asarray(hidden[None].astype(np.int8))))
    np.testing.assert_allclose(product, 127, rtol=1e-6)  # all was lost
    _assert_not_fooled(index, query, _scan(index))


@settings(max_examples=40, deadline=None)
@given(dim=st.sampled_from([1, 2, 3, 64, 384]), seed=st.integers(0, 2**32 - 1), half=st.booleans())
def test_what_digits_leave_out_is_no_more_than_is_said(dim, seed, half):
    """In float64, with each entry anywhere, or nearly half a step from the digits; and it can be nearly as much."""
    rng = np.random.default_rng(seed)
    query = rng.uniform(-1, 1, dim)
    if half:
        query = (np.round(query * 127 * 254) + 0.5 - 2.0**-7) / (127 * 254)
    query[0] = 1
    queries = query[None].astype(np.float32)
    rounded = np.asarray(by_digits(jnp.asarray(queries), jnp.eye(dim, dtype=jnp.int8)))
    lost = np.linalg.norm(queries.astype(np.float64) - rounded)
    said = int8._rounding_error(queries)[0]
    assert (
        lost <= said * 1.005
    )  # an entry's quotient by the step is rounded, too: refine.rounding allows for that
    if half and dim > 3:
        assert lost > 0.95 * said


@pytest.mark.parametrize("dim", [3, 64, 384, 1024])
def test_a_row_in_8_bits_can_be_longer_than_itself(dim):
    """|x'|: entries that round up. The longest row is bounded as it is and as it is rounded."""
    steps = max(1, round(127 / dim**0.5))
    longer = np.full((1, dim), steps + 0.5 + 2.0**-8, np.float32) * UNIT
    longer[0, 0] = 127 * UNIT
    shorter = np.full((1, dim), steps + 0.5 - 2.0**-8, np.float32) * UNIT
    shorter[0, 0] = 127 * UNIT
    for row, up in ((longer, 1), (shorter, 0)):
        index = Int8Index(row)
        codes = np.asarray(index._codes.values, np.float64)[0]
        assert codes[1] == steps + up
        rounded = np.linalg.norm(codes * np.float64(UNIT))
        itself = np.linalg.norm(row.astype(np.float64))
        assert (rounded > itself) == bool(up)
        assert index._longest * (1 + refine.rounding(dim)) >= max(rounded, itself)


@on_cpu
@settings(max_examples=20, deadline=None)
@given(dim=st.sampled_from([1, 5, 64, 1024]), seed=st.integers(0, 2**32 - 1))
def test_no_bound_is_below_a_score_and_rounding_is_allowed_for(dim, seed):
    """Against the scores that are returned and those of float64; the room that is left for rounding is needed."""
    rng = np.random.default_rng(seed)
    vectors = (rng.standard_normal((256, dim)) * rng.uniform(0.1, 3, (256, 1))).astype(np.float32)
    queries = (rng.standard_normal((4, dim)) * 5).astype(np.float32)
    index = Int8Index(vectors)
    operands, by_native = index._queries(queries), int8.native.has_tiles(dim)
    bounds, slack = np.asarray(int8._bounds(index._codes, operands, by_native)), np.asarray(operands.slack)
    returned = _returned(vectors, queries)
    for scores in (returned, _exact(queries, vectors)):
        assert np.all(scores.reshape(4, -1, 16).max(axis=2) <= bounds + slack[:, None])
    rounded = np.abs(returned - _exact(queries, vectors)).max(axis=1)
    assert np.all(slack - int8._rounding_error(queries) * index._longest >= rounded)


@pytest.mark.parametrize("dim", [1, 2, 64, 1024, 8192])
def test_rounding_covers_the_worst_order_of_summing(dim):
    """One sum from the first product to the last, of products that nearly all round the same way."""
    start = 2.0 ** (2 * ((dim - 1).bit_length() // 2 + 1))  # no less than the rest will add
    for part in (0.51, 0.75, 0.9):  # of the step of what is summed: each product rounds up
        left, right = np.ones((2, dim), np.float32)
        right[1:] += part * start * 2.0**-23
        left[0] = right[0] = start**0.5
        total = np.add.accumulate(left * right)[-1]
        true = np.dot(left.astype(np.float64), right.astype(np.float64))
        allowed = refine.rounding(dim) / 2 * np.linalg.norm(left) * np.linalg.norm(right)
        assert abs(float(total) - true) <= allowed


# --- float32 ------------------------------------------------------------------------------------------------


@on_cpu
@pytest.mark.parametrize("dim", [24, 100, 385])
@pytest.mark.parametrize("distance", [0.0, 1e-7, 1e-6])
def test_near_duplicates_are_ordered_by_the_scores_that_are_returned(dim, distance, monkeypatch):
    """Rows as close to each other as rounding, or equal, fifty about each of 12 queries, in groups of their own: each
    program rounds them otherwise."""
    monkeypatch.setattr(cost, "pays", lambda *args: True)
    rng = np.random.default_rng([dim, 4300])
    vectors, queries, noise = (rng.standard_normal((n, dim)) for n in (4300, 40, 614))
    queries /= np.linalg.norm(queries, axis=1, keepdims=True)
    near = np.resize(queries[:12] + 0.3 * noise[:12] / dim**0.5, noise.shape)
    vectors[3::7] = near + distance * noise / dim**0.5
    vectors = (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
    queries = queries.astype(np.float32)
    expected = _reference(vectors, queries, 10)
    for index in (DenseIndex(vectors), Int8Index(vectors)):
        for count in (1, 2, 5, 8, 9, 31, 40):
            _assert_same(index.search(queries[:count], 10), [part[:count] for part in expected])
        for q in range(1, 12):
            _assert_same(index.search(queries[q : q + 1], 10), [part[q : q + 1] for part in expected])


@on_cpu
@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    n=st.integers(1, 64),
    k=st.sampled_from([1, 3]),
    groups=st.integers(1, 4),
)
def test_groups_prove_only_what_no_other_group_can_change(seed, n, k, groups):
    """With the best possible bounds, the scores themselves, that tie across the borders of groups."""
    rng = np.random.default_rng(seed)
    vectors, queries = (rng.integers(-2, 3, (rows, 2)).astype(np.float32) for rows in (n, 3))
    scores, k = _exact(queries, vectors).astype(np.float32), min(k, n)
    bounds = scores[:, : n // 8 * 8].reshape(3, -1, 8).max(axis=2)
    found = refine.best_of_groups(
        *map(jnp.asarray, (vectors, queries, bounds, np.zeros(3, np.float32))),
        k=k,
        group=8,
        groups=groups,
    )
    best, ids, proven = map(np.asarray, found)
    expected = top_k_oracle(scores, k)
    for q in np.flatnonzero(proven):
        np.testing.assert_array_equal(ids[q], expected[1][q])
        np.testing.assert_array_equal(best[q], expected[0][q])
    if groups * 8 >= n:
        assert proven.all()  # every row was looked at


# --- bfloat16 -----------------------------------------------------------------------------------------------


def _prove(index: DenseIndex):
    return lambda queries: index._prove(queries, 1)


@on_cpu
def test_what_bfloat16_leaves_out_of_a_row_may_all_be_the_querys():
    """|q| |x - x'|: every entry of the hidden row is nearly half a step above what bfloat16 keeps."""
    query = np.ones((1, 64), np.float32)
    other = np.full(64, 0.5)
    hidden = np.full(64, 1 + 2.0**-8 - 2.0**-14)
    decoy = np.where(np.arange(64) < 31, 1 + 2.0**-7, 1)  # 0.97 of what the hidden row has above 1
    vectors = _hide(hidden, decoy, other, 8, groups=9)
    _assert_not_fooled(DenseIndex(vectors), query, _prove(DenseIndex(vectors)))


@on_cpu
def test_what_bfloat16_leaves_out_of_a_query_may_all_be_the_rows():
    """|q - q'| |x'|: the hidden row lives where the query is nearly half a step above what bfloat16 keeps."""
    first = np.arange(64) < 32
    query = np.where(first, 1 + 2.0**-8 - 2.0**-14, 1)[None].astype(np.float32)
    hidden = np.where(first, 1, 0)
    decoy = np.where(
        first, 0, np.where(np.arange(64) < 61, 1, 1 + 2.0**-5)
    )  # 3/32 above 32, where 1/8 is hidden
    other = np.where(first, 0.5, 0)
    vectors = _hide(hidden, decoy, other, 8, groups=9)
    _assert_not_fooled(DenseIndex(vectors), query, _prove(DenseIndex(vectors)))


@on_cpu
@pytest.mark.parametrize("up", [False, True])
def test_bfloat16s_errors_and_lengths_are_those_of_the_worst_row(up):
    """In float64, with rows that become longer, or shorter, by nearly half a step; the last of several blocks."""
    rows = np.full((4104, 16), 0.5, np.float32)
    rows[4100] = 1 + 2.0**-8 + (2.0**-14 if up else -(2.0**-14))
    index = DenseIndex(rows)
    half = np.asarray(jnp.asarray(rows).astype(jnp.bfloat16)).astype(np.float64)
    error = np.linalg.norm(rows - half, axis=1).max()
    length = np.linalg.norm(half, axis=1).max()
    assert index._bfloat16_bounds.error == pytest.approx(error, rel=1e-5)
    assert index._bfloat16_bounds.length == pytest.approx(length, rel=1e-5)


# --- every size ---------------------------------------------------------------------------------------------

SIZES = [
    1,
    7,
    9,
    15,
    17,
    31,
    100,
    255,
    256,
    257,
    264,
    287,
    511,
    520,
    1025,
]  # blocks of 64 rows, programs of 4 blocks


@on_cpu
@settings(max_examples=15, deadline=None)
@given(
    n=st.sampled_from(SIZES),
    queries=st.sampled_from([1, 3, 8, 9, 31, 32, 33]),
    k=st.sampled_from([1, 2, 4, 33]),
    kind=st.sampled_from(["negative", "ties", "duplicates", "zeros"]),
    seed=st.integers(0, 2**32 - 1),
)
def test_exact_searches_are_exact_at_every_size(n, queries, k, kind, seed):
    """Sizes on both sides of every border; no score above that of the zeros that fill up rows and queries."""
    rng = np.random.default_rng(seed)
    if kind == "negative":
        vectors, asked = -rng.uniform(0.1, 1, (n, 6)), rng.uniform(0.1, 1, (queries, 6))
    elif kind == "duplicates":
        few = rng.standard_normal((3, 6))
        vectors, asked = few[rng.integers(3, size=n)], rng.standard_normal((queries, 6))
    else:
        vectors, asked = (rng.integers(-2, 3, (rows, 6)) for rows in (n, queries))
        vectors = np.where(rng.random((n, 1)) < 0.9 * (kind == "zeros"), 0, vectors)
        asked = np.where(rng.random((queries, 1)) < 0.5 * (kind == "zeros"), 0, asked)
    vectors, asked = vectors.astype(np.float32), asked.astype(np.float32)
    expected = _reference(vectors, asked, k)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "pays", lambda *args: True)
        patch.setattr(exact, "_ROWS", 64)
        patch.setattr(exact, "_BLOCKS", 4)
        for build in (DenseIndex, lambda some: Int8Index(some, Int8Scan(2))):
            _assert_same(build(vectors).search(asked, k), expected)


@on_cpu
@settings(max_examples=8, deadline=None)
@given(
    n=st.sampled_from([1, 9, 31, 33, 513]),
    queries=st.sampled_from([1, 3]),
    k=st.sampled_from([1, 16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_approximate_searches_return_rows_that_exist(n, queries, k, seed):
    """As many as there are, each once, with its exact score, best first; all scores below that of padding."""
    rng = np.random.default_rng(seed)
    vectors, asked = -rng.uniform(0.1, 1, (n, 8)), rng.uniform(0.1, 1, (queries, 8))
    vectors, asked = vectors.astype(np.float32), asked.astype(np.float32)
    every = _returned(vectors, asked)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cost, "pays", lambda *args: True)
        for index in (BinaryIndex(vectors, Binary(sample=4)), MatryoshkaIndex(vectors, Matryoshka(4, 8))):
            scores, ids = index.search(asked, k)
            assert ids.shape == (queries, min(k, n))
            assert np.all((ids >= 0) & (ids < n))
            assert all(len(set(row)) == len(row) for row in ids.tolist())
            np.testing.assert_array_equal(scores, np.take_along_axis(every, ids, axis=1))
            assert np.all(np.diff(scores, axis=1) <= 0)
