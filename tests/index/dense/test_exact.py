"""Exact search against a stable sort of float64 scores, through every program that a batch can take."""

import jax.numpy as jnp
import numpy as np
import pytest

from rag.bench.timing import compiled_temp_bytes
from rag.index import writer
from rag.index.dense import exact as exact_index
from rag.index.dense import refine
from rag.index.dense.exact import DenseIndex
from rag.types import UserError
from tests.ops.test_topk import on_cpu, sorted_lengths, topk_operands
from tests.reference import SEARCH_TOLERANCE, top_k_oracle

# N, Q, k: all scores at once; in blocks of queries; by group maxima, of one block of rows, of several, with rest.
CASES = [
    (0, 3, 5), (0, 40, 5), (1, 1, 1), (3, 1, 10), (31, 5, 4), (2500, 9, 10), (2500, 40, 10), (300, 33, 300),
    (4096, 9, 16), (5003, 33, 2), (12007, 70, 10), (20011, 300, 1),
]  # fmt: skip


def _integers(rows: int, dim: int = 4) -> np.ndarray:
    """Vectors whose products are exact in any order of summing, and tie often."""
    return np.random.default_rng(rows).integers(-2, 3, (rows, dim)).astype(np.float32)


def _units(rows: int, dim: int = 24, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng([seed, rows]).standard_normal((rows, dim)).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)


def _float64_scores(queries, vectors) -> np.ndarray:
    return queries.astype(np.float64) @ vectors.astype(np.float64).T


@pytest.mark.parametrize(("n", "queries", "k"), CASES)
def test_ties_go_to_the_lower_row(n, queries, k):
    vectors, questions = _integers(n), _integers(queries + 1000)[:queries]
    scores, ids = DenseIndex(vectors).search(questions, k)
    expected_scores, expected_ids = top_k_oracle(_float64_scores(questions, vectors), k)
    np.testing.assert_array_equal(ids, expected_ids)
    np.testing.assert_array_equal(scores, expected_scores)
    assert (scores.dtype, ids.dtype) == (np.float32, np.int32)


@pytest.mark.parametrize(("n", "queries", "k"), CASES)
def test_recall_is_one(n, queries, k):
    vectors, questions = _units(n), _units(queries, seed=1)
    scores, ids = DenseIndex(vectors).search(questions, k)
    exact = _float64_scores(questions, vectors)
    expected, _ = top_k_oracle(exact, k)
    found = np.take_along_axis(exact, ids, axis=1)
    np.testing.assert_allclose(scores, found, atol=SEARCH_TOLERANCE)
    np.testing.assert_allclose(found, expected, atol=SEARCH_TOLERANCE)
    assert all(len(set(row)) == len(row) for row in ids.tolist())
    assert np.all(np.diff(scores, axis=1) <= 0)


def test_many_rows_are_many_programs(monkeypatch):
    monkeypatch.setattr(exact_index, "_BLOCKS", 2)
    vectors, questions = _integers(20011), _integers(40)
    _, ids = DenseIndex(vectors).search(questions, 10)
    np.testing.assert_array_equal(ids, top_k_oracle(_float64_scores(questions, vectors), 10)[1])


@pytest.mark.parametrize("queries", [1, 7, 17, 33])
def test_the_pure_function_takes_any_number_of_queries(queries):
    for n, k in ((50, 3), (8200, 2)):
        vectors, questions = _integers(n), _integers(queries + 1000)[:queries]
        scores, ids = exact_index.search(vectors, questions, k)
        expected = top_k_oracle(_float64_scores(questions, vectors), k)
        np.testing.assert_array_equal(ids, expected[1])
        np.testing.assert_array_equal(scores, expected[0])


def _proofs(vectors, questions, k) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return DenseIndex(vectors)._prove(questions, k)


@on_cpu
@pytest.mark.parametrize(
    ("n", "dim", "queries", "k"), [(6000, 24, 40, 10), (12007, 384, 33, 3), (30000, 48, 70, 100)]
)
def test_what_bfloat16_proves_is_exact(n, dim, queries, k):
    """Whether or not this processor would be asked to: against the products in full, and float64."""
    vectors, questions = _units(n, dim), _units(queries, dim, seed=1)
    scores, ids, proven = _proofs(vectors, questions, k)
    full = DenseIndex(vectors)._search_in_full(questions, k)
    assert proven.mean() > 0.5
    np.testing.assert_array_equal(scores[proven], full[0][proven])
    np.testing.assert_array_equal(ids[proven], full[1][proven])
    expected, _ = top_k_oracle(_float64_scores(questions, vectors), k)
    np.testing.assert_allclose(scores[proven], expected[proven], atol=SEARCH_TOLERANCE)


@on_cpu
def test_bfloat16_proves_nothing_that_rounding_hides():
    """Rows that bfloat16 cannot tell apart, more than are looked at: only float32 knows which is best."""
    vectors, question = _units(20000, 64), _units(1, 64, seed=3)
    near = np.arange(5, 20000, 40)
    vectors[near] = question + 1e-4 * _units(len(near), 64, seed=4)
    questions = np.concatenate([question, _units(39, 64, seed=1)])
    _, _, proven = _proofs(vectors, questions, 10)
    assert not proven[0]
    exact = _float64_scores(questions, vectors)
    scores, ids = DenseIndex(vectors).search(questions, 10)
    found = np.take_along_axis(exact, ids, axis=1)
    np.testing.assert_allclose(found, top_k_oracle(exact, 10)[0], atol=SEARCH_TOLERANCE)
    np.testing.assert_allclose(scores, found, atol=SEARCH_TOLERANCE)


@on_cpu
@pytest.mark.parametrize("flags", [(), ("avx512_bf16",)])
def test_processors_with_and_without_bfloat16_agree(monkeypatch, flags):
    monkeypatch.setattr(exact_index, "cpu_flags", lambda: flags)
    asked = []
    prove = DenseIndex._prove
    monkeypatch.setattr(DenseIndex, "_prove", lambda *args: asked.append(1) or prove(*args))
    vectors, questions = _integers(5003), _integers(1040)
    scores, ids = DenseIndex(vectors).search(questions, 2)
    expected = top_k_oracle(_float64_scores(questions, vectors), 2)
    np.testing.assert_array_equal(ids, expected[1])
    np.testing.assert_array_equal(scores, expected[0])
    assert bool(asked) == bool(flags)


@on_cpu
def test_maxima_beyond_the_room_are_taken_in_batches(monkeypatch):
    monkeypatch.setattr(exact_index, "_MAXIMA_BYTES", 100_000)
    vectors, questions = _integers(5003), _integers(1070)[:70]
    index = DenseIndex(vectors)
    assert index._batch == 32
    np.testing.assert_array_equal(
        index.search(questions, 2)[1], top_k_oracle(_float64_scores(questions, vectors), 2)[1]
    )


@on_cpu
def test_a_result_does_not_depend_on_the_batch():
    vectors, questions = _units(12007, 384), _units(300, 384, seed=1)
    index = DenseIndex(vectors)
    whole_scores, whole_ids = index.search(questions, 10)
    for size in (1, 2, 5, 8, 9, 33, 100):
        scores, ids = index.search(questions[:size], 10)
        np.testing.assert_array_equal(ids, whole_ids[:size])
        np.testing.assert_array_equal(scores, whole_scores[:size])


@on_cpu
@pytest.mark.parametrize("queries", [1, 40])
def test_equal_vectors_tie(queries):
    """Also where another rounding could tell them apart: among thousands of others, at every alignment."""
    vectors = _units(5001, 384)
    copies = np.arange(7, 5001, 551)
    question = _units(1, 384, seed=2)
    vectors[copies] = question * np.float32(0.9999)
    scores, ids = DenseIndex(vectors).search(np.repeat(question, queries, axis=0), len(copies))
    np.testing.assert_array_equal(ids, np.tile(copies, (queries, 1)))
    assert len(np.unique(scores)) == 1


def test_batches_of_all_sizes_share_few_programs():
    index = DenseIndex(_units(50))
    before = exact_index.search._cache_size()
    for size in range(34):
        scores, ids = index.search(_units(max(size, 1), seed=1)[:size], 3)
        assert scores.shape == ids.shape == (size, 3)
    assert exact_index.search._cache_size() - before <= 7  # 1, 2, 4, 8, 16, 32, 64 rows


@on_cpu
def test_a_memory_map_is_not_copied(tmp_path):
    np.save(tmp_path / "vectors.npy", _units(100))
    mapped = np.load(tmp_path / "vectors.npy", mmap_mode="r")
    index = DenseIndex(mapped)
    assert index.rows.unsafe_buffer_pointer() == mapped.ctypes.data
    expected = top_k_oracle(_float64_scores(_units(2, seed=1), mapped), 3)
    np.testing.assert_array_equal(index.search(_units(2, seed=1), 3)[1], expected[1])


@on_cpu
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("queries", [8, 64, 256])
def test_the_compiled_program(dtype, queries):
    """Chooses in float32 and without sorting scores, and never holds N x Q of them (nor copies the vectors).

    It does hold those of the few queries whose result is in doubt, twice: as they are multiplied and as rows.
    """
    n, dim = 40000, 64
    arguments = jnp.zeros((n, dim), dtype), jnp.zeros((queries, dim), dtype)
    text = exact_index.search.lower(*arguments, 10).compile().as_text()
    operands = topk_operands(text)
    assert len(operands) >= 2
    assert all(operand.startswith("f32[") for operand in operands)
    assert max(sorted_lengths(text)) <= 16
    if queries > refine.FEW and dtype == "float32":
        temporary = compiled_temp_bytes(lambda v, q: exact_index.search(v, q, 10), *arguments)
        assert temporary < 4 * n * (2 * refine.FEW + queries / 8)


def test_bad_queries_are_refused():
    index = DenseIndex(_units(10))
    questions = _units(2)
    with pytest.raises(UserError, match="have 23 dimensions and the index has 24"):
        index.search(questions[:, :23], 3)
    with pytest.raises(UserError, match="NaN or infinity"):
        index.search(np.where(questions > 0, questions, np.nan).astype(np.float32), 3)
    with pytest.raises(UserError, match="k of 1 or more"):
        index.search(questions, 0)


def test_a_query_of_zeros_takes_the_first_rows():
    scores, ids = DenseIndex(_units(100)).search(np.zeros((1, 24), np.float32), 4)
    np.testing.assert_array_equal(ids, [[0, 1, 2, 3]])
    np.testing.assert_array_equal(scores, np.zeros((1, 4)))


def test_vectors_without_a_cosine_are_refused(monkeypatch):
    monkeypatch.setattr(writer, "_CHECKED_ROWS", 16)
    writer.check_vectors(_units(50))
    writer.check_vectors(np.zeros((0, 8), np.float32))
    for value, message in (
        (np.nan, "holds NaN"),
        (np.inf, "holds NaN or infinity"),
        (0.0, "has length 0 inst"),
    ):
        vectors = _units(50)
        vectors[37] = value
        with pytest.raises(UserError, match=f"Vector 37 of 50 {message}"):
            writer.check_vectors(vectors)
    with pytest.raises(UserError, match="Vector 0 of 50 has length 3 instead of 1"):
        writer.check_vectors(3 * _units(50))
