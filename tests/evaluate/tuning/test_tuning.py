"""Grids against brute force over dictionaries, nested cross-validation against plain loops."""

import json
import math
from dataclasses import replace
from itertools import product

import numpy as np
import pytest

from rag.embed.bag_of_words import BagOfWords
from rag.evaluate import retrieval
from rag.evaluate.datasets import Dataset
from rag.evaluate.metrics import retrieval as retrieval_metrics
from rag.evaluate.tuning.bm25 import tune_bm25
from rag.evaluate.tuning.cross_validation import nested_cross_validation
from rag.evaluate.tuning.fusion import fusion_points, fusion_values, tune_fusion
from rag.evaluate.tuning.grids import ConvexGrid
from rag.evaluate.tuning.ranking_metric import JudgedCandidates, RankingMetric
from rag.index.fusion import Convex, score_table
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.lexical.weighting import BM25Weights
from rag.index.memory import MemoryIndex
from rag.retrieve.collection import Collection
from rag.retrieve.search import Lexical
from rag.types import Document, UserError, chunk_at
from tests.evaluate.default_options import bm25_grid, convex_grid, rrf_grid, tuning
from tests.reference import metric_oracle, ranking_oracle
from tests.typecheck import unchecked

CLOSE = 1e-5  # float32 against float64
MEASURES = ["nDCG@3", "MRR@10", "Recall@4", "Precision@2", "Success@1", "nDCG@100"]


def some_rankings(queries: int, arms: int, seed: int = 0) -> tuple[dict, dict]:
    """Coarse scores, so that many tie; arms that name few documents, some none; graded and negative qrels."""
    rng = np.random.default_rng(seed)
    rankings, qrels = {}, {}
    for i in range(queries):
        rankings[f"q{i}"] = []
        for arm in range(arms):
            names = rng.permutation(15)[: rng.integers(0, 12)]
            scores = {f"d{name}": int(rng.integers(-2, 6)) / 2 + arm * 7 for name in names}
            rankings[f"q{i}"].append([(name, scores[name]) for name in ranking_oracle(scores)])
        judged = rng.permutation(20)[: rng.integers(1, 6)]
        qrels[f"q{i}"] = {f"d{name}": int(rng.integers(-1, 4)) for name in judged}
    return rankings, qrels


def fused_oracle(arms: list, point: dict, low: float) -> dict[str, float]:
    """Reciprocal ranks, or min-max and its theoretical sister, from their formulas."""
    cut = [arm[:depth] for arm, depth in zip(arms, point.get("depths", [None] * len(arms)), strict=True)]
    fused = {name: 0.0 for arm in cut for name, _ in arm}
    for arm, weight in zip(cut, point["weights"], strict=True):
        values = [score for _, score in arm]
        for rank, (name, score) in enumerate(arm, 1):
            if "constant" in point:
                fused[name] += weight / (point["constant"] + rank)
                continue
            theoretical = point["normalizer"] == "theoretical_min_max"
            least, most = low if theoretical else min(values), max(values)
            flat = float(not theoretical)
            fused[name] += weight * ((score - least) / (most - least) if most > least else flat)
    # Float64 parts what float32, and the exact formula, leave equal.
    return {name: round(score, 6) for name, score in fused.items()}


def point_values(grid, rankings: dict, qrels: dict, name: str, lower_bounds=None) -> np.ndarray:
    tables = [score_table(rankings[query]) for query in sorted(qrels)]
    metric = RankingMetric.named(name)
    judged = JudgedCandidates.of([table.ids for table in tables], [qrels[q] for q in sorted(qrels)], metric)
    return fusion_values(grid, tables, judged, lower_bounds, metric)


@pytest.mark.parametrize(
    "grid",
    [
        rrf_grid(constants=[0, 1, 60], steps=4, depths=[2, 5, 100]),
        convex_grid(normalizers=["min_max", "theoretical_min_max"], steps=4, depths=[7, 2]),
        convex_grid(normalizers=["min_max"], steps=3),
    ],
)
@pytest.mark.parametrize("measure", ["nDCG@3", "MRR@10"])
def test_every_point_has_the_metric_of_the_ranking_by_the_formula(grid, measure):
    rankings, qrels = some_rankings(25, 2)
    points = fusion_points(grid, 2)
    values = point_values(grid, rankings, qrels, measure, lower_bounds=[-2.0])
    name, _, cutoff = measure.partition("@")
    for (i, query), (j, point) in product(enumerate(sorted(qrels)), enumerate(points)):
        ranking = ranking_oracle(fused_oracle(rankings[query], point, -2.0))
        expected = metric_oracle(name, int(cutoff), qrels[query], ranking)
        assert values[i, j] == pytest.approx(expected, abs=CLOSE), (query, point)


@pytest.mark.parametrize("measure", MEASURES)
def test_every_point_has_the_metric_of_a_search_with_its_parameters(measure):
    """All normalisers, three arms: the program that chooses against the code that fuses, and the metrics."""
    rankings, qrels = some_rankings(20, 3, seed=1)
    grid, lower_bounds = convex_grid(steps=2), [-1.0, 6.0, 13.0]
    values = point_values(grid, rankings, qrels, measure, lower_bounds)
    for j, point in enumerate(fusion_points(grid, 3)):
        found = Convex(**point).fuse_batch([rankings[q] for q in sorted(qrels)], lower_bounds)
        run = {q: dict(ranking) for q, ranking in zip(sorted(qrels), found, strict=True)}
        _, per_query = retrieval_metrics.evaluate(qrels, run, [measure])
        expected = [per_query[query][measure] for query in sorted(qrels)]
        np.testing.assert_allclose(values[:, j], expected, atol=CLOSE)


def test_points_are_the_whole_grid_and_nearly_equal_weights_come_first():
    points = fusion_points(rrf_grid(constants=[1, 2], steps=4, depths=[5, 10]), 2)
    assert len(points) == 2 * 4 * 5
    assert points[0] == {"constant": 1.0, "depths": [5, 5], "weights": [0.5, 0.5]}
    assert {tuple(p["weights"]) for p in points} == {(i / 4, 1 - i / 4) for i in range(5)}
    assert len(fusion_points(convex_grid(steps=4), 3)) == 4 * 15
    assert "depths" not in fusion_points(convex_grid(), 2)[0]


def test_a_passage_counts_for_its_document():
    """Rows 0 and 2 are passages of b, row 1 of a: a document has the score of its best passage, once."""
    rankings = {"q": [[(0, 3.0), (2, 2.0), (1, 1.0)]], "r": [[(1, 3.0), (0, 1.0)]]}
    qrels = {"q": {"a": 1}, "r": {"b": 1}}
    options = tuning(rrf_grid(constants=[60]), measure="MRR@10", folds=2)
    tuned = tune_fusion(rankings, qrels, options, document=lambda row: "bab"[int(row)])
    assert tuned.per_query == {"q": 0.5, "r": 0.5}
    assert [fold.train for fold in tuned.folds] == [0.5, 0.5]  # by the program
    assert tuned.run["q"] == pytest.approx({"b": 1 / 61, "a": 1 / 63})


def choose(values: np.ndarray) -> int:
    means = [sum(column) / len(column) for column in values.T.tolist()]
    return next(i for i, mean in enumerate(means) if mean >= max(means) - 1e-6)


def test_no_query_is_judged_by_what_it_helped_to_choose():
    rankings, qrels = some_rankings(23, 2, seed=3)
    grid = rrf_grid(constants=[1.3, 60.7], steps=5)  # no two sums are equal but for rounding
    tuned = tune_fusion(rankings, qrels, tuning(grid, measure="nDCG@3", folds=4, seed=2))
    values = point_values(grid, rankings, qrels, "nDCG@3")
    points, row = fusion_points(grid, 2), {q: i for i, q in enumerate(sorted(qrels))}
    assert sorted(q for fold in tuned.folds for q in fold.queries) == sorted(qrels)
    assert sorted(len(fold.queries) for fold in tuned.folds) == [5, 6, 6, 6]
    for fold in tuned.folds:
        others = [row[query] for query in sorted(qrels) if query not in fold.queries]
        best = choose(values[others])
        assert fold.parameters == points[best]
        assert fold.train == pytest.approx(values[others, best].mean(), abs=CLOSE)
        mine = [row[query] for query in fold.queries]
        assert fold.test == pytest.approx(values[mine, best].mean(), abs=CLOSE)
        for query in fold.queries:
            assert tuned.per_query[query] == pytest.approx(values[row[query], best], abs=CLOSE)
    best = choose(values)
    assert tuned.naive_parameters == points[best]
    assert tuned.naive == pytest.approx(values[:, best].mean(), abs=CLOSE)
    assert tuned.nested == pytest.approx(np.mean(list(tuned.per_query.values())))
    assert retrieval_metrics.evaluate(qrels, tuned.run, ["nDCG@3"])[0]["nDCG@3"] == tuned.nested
    assert tuned.optimism == tuned.naive - tuned.nested
    assert list(tuned.per_query) == list(qrels)


def test_on_noise_the_naive_estimate_is_too_high_and_the_nested_is_not():
    """200 points without any merit (mean 0.5): the best of them looks good on its own 40 queries."""
    rng = np.random.default_rng(0)
    qrels = {f"q{i:02}": {"d": 1} for i in range(40)}
    hits = rng.random((40, 200)) < 0.5
    points = [{"point": j} for j in range(200)]

    def runs(point, queries):
        return {q: {"d" if hits[int(q[1:]), point["point"]] else "e": 1.0} for q in queries}

    options = tuning(rrf_grid(), measure="MRR@10", folds=5)
    tuned = nested_cross_validation(options, qrels, points, hits.astype(np.float32), runs)
    assert tuned.naive == hits.mean(axis=0).max() > 0.65
    assert abs(tuned.nested - 0.5) < 2 * 0.5 / math.sqrt(40)
    assert tuned.optimism > 0.1


def test_a_seed_decides_the_folds_and_the_result_is_strict_json():
    rankings, qrels = some_rankings(12, 2, seed=4)
    first, again, other = (
        tune_fusion(rankings, qrels, tuning(convex_grid(normalizers=["min_max"]), folds=3, seed=seed))
        for seed in (0, 0, 1)
    )
    assert first == again
    assert [fold.queries for fold in first.folds] != [fold.queries for fold in other.folds]
    record = json.loads(json.dumps(first.as_json(), allow_nan=False))
    assert set(record) == {"family", "measure", "folds", "nested", "naive", "naive_parameters", "optimism"}
    assert record["family"] == "convex"
    assert [fold["queries"] for fold in record["folds"]] == [4, 4, 4]
    assert set(record["folds"][0]) == {"parameters", "train", "test", "queries"}


def test_a_judged_query_without_results_counts_as_zero():
    rankings, qrels = some_rankings(6, 2, seed=5)
    del rankings["q3"]
    tuned = tune_fusion(rankings, qrels, tuning(rrf_grid(), folds=2))
    assert tuned.per_query["q3"] == 0.0
    assert "q3" not in tuned.run
    assert len(tuned.per_query) == 6


def test_tuning_uses_no_more_documents_than_the_evaluation():
    """One query; the arm that is right names the document third, so it is not among the first two documents."""
    rankings = {q: [[("x", 3.0), ("y", 2.0), ("d", 1.0)], [("x", 2.0), ("y", 1.0)]] for q in ("q", "r")}
    qrels = {"q": {"d": 1}, "r": {"d": 1}}
    options = tuning(rrf_grid(constants=[60]), measure="Success@10", folds=2)
    deep = tune_fusion(rankings, qrels, options)
    assert (deep.nested, deep.naive, deep.folds[0].train) == (1.0, 1.0, 1.0)
    cut = tune_fusion(rankings, qrels, options, depth=2)
    assert cut.run == {query: dict(list(ranking.items())[:2]) for query, ranking in deep.run.items()}
    assert (cut.nested, cut.naive, cut.folds[0].train) == (0.0, 0.0, 0.0)


def test_passages_of_one_document_count_once_for_the_depth():
    rankings = {q: [[(0, 4.0), (2, 3.0), (1, 2.0), (3, 1.0)]] for q in ("q", "r")}
    options = tuning(rrf_grid(constants=[60]), folds=2)
    tuned = tune_fusion(
        rankings, {"q": {"a": 1}, "r": {"a": 1}}, options, document=lambda row: "babc"[row], depth=2
    )
    assert list(tuned.run["q"]) == ["b", "a"]


# --- BM25 ---------------------------------------------------------------------------------------------------

TEXTS = [
    "red fox red fox red",
    "a fox in the snow and a dog",
    "snow on the red roof of a long and winding house with many many words",
    "dog dog dog",
    "the red house",
    "winding snow red dog house",
]
QUESTIONS = {
    "q0": "red fox",
    "q1": "snow dog",
    "q2": "red red house",
    "q3": "zebra",
    "q4": "winding words dog",
}
WORDS = Analyzer(pattern=r"\S+", stop_words=None)


def bm25_oracle(question: str, k1: float, b: float) -> dict[str, float]:
    """Lucene's variant over the passages that share a word."""
    texts = [text.split() for text in TEXTS]
    average = sum(map(len, texts)) / len(texts)
    scores = {}
    for row, words in enumerate(texts):
        for term in question.split():
            if term in words:
                n, f = sum(term in other for other in texts), words.count(term)
                idf = math.log(1 + (len(texts) - n + 0.5) / (n + 0.5))
                tf = f / (f + k1 * (1 - b + b * len(words) / average))
                scores[f"d{row}"] = scores.get(f"d{row}", 0.0) + idf * tf
    return {name: round(score, 6) for name, score in scores.items()}


def test_bm25_points_and_runs_are_those_of_the_formula():
    index = LexicalIndex.build(TEXTS, WORDS)
    qrels = {
        "q0": {"d1": 1},
        "q1": {"d5": 2, "d3": 1},
        "q2": {"d4": 1},
        "q3": {"d0": 1},
        "q4": {"d2": 1, "d3": 2},
    }
    grid = bm25_grid(k1=[0.2, 1, 3], b=[0, 0.5, 1])
    tuned = tune_bm25(index, QUESTIONS, qrels, tuning(grid, measure="nDCG@3", folds=2), lambda row: f"d{row}")
    points = grid.points()
    values = np.array(
        [
            [
                metric_oracle("nDCG", 3, qrels[q], ranking_oracle(bm25_oracle(QUESTIONS[q], p["k1"], p["b"])))
                for p in points
            ]
            for q in sorted(qrels)
        ]
    )
    assert len(set(np.round(values.mean(axis=0), 6))) > 1  # the grid matters
    row = {q: i for i, q in enumerate(sorted(qrels))}
    for fold in tuned.folds:
        others = [row[query] for query in sorted(qrels) if query not in fold.queries]
        best = choose(values[others])
        assert fold.parameters == points[best]
        assert fold.train == pytest.approx(values[others, best].mean(), abs=CLOSE)
        for query in fold.queries:
            assert tuned.per_query[query] == pytest.approx(values[row[query], best], abs=CLOSE)
            assert tuned.run[query] == pytest.approx(
                bm25_oracle(QUESTIONS[query], **fold.parameters), abs=2e-6
            )
    assert tuned.naive_parameters == points[choose(values)]
    assert tuned.run["q3"] == {}
    assert tuned.family == "bm25"


@pytest.mark.parametrize("depth", [1, 2, 3, 100])
@pytest.mark.parametrize("weights", [BM25Weights(), BM25Weights("bm25+", delta=1.0), BM25Weights("atire")])
def test_one_point_gives_the_results_of_a_search_with_its_parameters(depth, weights):
    """Of documents cut into many chunks, of which the best have most: both deepen until they have enough."""
    rng = np.random.default_rng(7)
    words = ["red", "fox", "snow", "dog", "house", "winding", "the", "roof"]
    documents = []
    for i, chunks in enumerate([30, 9, 4, 1, 1, 6, 2, 1]):
        lines = [" ".join(rng.choice(words, 4 + i).tolist()) for _ in range(chunks)]
        documents.append(Document(f"d{i}", f"d{i}", "\n".join(["red fox"] * (chunks // 4) + lines)))
    chunks = []
    for document in documents:
        ends = [i for i, letter in enumerate(document.text + "\n") if letter == "\n"]
        starts = [0, *(end + 1 for end in ends)]
        chunks += [chunk_at(document, start, end) for start, end in zip(starts, ends, strict=False)]
    qrels = {query: {"d3": 1, "d5": 2} for query in QUESTIONS}
    dataset = Dataset("chunked", tuple(documents), QUESTIONS, qrels, {}, {}, frozenset(), False, ())
    collection = Collection(MemoryIndex(documents, chunks, BagOfWords().fit([]).encode), BagOfWords())
    plain = replace(weights, k1=1.5, b=0.75)
    found = retrieval.search(collection, Lexical(plain, WORDS), dataset, depth)
    expected = retrieval.documents(found, dataset, depth)
    assert max(map(len, expected.values())) == min(depth, len(documents))

    index, options = collection.lexical(WORDS), tuning(bm25_grid(k1=[1.5], b=[0.75]), folds=2)
    other = replace(weights, k1=0.3, b=0.1)  # which the grid replaces
    tuned = tune_bm25(
        index, QUESTIONS, qrels, options, lambda row: chunks[row].document_id, depth, weights=other
    )
    assert tuned.run == expected
    assert [list(ranking) for ranking in tuned.run.values()] == [list(expected[q]) for q in tuned.run]
    means, per_query = retrieval_metrics.evaluate(qrels, expected, ["nDCG@10"])
    assert tuned.nested == tuned.naive == means["nDCG@10"]
    for fold in tuned.folds:
        others = [per_query[query]["nDCG@10"] for query in QUESTIONS if query not in fold.queries]
        assert fold.train == pytest.approx(np.mean(others), abs=CLOSE)


# --- bad input ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: tuning(convex_grid(), folds=1), "folds=1 "),
        (lambda: tuning(convex_grid(), seed=-1), "seed=-1"),
        (lambda: tuning(convex_grid(), seed=2**32), "seed=4294967296"),
        (lambda: tuning(convex_grid(), seed=99999999999999999999), "seed=99999999999999999999"),
        (lambda: tuning(convex_grid(), measure="P@" + "9" * 400), "measure is"),
        (lambda: tuning(convex_grid(), measure="MAP"), r'measure is "MAP"'),
        (lambda: tuning(convex_grid(), measure="nDCG"), r'measure is "nDCG"'),
        (lambda: unchecked(ConvexGrid, normalizers=["softmax"], steps=10, depths=[]), "softmax"),
        (lambda: convex_grid(normalizers=[]), "normalizers=.* not empty"),
        (lambda: convex_grid(steps=0), "steps=0 "),
        (lambda: convex_grid(steps=101), "steps=101 "),
        (lambda: convex_grid(depths=[10, 0]), r"depths=\[10,0\]"),
        (lambda: rrf_grid(depths=[2**31]), r"depths=\[2147483648\]"),
        (lambda: rrf_grid(constants=[-1]), "constant"),
        (lambda: bm25_grid(b=[1.5]), r"b=\[1\.5\]"),
        (lambda: bm25_grid(k1=[]), "k1=.* not empty"),
        (lambda: bm25_grid(k1=[1.5, 1e39]), r"k1=\[1\.5,1e\+39\]"),
    ],
)
def test_an_invalid_option_is_named(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_inputs_that_cannot_be_tuned_are_errors():
    rankings, qrels = some_rankings(4, 2)
    index = LexicalIndex.build(TEXTS, WORDS)
    cases = [
        (lambda: tune_fusion(rankings, qrels, tuning(bm25_grid())), "no arms to fuse"),
        (lambda: tune_fusion(rankings, qrels, tuning(convex_grid())), "theoretical_min_max needs"),
        (lambda: tune_fusion(rankings, qrels, tuning(rrf_grid(), folds=5)), "5 for 4 judged"),
        (
            lambda: tune_fusion({**rankings, "q1": [[]]}, qrels, tuning(rrf_grid())),
            r"\[1, 2\] arms",
        ),
        (
            lambda: tune_fusion(rankings, qrels, tuning(convex_grid()), lower_bounds=[0.0, 0.0, 0.0]),
            "3 lower_bounds for 2 arms",
        ),
        (lambda: tune_bm25(index, {}, qrels, tuning(convex_grid()), str), "choose a BM25Grid"),
    ]
    for call, message in cases:
        with pytest.raises(UserError, match=message):
            call()
