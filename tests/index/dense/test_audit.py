"""The audit of a vector index: the share of the exact results that it finds, with its lower bound."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rag.index.dense.audit import audit, mixed_queries, sample_pairs, wilson
from rag.index.dense.exact import DenseIndex
from rag.index.dense.matryoshka import Matryoshka


def unit_vectors(rows: int, dim: int = 32, seed: int = 0) -> np.ndarray:
    vectors = np.random.default_rng([seed, rows]).standard_normal((rows, dim))
    return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)


def best_rows(vectors: np.ndarray, query: np.ndarray, k: int, left_out: set[int]) -> list[int]:
    """Return the k rows of highest product with the query that are not left out, by sorting all of them."""
    scores = vectors.astype(np.float64) @ query.astype(np.float64)
    return [row for row in np.argsort(-scores).tolist() if row not in left_out][:k]


def test_an_audit_counts_the_rows_that_an_index_does_not_have():
    vectors, queries = unit_vectors(1000), unit_vectors(30, seed=8)
    found = audit(DenseIndex(vectors[:600]), DenseIndex(vectors), queries, 10)
    expected = [row for query in queries for row in best_rows(vectors, query, 10, set())]
    assert found.recall == pytest.approx(np.mean(np.array(expected) < 600))
    assert found.at_least < found.recall
    assert audit(DenseIndex(vectors), DenseIndex(vectors), queries, 10).recall == 1.0


@given(st.integers(3, 300), st.integers(1, 12), st.integers(1, 40), st.integers(0, 9))
def test_the_rows_that_a_query_is_made_of_do_not_count(rows, k, count, seed):
    """A naive count over the other rows gives the same recall, for an index that finds few of them."""
    vectors = unit_vectors(rows, 8, seed)
    exact, index = DenseIndex(vectors), Matryoshka(dims=2, candidates=1).build(vectors)
    pairs = sample_pairs(rows, count, seed)
    queries = mixed_queries(exact, pairs)
    shares = []
    for query, (first, second) in zip(queries, pairs.tolist(), strict=True):
        left_out = {first, second}
        wanted = best_rows(vectors, query, k, left_out)[: rows - 2]
        found = [row for row in index.search(query[None], k + 2)[1][0].tolist() if row not in left_out][:k]
        shares.append(len(set(found) & set(wanted)) / len(wanted))
    audited = audit(index, exact, queries, k, sources=pairs)
    assert audited.recall == pytest.approx(np.mean(shares))
    assert (audited.queries, audited.k) == (min(count, rows), min(k, rows - 2))


def test_a_query_is_nearest_to_the_first_row_of_its_pair():
    exact = DenseIndex(unit_vectors(500))
    pairs = sample_pairs(500, 64, seed=3)
    assert exact.search(mixed_queries(exact, pairs), 1)[1][:, 0].tolist() == pairs[:, 0].tolist()
    assert sorted(pairs[:, 0]) == sorted(pairs[:, 1]) and len(set(pairs[:, 0].tolist())) == 64
    assert len(sample_pairs(5, 64, seed=3)) == 5


def test_an_audit_needs_queries_and_other_rows_than_theirs():
    exact = DenseIndex(unit_vectors(2))
    with pytest.raises(ValueError, match="needs queries"):
        audit(exact, exact, np.zeros((0, 32), np.float32), 10)
    pairs = sample_pairs(2, 2, seed=0)
    with pytest.raises(ValueError, match="more rows than a query is made of"):
        audit(exact, exact, mixed_queries(exact, pairs), 10, sources=pairs)


def test_wilsons_bound():
    """Solves (p - b)^2 = z^2 b (1 - b) / n, from below; worked for n = 50."""
    for share in (0.5, 0.9, 1.0):
        bound = wilson(share, 50)
        assert bound < share
        assert (share - bound) ** 2 == pytest.approx(1.6448536**2 * bound * (1 - bound) / 50)
    assert wilson(1.0, 50) == pytest.approx(1 / (1 + 1.6448536**2 / 50))
