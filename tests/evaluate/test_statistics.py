"""Intervals, randomisation tests and Holm against scipy and brute force; coverage and error by simulation."""

import math
from itertools import permutations, product

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import stats

from rag.evaluate.resampling import bootstrap, sign_flips
from rag.evaluate.statistics import (
    Statistics,
    _widened_normal_quantile,
    compare,
    detectable,
    holm,
    intervals,
    randomisation,
    table,
    warnings,
)
from rag.types import UserError

QUICK = Statistics(resamples=1000)


def skewed(n: int, columns: int, seed: int = 0) -> np.ndarray:
    """Scores like those of retrieval measures: many zeros, some ones, the rest between."""
    rng = np.random.default_rng(seed)
    u = rng.random((n, columns))
    return np.where(u < 0.3, 0.0, np.where(u < 0.45, 1.0, rng.beta(2, 3, (n, columns))))


# --- intervals ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("n", "confidence"), [(35, 0.95), (60, 0.95), (60, 0.8)])
def test_an_interval_is_scipys_bca_at_the_widened_level(n, confidence):
    values = skewed(n, 3, seed=n)
    ours = intervals(values, Statistics(resamples=20_000, confidence=confidence))
    widened = math.sqrt(n / (n - 1)) * stats.t.ppf((1 + confidence) / 2, n - 1)
    level = 1 - 2 * stats.norm.sf(widened)
    for column, bounds in zip(values.T, ours, strict=True):
        theirs = stats.bootstrap(
            (column,), np.mean, confidence_level=level, n_resamples=20_000, method="BCa", rng=1
        ).confidence_interval
        # Two Monte Carlo quantiles, each known to about 2% of the standard error.
        assert bounds == pytest.approx([theirs.low, theirs.high], abs=0.08 * stats.sem(column))


def test_queries_without_a_value_are_left_out_of_their_column_only():
    values = skewed(70, 2)
    gaps = values.copy()
    gaps[::3, 1] = np.nan
    whole, ours = intervals(values, QUICK), intervals(gaps, QUICK)
    np.testing.assert_array_equal(ours[0], whole[0])
    defined = gaps[~np.isnan(gaps[:, 1]), 1:]
    np.testing.assert_allclose(ours[1], intervals(defined, QUICK)[0], atol=1e-6)


def test_a_column_does_not_depend_on_its_neighbours_or_the_padding():
    values = skewed(60, 5)
    alone = np.concatenate([intervals(values[:, [i]], QUICK) for i in range(5)])
    np.testing.assert_allclose(intervals(values, QUICK), alone, atol=1e-6)
    padded = np.concatenate([values, np.full((40, 5), np.nan)])
    np.testing.assert_allclose(intervals(padded, QUICK), alone, atol=1e-6)


def test_the_seed_decides_the_figures():
    values = skewed(50, 2)
    other = Statistics(resamples=1000, seed=1)
    np.testing.assert_array_equal(intervals(values, QUICK), intervals(values, QUICK))
    assert not np.array_equal(intervals(values, QUICK), intervals(values, other))
    differences = values[:, :1] - values[:, 1:] + 0.1
    p = [randomisation(differences, options)[0] for options in (QUICK, QUICK, other)]
    assert p[0] == p[1] != p[2]


def test_too_few_values_have_no_interval_and_equal_ones_a_point():
    values = np.array([[0.5, np.nan, 0.3], [np.nan, np.nan, 0.3], [np.nan, np.nan, 0.3]])
    bounds = intervals(values)
    assert np.isnan(bounds[:2]).all()
    np.testing.assert_allclose(bounds[2], 0.3)


def test_an_interval_scales_with_the_values():
    values = skewed(60, 1)
    np.testing.assert_allclose(intervals(values * 1e6 - 1e6), intervals(values) * 1e6 - 1e6, rtol=1e-5)


def draw(size: tuple[int, int], seed: int, zeros: float, ones: float, a: float, b: float) -> np.ndarray:
    rng = np.random.default_rng(seed)
    u = rng.random(size)
    return np.where(u < zeros, 0.0, np.where(u < zeros + ones, 1.0, rng.beta(a, b, size))).astype(np.float32)


@pytest.mark.parametrize(
    ("n", "shapes"),
    [
        (50, [(0.3, 0.2, 2.0, 3.0), (0.6, 0.1, 2.0, 2.0), (0.2, 0.0, 1.0, 5.0)]),
        (200, [(0.9, 0.1, 1.0, 1.0), (0.02, 0.9, 2.0, 2.0)]),
    ],
)
def test_a_95_percent_interval_covers_between_93_and_97_percent(n, shapes):
    """1,000 data sets of each shape, as the columns of the program that `intervals` runs."""
    sets = 1000
    datasets = jnp.asarray(np.concatenate([draw((n, sets), n, *shape) for shape in shapes], axis=1))
    means, columns = datasets.mean(axis=0), datasets.shape[1]
    normal = jnp.asarray(_widened_normal_quantile(np.full(columns, n), 0.95))
    counts = jnp.full(columns, n, jnp.int32)
    bounds = means[:, None] + bootstrap(datasets - means, counts, normal, jax.random.key(0), 1000)
    for i, (zeros, ones, a, b) in enumerate(shapes):
        low, high = bounds[i * sets : (i + 1) * sets].T
        truth = ones + (1 - zeros - ones) * a / (a + b)
        assert 0.93 <= float(((low <= truth) & (truth <= high)).mean()) <= 0.97


# --- paired comparison --------------------------------------------------------------------------------------


def all_patterns_p(differences: np.ndarray) -> float:
    """The randomisation test as it reads: every assignment of the two systems' names."""
    observed = abs(differences.sum())
    flipped = [abs(np.dot(signs, differences)) for signs in product((1, -1), repeat=len(differences))]
    return float(np.mean([total >= observed - 1e-9 for total in flipped]))


@pytest.mark.parametrize("n", [1, 2, 5, 9, 13])
def test_small_samples_get_the_exact_p(n):
    rng = np.random.default_rng(n)
    differences = np.stack([rng.normal(0.3, 1, n), rng.integers(-1, 2, n), np.full(n, 0.1)], axis=1)
    expected = [all_patterns_p(column) for column in differences.T]
    np.testing.assert_allclose(randomisation(differences), expected, rtol=1e-12)


def test_an_exact_p_needs_no_more_patterns_than_resamples():
    differences = np.random.default_rng(0).normal(0.4, 1, (7, 1))
    exact = all_patterns_p(differences[:, 0])
    assert randomisation(differences, Statistics(resamples=128)) == [exact]  # 2^7 patterns
    (drawn,) = randomisation(differences, Statistics(resamples=127))
    assert (drawn * 128) == pytest.approx(round(drawn * 128))  # (hits + 1) / (B + 1)


@pytest.mark.parametrize("shift", [0.0, 0.1, 0.2, 0.3])
def test_p_of_random_signs_is_scipys(shift):
    differences = skewed(60, 2) @ [1, -1] + shift
    expected = stats.permutation_test(
        (differences,), np.mean, permutation_type="samples", n_resamples=20_000, rng=3
    ).pvalue
    (p,) = randomisation(differences[:, None], Statistics(resamples=20_000))
    assert p == pytest.approx(expected, abs=5 * math.sqrt(expected * (1 - expected) / 20_000) + 2e-4)


def test_p_is_never_zero_and_one_where_nothing_differs():
    clear = np.full((60, 1), 0.5)
    assert randomisation(clear, QUICK) == [1 / 1001]
    assert randomisation(np.zeros((60, 1)), QUICK) == [1.0]


def test_queries_that_tie_or_are_missing_leave_p_exact():
    differing = np.array([0.5, -0.1, 0.3, 0.2])
    column = np.concatenate([np.zeros(50), differing, np.full(9, np.nan)])[:, None]
    assert randomisation(column, QUICK) == [all_patterns_p(differing)]


def test_the_randomisation_test_rejects_five_percent_of_true_hypotheses():
    """Two systems of one distribution, 4,000 times, as the columns of the program that `compare` runs."""
    trials, n = 4000, 60
    pairs = draw((2 * n, trials), 5, 0.3, 0.2, 2.0, 3.0)
    differences = jnp.zeros((64, trials)).at[:n].set(pairs[:n] - pairs[n:])
    counts, exact = jnp.full(trials, n, jnp.int32), jnp.zeros(trials, bool)
    hits = sign_flips(differences, counts, exact, jax.random.key(0), 999)
    rejected = float((((hits + 1) / 1000) <= 0.05).mean())
    assert 0.04 <= rejected <= 0.06  # three standard errors


def test_a_comparison_has_its_queries_and_the_detectable_difference():
    baseline = {"a": 0.5, "b": 0.25, "c": None, "d": 1.0, "e": 0.0}
    better = {"a": 0.75, "b": 0.25, "c": 1.0, "d": 0.5, "e": 1.0, "other": 1.0}
    result = compare(baseline, {"better": better, "same": baseline, "one": {"a": 1.0, "b": math.nan}})
    ours = result["better"]
    differences = np.array([0.25, 0.0, -0.5, 1.0])
    assert (ours.n, ours.wins, ours.ties, ours.losses) == (4, 2, 1, 1)
    assert ours.difference == pytest.approx(differences.mean())
    assert ours.p == all_patterns_p(differences)
    assert ours.detectable == detectable(differences[:, None])[0]
    assert [ours.low, ours.high] == pytest.approx(intervals(differences[:, None])[0].tolist())
    same, one = result["same"], result["one"]
    assert (same.difference, same.p, same.n, same.ties) == (0.0, 1.0, 4, 4)
    assert (one.n, one.wins, one.p, math.isnan(one.low), math.isnan(one.detectable)) == (
        1,
        1,
        1.0,
        True,
        True,
    )
    assert [c.p_holm for c in result.values()] == holm(np.array([c.p for c in result.values()])).tolist()
    assert type(ours.n) is int
    assert type(ours.p) is float
    assert compare(baseline, {}) == {}


def test_systems_with_different_queries_are_an_error():
    with pytest.raises(UserError, match=r'"theirs" and the baseline have no query in common'):
        compare({"a": 1.0}, {"ours": {"a": 0.5}, "theirs": {"b": 0.5}})


def test_holm_of_an_example_computed_by_hand():
    """0.01 * 4, 0.03 * 3, then 0.04 * 2 is raised to 0.09, and 0.05 * 1 too."""
    np.testing.assert_allclose(holm(np.array([0.04, 0.01, 0.05, 0.03])), [0.09, 0.04, 0.09, 0.09])
    assert holm(np.array([0.7, 0.6])).tolist() == [1.0, 1.0]
    assert holm(np.array([])).shape == (0,)


def test_holm_is_the_closure_of_bonferroni():
    """Adjusted p of a hypothesis: the largest Bonferroni p among all families that hold it."""
    p = np.array([0.01, 0.2, 0.02, 0.02, 0.4])
    for order in list(permutations(range(5)))[::17]:
        shuffled = p[list(order)]
        members = [np.flatnonzero(chosen) for chosen in product((0, 1), repeat=5)][1:]
        expected = [min(max(len(f) * shuffled[f].min() for f in members if i in f), 1.0) for i in range(5)]
        np.testing.assert_allclose(holm(shuffled), expected)


# --- what could be detected ---------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [12, 50, 400])
def test_the_detectable_difference_has_the_power_asked_for(n):
    differences = skewed(n, 2, seed=n) @ [1, -1]
    (least,) = detectable(differences[:, None])
    noncentral = least / (differences.std(ddof=1) / math.sqrt(n))
    critical = stats.t.ppf(0.975, n - 1)
    power = stats.nct.sf(critical, n - 1, noncentral) + stats.nct.cdf(-critical, n - 1, noncentral)
    assert power == pytest.approx(0.8, abs=0.01)


def test_warnings_name_the_metrics_and_there_are_none_without_a_problem():
    assert warnings(np.linspace([0.3, 0.5], [0.7, 0.6], 30), ["nDCG@10", "F1"]) == []
    steady = np.linspace(0.4, 0.6, 30)[:, None]
    values = np.concatenate([steady, np.zeros((30, 1)), np.full((30, 1), np.nan)], axis=1)
    values[:4, 2] = [0.1, 0.2, 0.15, 0.9]
    few, equal, wide = warnings(values, ["nDCG@10", "EM", "citation"])
    assert few.startswith("Only n = 4 queries are in citation: below 25")
    assert equal.startswith("EM is 0 for each of 30 queries")
    assert "10.0%" in equal  # 3 / 30
    assert wide.startswith("The 95% interval of citation is wider than half the mean")


def test_a_table_has_nan_where_a_metric_is_not_defined():
    per_query = {"a": {"x": 1.0, "y": None}, "b": {"x": 0.5}}
    np.testing.assert_array_equal(table(per_query, ["y", "x"]), [[np.nan, 1.0], [np.nan, 0.5]])
    assert table({}, ["x"]).shape == (0, 1)


@pytest.mark.parametrize(
    "setting",
    [
        {"resamples": 99},
        {"resamples": 2**33},  # 160 GiB
        {"confidence": 1.0},
        {"confidence": 1 - 1e-16},  # an infinite quantile
        {"confidence": math.nan},
        {"power": 0.0},
        {"seed": -1},
        {"seed": 2**32},
        {"seed": 99999999999999999999},
    ],
)
def test_an_invalid_option_is_named(setting):
    with pytest.raises(UserError, match=next(iter(setting))):
        Statistics(**setting)


def test_the_smallest_and_the_largest_seed_can_be_used():
    bounds = [intervals(skewed(40, 1), Statistics(resamples=100, seed=seed)) for seed in (0, 2**32 - 1)]
    assert np.isfinite(bounds).all()
    assert not np.array_equal(*bounds)
