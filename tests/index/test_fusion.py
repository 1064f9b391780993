"""Fusion against plain Python over dictionaries, its degenerate inputs, and its independence of the batch."""

import math
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rag.index import fusion, normalizers
from rag.index.fusion import Convex, Fusion, ReciprocalRank, score_table
from rag.types import UserError

NORMALIZERS = ("min_max", "theoretical_min_max", "z_score", "dbsf")
CLOSE = {"rel": 2e-5, "abs": 2e-5}

LEXICAL = [("a", 9.0), ("b", 4.0), ("c", 1.0)]
DENSE = [("c", 0.9), ("a", 0.5), ("d", -0.2)]


def plain(name: str, arm: dict[str, float], low: float) -> tuple[dict[str, float], float]:
    """The normalised scores of an arm, and what a missing candidate counts as; by the definitions."""
    if not arm:
        return {}, 0.0
    values = list(arm.values())
    least, most, flat = min(values), max(values), min(values) == max(values)
    if name == "min_max":
        return {i: 1.0 if flat else (s - least) / (most - least) for i, s in arm.items()}, 0.0
    if name == "theoretical_min_max":
        return {i: 0.0 if most <= low else (s - low) / (most - low) for i, s in arm.items()}, 0.0
    if flat:
        return dict.fromkeys(arm, 0.0 if name == "z_score" else 0.5), -1.0 if name == "z_score" else 0.0
    mean, deviation = statistics.fmean(values), statistics.stdev(values)
    z = {i: (s - mean) / deviation for i, s in arm.items()}
    if name == "z_score":
        return z, min(z.values())
    return {i: min(1.0, max(0.0, (s + 3) / 6)) for i, s in z.items()}, 0.0


def plain_convex(name, rankings, weights, lower_bounds) -> dict[str, float]:
    arms = [plain(name, dict(ranking), low) for ranking, low in zip(rankings, lower_bounds, strict=True)]
    return {
        i: sum(w * arm.get(i, missing) for w, (arm, missing) in zip(weights, arms, strict=True))
        / sum(weights)
        for i in {i for ranking in rankings for i, _ in ranking}
    }


def plain_reciprocal_rank(rankings, constant, weights) -> dict[str, float]:
    scores: dict[str, float] = {}
    for weight, ranking in zip(weights, rankings, strict=True):
        for rank, (name, _) in enumerate(ranking, 1):
            scores[name] = scores.get(name, 0.0) + weight / (constant + rank)
    return scores


def fuse(method: Fusion, rankings, lower_bounds=None):
    """The fusion of one query."""
    return method.fuse_batch([rankings], lower_bounds)[0]


def masked(scores: list[float | None]) -> tuple[jax.Array, jax.Array]:
    """A missing score is NaN-like rubbish, which must not matter."""
    return jnp.array([1e30 if s is None else s for s in scores]), jnp.array([s is not None for s in scores])


@st.composite
def arm_rankings(draw) -> list[list[tuple[str, float]]]:
    # Few distinct scores, so that ties and flat arms come up; lowest -1, as of a cosine
    score = st.sampled_from([-1.0, -0.5, 0.0, 0.25, 0.5, 3.0, 11.0])
    arm = st.dictionaries(st.sampled_from("abcdefgh"), score, max_size=8)
    arms = draw(st.lists(arm, min_size=2, max_size=3))
    return [sorted(scores.items(), key=lambda pair: -pair[1]) for scores in arms]


@settings(deadline=None, max_examples=60)
@given(arm_rankings(), st.sampled_from(NORMALIZERS))
def test_convex_is_its_definition(rankings, name):
    weights, lower_bounds = (0.2, 1.0, 0.5)[: len(rankings)], (-1.0,) * len(rankings)
    fused = fuse(Convex(name, weights, lower_bounds), rankings)
    assert dict(fused) == pytest.approx(plain_convex(name, rankings, weights, lower_bounds), **CLOSE)
    assert [s for _, s in fused] == sorted((s for _, s in fused), reverse=True)


@settings(deadline=None, max_examples=40)
@given(arm_rankings(), st.sampled_from([0, 1, 60, 1000]))
def test_reciprocal_rank_is_its_definition(rankings, constant):
    weights = (2.0, 1.0, 0.5)[: len(rankings)]
    fused = fuse(ReciprocalRank(constant, weights), rankings)
    assert dict(fused) == pytest.approx(plain_reciprocal_rank(rankings, constant, weights), rel=1e-6)
    assert [s for _, s in fused] == sorted((s for _, s in fused), reverse=True)


def test_the_papers_sum():
    fused = dict(fuse(ReciprocalRank(), [LEXICAL, DENSE]))
    assert fused == pytest.approx({"a": 1 / 61 + 1 / 62, "b": 1 / 62, "c": 1 / 63 + 1 / 61, "d": 1 / 63})


@pytest.mark.parametrize(
    ("name", "wanted"),
    [
        ("min_max", [1.0, 0.375, 0.0, 0.0]),
        ("theoretical_min_max", [1.0, 4 / 9, 1 / 9, 0.0]),
        ("z_score", [13 / 3 / 16.333333**0.5, -2 / 3 / 16.333333**0.5, -11 / 3 / 16.333333**0.5, None]),
        ("dbsf", [0.5 + 13 / 18 / 16.333333**0.5, 0.5 - 2 / 18 / 16.333333**0.5, None, 0.0]),
    ],
)
def test_normalisers_by_hand(name, wanted):
    got = normalizers.normalize(name, *masked([9.0, 4.0, 1.0, None]), 0.0)
    for mine, theirs in zip(got, wanted, strict=True):
        if theirs is not None:
            assert float(mine) == pytest.approx(theirs, abs=1e-6)
    if name == "z_score":
        assert float(got[3]) == float(got[2])  # missing: as the lowest that was found


@pytest.mark.parametrize(
    ("name", "found", "missing"),
    [("min_max", 1.0, 0.0), ("theoretical_min_max", 1.0, 0.0), ("z_score", 0.0, -1.0), ("dbsf", 0.5, 0.0)],
)
@pytest.mark.parametrize("scores", [[7.3, None], [0.1, 0.1, 0.1, None, 0.1], [1e-3] * 9 + [None]])
def test_one_hit_and_equal_scores(name, found, missing, scores):
    got = np.asarray(normalizers.normalize(name, *masked(scores), 0.0))
    assert np.array_equal(got, [missing if s is None else found for s in scores])


def test_nothing_above_the_theoretical_minimum_is_as_good_as_missing():
    assert not normalizers.theoretical_min_max(*masked([0.0, 0.0, None]), 0.0).any()


@pytest.mark.parametrize("name", NORMALIZERS)
def test_an_empty_arm_gives_zeros(name):
    assert np.array_equal(normalizers.normalize(name, *masked([None] * 4), 0.0), np.zeros(4))


def test_dbsf_clips():
    scores = [100.0] + [0.0] * 40
    assert float(normalizers.dbsf(*masked(scores))[0]) == 1.0


METHODS = [ReciprocalRank(), *(Convex(name, lower_bounds=(0.0, -1.0)) for name in NORMALIZERS)]


@pytest.mark.parametrize("method", METHODS)
def test_an_empty_arm_leaves_the_other_in_its_order(method):
    assert [i for i, _ in fuse(method, [LEXICAL, []])] == ["a", "b", "c"]
    assert [i for i, _ in fuse(method, [[], DENSE])] == ["c", "a", "d"]
    assert fuse(method, [[], []]) == []


@pytest.mark.parametrize("method", METHODS)
def test_no_arms_and_no_queries(method):
    assert fuse(method, []) == []
    assert method.fuse_batch([]) == []
    assert isinstance(method, Fusion)


@pytest.mark.parametrize("method", METHODS)
def test_one_arm_keeps_its_order(method):
    one = (
        ReciprocalRank()
        if isinstance(method, ReciprocalRank)
        else Convex(method.normalizer, lower_bounds=(-1.0,))
    )
    assert [i for i, _ in fuse(one, [DENSE])] == ["c", "a", "d"]


def test_ties_go_to_the_lower_id_whatever_the_arms_order():
    for arms in ([[("b", 1.0)], [("a", 1.0)]], [[("a", 1.0)], [("b", 1.0)]]):
        for method in METHODS:
            assert [i for i, _ in fuse(method, arms)] == ["a", "b"], method
    rows = [[(10, 1.0)], [(9, 1.0)]]
    assert [i for i, _ in fuse(ReciprocalRank(), rows)] == [9, 10]


def test_equal_terms_in_other_arms_tie_exactly():
    names = [f"{i:02}" for i in range(30)]
    rng = np.random.default_rng(0)
    a, b, c = (list(rng.permutation(names)) for _ in range(3))
    # "x" takes ranks 4, 11, 26 of the three arms and "y" 11, 26, 4: the same sum in another order
    for arm, x, y in ((a, 3, 10), (b, 10, 25), (c, 25, 3)):
        for at, name in sorted([(x, "x"), (y, "y")]):
            arm.insert(at, name)
    scores = dict(fuse(ReciprocalRank(), [[(str(n), 0.0) for n in arm] for arm in (a, b, c)]))
    assert scores["x"] == scores["y"]


def test_only_the_ratio_of_convex_weights_matters():
    assert fuse(Convex(weights=(1, 3)), [LEXICAL, DENSE]) == fuse(
        Convex(weights=(0.25, 0.75)), [LEXICAL, DENSE]
    )


def test_a_weight_of_zero_silences_an_arm():
    for method in (ReciprocalRank(weights=(0, 1)), Convex(weights=(0, 1))):
        fused = dict(fuse(method, [LEXICAL, DENSE]))
        assert fused["c"] > fused["a"] > fused["b"] == 0.0


def random_rankings(rng: np.random.Generator, arms: int, most: int) -> list[list[tuple[int, float]]]:
    rankings = []
    for _ in range(arms):
        n = int(rng.integers(0, most + 1))
        names, scores = rng.choice(3 * most, n, replace=False), np.sort(rng.normal(size=n))[::-1]
        rankings.append([(int(i), float(s)) for i, s in zip(names, scores, strict=True)])
    return rankings


@pytest.mark.parametrize("method", [ReciprocalRank(), *(Convex(name) for name in NORMALIZERS)])
def test_a_query_does_not_depend_on_its_batch(method):
    rng = np.random.default_rng(1)
    queries = [random_rankings(rng, 2, most) for most in [1, 5, 17, 40, 90] * 15]
    lower_bounds = (-9.0, -9.0)
    together = method.fuse_batch(queries, lower_bounds)
    assert len(together) == 75
    for i in (0, 3, 4, 66, 74):
        assert together[i] == fuse(method, queries[i], lower_bounds)
        assert {name for name, _ in together[i]} == {name for arm in queries[i] for name, _ in arm}


def test_queries_may_differ_in_their_arms():
    queries = [[LEXICAL], [LEXICAL, DENSE], [LEXICAL, DENSE, DENSE], []]
    assert ReciprocalRank().fuse_batch(queries) == [fuse(ReciprocalRank(), arms) for arms in queries]


def test_few_programs_serve_many_queries():
    rng = np.random.default_rng(2)
    fusion._reciprocal_ranks.clear_cache()
    ReciprocalRank().fuse_batch([random_rankings(rng, 2, 60) for _ in range(200)])
    ReciprocalRank(10).fuse_batch([random_rankings(rng, 2, 60) for _ in range(7)])
    assert fusion._reciprocal_ranks._cache_size() <= 3  # 32, 64 and 128 candidates


def test_weights_and_constants_can_be_vmapped():
    table = score_table([LEXICAL, DENSE])
    ranks = jnp.asarray(table.ranks)
    constants = jnp.array([1.0, 60.0])
    both = jax.vmap(lambda c: fusion.reciprocal_rank(ranks, ranks > 0, c, jnp.ones(2)))(constants)
    for row, constant in zip(both, (1.0, 60.0), strict=True):
        wanted = plain_reciprocal_rank([LEXICAL, DENSE], constant, (1, 1))
        assert dict(zip(table.ids, map(float, row), strict=True)) == pytest.approx(wanted, rel=1e-6)


def test_a_table_shows_what_each_arm_says():
    table = score_table([[("b", 2.0), ("a", 1.0), ("b", 0.5)], [("c", 3.0)]])
    assert table.ids == ["a", "b", "c"]
    assert table.ranks.tolist() == [[2, 1, 0], [0, 0, 1]]
    assert table.scores.tolist() == [[1.0, 2.0, 0.0], [0.0, 0.0, 3.0]]


def test_lower_bounds_of_the_option_go_first():
    given = fuse(Convex("theoretical_min_max"), [LEXICAL, DENSE], (0.0, -1.0))
    assert fuse(Convex("theoretical_min_max", lower_bounds=(0, -1)), [LEXICAL, DENSE], (-5.0, -5.0)) == given


def test_one_lower_bound_serves_any_number_of_arms():
    queries = [[LEXICAL], [LEXICAL, DENSE]]
    one = Convex("theoretical_min_max").fuse_batch(queries, [-1.0])
    assert one == [fuse(Convex("theoretical_min_max"), arms, [-1.0] * len(arms)) for arms in queries]


def test_rounding_below_the_lowest_score_is_no_error():
    fused = dict(fuse(Convex("theoretical_min_max", lower_bounds=(-1.0,)), [[("a", 1.0), ("b", -1.0000001)]]))
    assert fused == {"a": 1.0, "b": 0.0}


@pytest.mark.parametrize("score", [math.nan, math.inf, 1e60])
def test_a_score_that_is_no_number_is_a_bug(score):
    with pytest.raises(ValueError, match="finite"):
        fuse(ReciprocalRank(), [[("a", score)]])


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: ReciprocalRank(constant=-1), "constant=-1"),
        (lambda: ReciprocalRank(constant=math.nan), "constant=nan"),
        (lambda: ReciprocalRank(weights=(1, -0.5)), r"weights=\[1,-0\.5\]"),
        (lambda: Convex(weights=(0, 0)), "fusion.weights"),
        (lambda: Convex(weights=()), "fusion.weights"),
        (lambda: Convex(weights=(math.inf, 1)), "weights="),
        (lambda: Convex(lower_bounds=(math.nan,)), "lower_bounds="),
        (lambda: fuse(ReciprocalRank(weights=(1, 1)), [LEXICAL]), "2 numbers for 1 arms"),
        (lambda: fuse(Convex(weights=(1,)), [LEXICAL, DENSE]), "1 numbers for 2 arms"),
        (lambda: fuse(Convex("theoretical_min_max"), [LEXICAL, DENSE]), "fusion.lower_bounds"),
        (
            lambda: fuse(Convex("theoretical_min_max", lower_bounds=(0, 0, 0)), [LEXICAL, DENSE]),
            "3 numbers for 2 arms",
        ),
        (
            lambda: fuse(Convex("theoretical_min_max"), [LEXICAL, DENSE], (0.0, 0.0)),
            "Arm 2 gave the score -0.2",
        ),
    ],
)
def test_bad_options_are_named(make, setting):
    with pytest.raises(UserError, match=setting):
        make()


def test_options_from_a_config_are_tuples():
    assert Convex(weights=[1, 2], lower_bounds=[0, -1]) == Convex(
        weights=(1.0, 2.0), lower_bounds=(0.0, -1.0)
    )
    assert hash(ReciprocalRank(60, [1, 2])) == hash(ReciprocalRank(60.0, (1.0, 2.0)))
