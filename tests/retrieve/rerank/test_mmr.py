"""MMR against a plain greedy loop in float64, its edge cases, and its independence of the batch."""

from collections.abc import Sequence

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.retrieve.collection import Collection
from rag.retrieve.rerank import Reranker, mmr
from rag.retrieve.rerank.mmr import MMR
from rag.types import Hit, UserError
from tests.tiny_collections import collection_of

DIM = 12


class Known(BagOfWords):
    """An embedder that knows these passages and questions."""

    def __init__(self, vectors: np.ndarray, queries: dict[str, np.ndarray]):
        super().__init__()
        self.dim, self._vectors, self._queries = DIM, vectors, queries

    def encode(self, texts: Sequence[str], progress=None) -> np.ndarray:
        return self._vectors

    def encode_queries(self, texts: Sequence[str]) -> np.ndarray:
        return np.array([self._queries[text] for text in texts], np.float32).reshape(-1, DIM)


def unit(vectors: np.ndarray) -> np.ndarray:
    return (vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)).astype(np.float32)


def collection_with(vectors: np.ndarray, queries: dict[str, np.ndarray]) -> Collection:
    """Return the passages "0", "1" ... with these vectors, and an embedder that knows these questions."""
    return collection_of([str(i) for i in range(len(vectors))], Known(vectors, queries))


def plain_mmr(relevance: np.ndarray, vectors: np.ndarray, weight: float) -> list[tuple[int, float]]:
    """By the definition; before anything is taken the nearest taken passage is as far as can be."""
    taken, left = [], list(range(len(relevance)))
    while left:
        gains = [
            weight * relevance[i]
            - (1 - weight) * max((float(vectors[i] @ vectors[j]) for j, _ in taken), default=-1.0)
            for i in left
        ]
        best = int(np.argmax(gains))
        taken.append((left.pop(best), gains[best]))
    return taken


def random_case(seed: int, passages: int, questions: int):
    rng = np.random.default_rng(seed)
    vectors = unit(rng.normal(size=(passages, DIM)))
    queries = {f"q{i}": vector for i, vector in enumerate(unit(rng.normal(size=(questions, DIM))))}
    return collection_with(vectors, queries), vectors.astype(np.float64), queries, rng


def ranked(collection: Collection, rows, scores=None) -> list[Hit]:
    rows = [int(row) for row in rows]
    return collection.hits(rows, [-float(i) for i in range(len(rows))] if scores is None else scores)


@pytest.mark.parametrize("weight", [0, 0.3, 0.5, 0.9, 1])
@pytest.mark.parametrize("count", [1, 2, 15, 16, 17, 40])
def test_it_is_the_greedy_choice(weight, count):
    collection, vectors, queries, rng = random_case(count, 40, 1)
    rows = rng.permutation(40)[:count]
    [hits] = MMR(weight).rerank(collection, ["q0"], [ranked(collection, rows)])
    wanted = plain_mmr(vectors[rows] @ queries["q0"], vectors[rows], weight)
    assert [hit.chunk.text for hit in hits] == [str(rows[i]) for i, _ in wanted]
    assert [hit.score for hit in hits] == pytest.approx([gain for _, gain in wanted], abs=1e-5)


def test_the_score_as_relevance():
    collection, vectors, _, rng = random_case(5, 20, 1)
    rows, scores = rng.permutation(20)[:9], np.sort(rng.normal(size=9) * 30)[::-1]
    [hits] = MMR(0.6, "score").rerank(collection, ["q0"], [ranked(collection, rows, scores)])
    relevance = (scores - scores.min()) / (scores.max() - scores.min())
    assert [hit.chunk.text for hit in hits] == [
        str(rows[i]) for i, _ in plain_mmr(relevance, vectors[rows], 0.6)
    ]


@pytest.mark.parametrize("relevance", ["cosine", "score"])
def test_scores_never_rise_so_the_ranking_survives_sorting(relevance):
    collection, _, _, rng = random_case(7, 60, 3)
    found = [ranked(collection, rng.permutation(60)[:n]) for n in (60, 33, 2)]
    for hits in MMR(0.4, relevance).rerank(collection, ["q0", "q1", "q2"], found):
        scores = [hit.score for hit in hits]
        assert all(np.isfinite(scores))
        assert scores == sorted(scores, reverse=True)


def test_a_repeated_passage_waits_for_another_subject():
    axes = np.eye(DIM, dtype=np.float32)
    near = unit(axes[0] + 0.1 * axes[1])
    other = unit(axes[0] * 0.5 + axes[2])
    collection = collection_with(np.stack([near, near, other]), {"q": axes[0]})
    found = [ranked(collection, [0, 1, 2])]
    assert [hit.chunk.text for hit in MMR(0.5).rerank(collection, ["q"], found)[0]] == ["0", "2", "1"]
    assert [hit.chunk.text for hit in MMR(1).rerank(collection, ["q"], found)[0]] == ["0", "1", "2"]


def test_ties_keep_the_order_that_they_came_in():
    same = np.tile(np.eye(DIM, dtype=np.float32)[0], (20, 1))
    collection = collection_with(same, {"q": same[0]})
    order = [7, 3, 19, 0, 11]
    [hits] = MMR(0.5).rerank(collection, ["q"], [ranked(collection, order)])
    assert [hit.chunk.text for hit in hits] == [str(row) for row in order]


def test_one_hit_no_hits_no_questions():
    collection, _, _, _ = random_case(1, 5, 2)
    hits = MMR().rerank(collection, ["q0", "q1"], [ranked(collection, [4]), []])
    assert [[hit.chunk.text for hit in found] for found in hits] == [["4"], []]
    assert MMR().rerank(collection, [], []) == []


@pytest.mark.parametrize("relevance", ["cosine", "score"])
def test_a_question_does_not_depend_on_its_batch(relevance):
    collection, _, queries, rng = random_case(3, 50, 21)
    questions = list(queries)
    found = [ranked(collection, rng.permutation(50)[: 1 + (11 * i) % 50]) for i in range(21)]
    together = MMR(0.5, relevance).rerank(collection, questions, found)
    for i in (0, 9, 20):
        assert MMR(0.5, relevance).rerank(collection, [questions[i]], [found[i]]) == [together[i]]


def test_few_programs_serve_many_questions():
    collection, _, queries, rng = random_case(4, 50, 30)
    mmr._take_all.clear_cache()
    found = [ranked(collection, rng.permutation(50)[: int(n)]) for n in rng.integers(1, 50, 30)]
    MMR().rerank(collection, list(queries), found)
    MMR(0.2).rerank(collection, list(queries)[:3], found[:3])
    assert mmr._take_all._cache_size() <= 3  # 16, 32 and 64 candidates


def test_equal_options_make_equal_rerankers():
    assert isinstance(MMR(), Reranker)
    assert MMR(1) == MMR(1.0)
    assert MMR.depends_on == ("embedder",)


@pytest.mark.parametrize(
    ("options", "setting"),
    [
        ({"weight": 1.5}, "weight=1.5"),
        ({"weight": -1}, "weight=-1"),
        ({"weight": float("nan")}, "weight=nan"),
    ],
)
def test_a_bad_weight_is_named(options, setting):
    with pytest.raises(UserError, match=setting):
        MMR(**options)
