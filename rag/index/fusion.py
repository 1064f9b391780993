"""Several rankings of one query made into one: by the ranks alone, or by the scores brought to one scale.

    A arms (the rankings that are fused), C candidates (all that an arm returned), Q queries

The functions are written for one query and masked, to be vmapped over queries, weights or constants. An arm
returns the best of what it scores, so a candidate that it does not name scored no more than the lowest that it
does; each function says what such a candidate counts as.

A query's result does not depend on the queries that it is fused with: the program that fuses it follows from
its own number of arms and candidates, and equal terms sum to equal scores in whatever arms they stand.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Literal, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, ScalarLike

from rag.runtime.options import Weight, check_fields
from rag.types import UserError

Id = str | int
Ranking = Sequence[tuple[Id, float]]  # one arm's candidates and their scores, best first
Normalizer = Literal["min_max", "theoretical_min_max", "z_score", "dbsf"]
RankConstant = Annotated[float, Ge(0), Le(1e6)]
LowerBound = Annotated[float, Ge(-1e6), Le(1e6)]  # a score

_BATCH = 64  # queries of one call to XLA, always: the program, and so the rounding, is the same for any batch
_LEAST = 32  # candidates of the smallest program; the others are its doubles


def reciprocal_rank(
    ranks: Int[Array, "A C"], found: Bool[Array, "A C"], constant: ScalarLike, weights: Float[Array, "A"]
) -> Float[Array, "C"]:
    """Reciprocal rank fusion (Cormack, Clarke and Buettcher 2009): sum over arms of weight / (constant + rank).

    Ranks count from 1. An arm that does not name a candidate adds 0 to it, as if it stood at rank infinity;
    an empty arm adds 0 to all.
    """
    terms = jnp.where(found, weights[:, None] / (constant + jnp.where(found, ranks, 1)), 0.0)
    return _sum(terms)


def convex(normalized: Float[Array, "A C"], weights: Float[Array, "A"]) -> Float[Array, "C"]:
    """The mean of the arms' normalised scores, weighted: sum of weights * normalized / sum of weights."""
    return _sum(normalized * (weights / weights.sum())[:, None])


def _sum(terms: Float[Array, "A C"]) -> Float[Array, "C"]:
    """Over arms, the lower terms first: rounding must not part candidates that have the same terms."""
    return jnp.sort(terms, axis=0).sum(axis=0)


def normalize(
    normalizer: Normalizer, scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike
) -> Float[Array, "C"]:
    """One arm's scores on the scale of the normaliser of that name; only theoretical_min_max uses `low`."""
    match normalizer:
        case "min_max":
            return min_max(scores, found)
        case "theoretical_min_max":
            return theoretical_min_max(scores, found, low)
        case "z_score":
            return z_score(scores, found)
        case "dbsf":
            return dbsf(scores, found)


def min_max(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """(score - lowest) / (highest - lowest) of the found scores, from 0 to 1; a missing candidate counts as 0.

    Equal scores, and so a single one, give 1: each is the best that the arm has to offer, and was found where
    the missing were not. An empty arm gives zeros.
    """
    low, high = _extremes(scores, found)
    return _rescaled(scores, found, low, high, flat=1.0)


def theoretical_min_max(
    scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike
) -> Float[Array, "C"]:
    """(score - low) / (highest - low), where `low` is the lowest score that the arm could ever give.

    The least that BM25 gives is 0, that of the cosine -1. Stable where min_max is not: the last of the found
    does not fall to 0 just because it is the last (Bruch, Gai and Ingber 2022, "An Analysis of Fusion
    Functions for Hybrid Retrieval"). A missing candidate counts as `low`, which is 0. Equal scores give 1,
    unless they are `low`, which gives 0; scores below it count as `low`. An empty arm gives zeros.
    """
    _, high = _extremes(scores, found)
    return _rescaled(scores, found, low, high, flat=0.0)


def z_score(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """(score - mean) / standard deviation, both of the found scores (n - 1); no fixed range.

    A missing candidate counts as the lowest of the found: 0, which is the mean, would set it above half of
    them. Equal scores, and so a single one, give 0 and a missing candidate then -1, one deviation below. An
    empty arm gives zeros.
    """
    low, high = _extremes(scores, found)
    mean, deviation = _moments(scores, found)
    z = (scores - mean) / jnp.where(high > low, deviation, 1.0)
    spread = jnp.where(found, z, jnp.where(found, z, jnp.inf).min())
    flat = jnp.where(found, 0.0, -1.0)
    return jnp.where(high > low, spread, jnp.where(found.any(), flat, 0.0))


def dbsf(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> Float[Array, "C"]:
    """Distribution-based score fusion (Mazzeschi 2023): min-max from mean - 3 to mean + 3 standard deviations.

    Mean and deviation (n - 1) are those of the found scores; what lies outside is clipped to 0 or 1. A missing
    candidate counts as 0. Equal scores, and so a single one, give 0.5, the place of the mean. An empty arm
    gives zeros. Qdrant computes the same but does not clip.
    """
    low, high = _extremes(scores, found)
    mean, deviation = _moments(scores, found)
    z = (scores - mean) / jnp.where(high > low, deviation, 1.0)
    return jnp.where(found, jnp.where(high > low, jnp.clip((z + 3) / 6, 0.0, 1.0), 0.5), 0.0)


def _extremes(
    scores: Float[Array, "C"], found: Bool[Array, "C"]
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """The lowest and highest of the found scores; zeros where there are none."""
    low = jnp.where(found, scores, jnp.inf).min()
    high = jnp.where(found, scores, -jnp.inf).max()
    return jnp.where(found.any(), low, 0.0), jnp.where(found.any(), high, 0.0)


def _moments(scores: Float[Array, "C"], found: Bool[Array, "C"]) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Mean and sample standard deviation of the found scores; rounding can leave equal ones a small deviation."""
    n = found.sum()
    mean = jnp.where(found, scores, 0.0).sum() / jnp.maximum(n, 1)
    squares = jnp.where(found, (scores - mean) ** 2, 0.0).sum()
    return mean, jnp.sqrt(squares / jnp.maximum(n - 1, 1))


def _rescaled(
    scores: Float[Array, "C"], found: Bool[Array, "C"], low: ScalarLike, high: Float[Array, ""], flat: float
) -> Float[Array, "C"]:
    """The found scores, low to high, from 0 to 1; `flat` where high does not exceed low; the missing are 0."""
    shares = jnp.clip((scores - low) / jnp.where(high > low, high - low, 1.0), 0.0, 1.0)
    return jnp.where(found, jnp.where(high > low, shares, flat), 0.0)


@jax.jit
def _reciprocal_ranks(
    ranks: Int[Array, "Q A C"], found: Bool[Array, "Q A C"], constant: ScalarLike, weights: Float[Array, "A"]
) -> Float[Array, "Q C"]:
    return jax.vmap(reciprocal_rank, (0, 0, None, None))(ranks, found, constant, weights)


@partial(jax.jit, static_argnames="normalizer")
def _convexes(
    normalizer: Normalizer,
    scores: Float[Array, "Q A C"],
    found: Bool[Array, "Q A C"],
    lower_bounds: Float[Array, "A"],
    weights: Float[Array, "A"],
) -> Float[Array, "Q C"]:
    arms = jax.vmap(partial(normalize, normalizer))
    return jax.vmap(lambda s, f: convex(arms(s, f, lower_bounds), weights))(scores, found)


@dataclass(frozen=True, slots=True)
class ScoreTable:
    """The candidates of one query, ids ascending, and what each arm says of them."""

    ids: list[Id]
    scores: Float32[np.ndarray, "A C"]  # 0 where the arm does not name the candidate
    ranks: Int32[np.ndarray, "A C"]  # from 1; 0 where the arm does not name the candidate


def score_table(rankings: Sequence[Ranking]) -> ScoreTable:
    """The rankings of one query side by side; an id that stands twice in one counts where it stands first.

    Raises ValueError for a score that is not finite.
    """
    firsts = []
    for ranking in rankings:
        firsts.append({})
        for rank, (name, score) in enumerate(ranking, 1):
            firsts[-1].setdefault(name, (rank, score))
    ids = sorted({name for first in firsts for name in first})
    place = {name: i for i, name in enumerate(ids)}
    scores = np.zeros((len(rankings), len(ids)), np.float32)
    ranks = np.zeros((len(rankings), len(ids)), np.int32)
    with np.errstate(over="ignore"):  # told below
        for arm, first in enumerate(firsts):
            for name, (rank, score) in first.items():
                scores[arm, place[name]], ranks[arm, place[name]] = score, rank
    if not np.isfinite(scores).all():
        raise ValueError("a score to fuse is not finite in float32")
    return ScoreTable(ids, scores, ranks)


@runtime_checkable
class Fusion(Protocol):
    """What makes one ranking of several."""

    def fuse(
        self, rankings: Sequence[Ranking], lower_bounds: Sequence[float | int] | None = None
    ) -> list[tuple[Id, float]]:
        """All candidates of one query, best first, the lower id first where scores tie."""
        ...

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """The same for each query; `lower_bounds`: the lowest score that each arm can give, or one for all, if known."""
        ...


@dataclass(frozen=True)
class ReciprocalRank:
    """Reciprocal rank fusion: no scores needed, only ranks. A score is the sum of weight / (constant + rank).

    `weights`: one for each arm, None for 1 each. Raises UserError for a negative constant, for weights that
    are negative or all zero, and when fusing for weights that are not as many as the arms.
    """

    constant: RankConstant = 60.0
    weights: Sequence[Weight] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_weights(self.weights)

    def fuse(
        self, rankings: Sequence[Ranking], lower_bounds: Sequence[float | int] | None = None
    ) -> list[tuple[Id, float]]:
        """All candidates of one query, best first, the lower id first where scores tie; `lower_bounds` do not matter."""
        return self.fuse_batch([rankings], lower_bounds)[0]

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """`fuse` for each query; they need not have the same number of arms unless there are weights."""

        def scored(tables: list[ScoreTable], arms: int) -> Float[Array, "Q C"]:
            ranks = _stacked([table.ranks for table in tables])
            return _reciprocal_ranks(ranks, ranks > 0, self.constant, _weights(self.weights, arms))

        return _fused(rankings, scored)


@dataclass(frozen=True)
class Convex:
    """The weighted mean of the arms' scores, each arm brought to one scale by `normalizer`.

    `weights`: one for each arm, None for equal ones; only their ratios matter. `lower_bounds`: the lowest score that
    each arm can give, or one for all, for theoretical_min_max; None takes what is known of the arms, which is
    handed to `fuse`. Raises UserError for an unknown normalizer, for weights that are negative or all zero, and when
    fusing for weights or lower_bounds that are not as many as the arms, and lower_bounds that are missing or undercut.
    """

    normalizer: Normalizer = "min_max"
    weights: Sequence[Weight] | None = None
    lower_bounds: Sequence[LowerBound] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_weights(self.weights)

    def fuse(
        self, rankings: Sequence[Ranking], lower_bounds: Sequence[float | int] | None = None
    ) -> list[tuple[Id, float]]:
        """All candidates of one query, best first, the lower id first where scores tie."""
        return self.fuse_batch([rankings], lower_bounds)[0]

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """`fuse` for each query; the option's own `lower_bounds` go before those given here."""

        def scored(tables: list[ScoreTable], arms: int) -> Float[Array, "Q C"]:
            low, weights = self._lower_bounds(lower_bounds, tables, arms), _weights(self.weights, arms)
            scores, found = _stacked([t.scores for t in tables]), _stacked([t.ranks for t in tables]) > 0
            return _convexes(self.normalizer, scores, found, low, weights)

        return _fused(rankings, scored)

    def _lower_bounds(
        self, given: Sequence[float | int] | None, tables: Sequence[ScoreTable], arms: int
    ) -> Float32[np.ndarray, "A"]:
        if self.normalizer != "theoretical_min_max":
            return np.zeros(arms, np.float32)
        lower_bounds = given if self.lower_bounds is None else self.lower_bounds
        if lower_bounds is None:
            raise UserError(
                "theoretical_min_max needs each arm's lowest possible score: give fusion.lower_bounds."
            )
        lower_bounds = tuple(lower_bounds) * arms if len(lower_bounds) == 1 else lower_bounds
        if len(lower_bounds) != arms:
            raise UserError(
                f"fusion.lower_bounds has {len(lower_bounds)} numbers for {arms} arms: give one for each arm."
            )
        for table in tables:
            for arm, low in enumerate(lower_bounds):
                least = np.min(table.scores[arm], where=table.ranks[arm] > 0, initial=np.inf)
                if least < low - 1e-5 * max(1.0, abs(low)):  # a cosine may round to just below -1
                    raise UserError(
                        f"Arm {arm + 1} gave the score {least:g}, below the {low:g} that it is said to give at "
                        "least: set fusion.lower_bounds, or choose another normalizer."
                    )
        return np.asarray(lower_bounds, np.float32)


def _check_weights(weights: Sequence[float] | None) -> None:
    if weights is not None and not any(weights):
        raise UserError(f"fusion.weights is {list(weights)}: give one of the arms more than 0.")


def _weights(weights: Sequence[float | int] | None, arms: int) -> Float32[np.ndarray, "A"]:
    if weights is None:
        return np.ones(arms, np.float32)
    if len(weights) != arms:
        raise UserError(f"fusion.weights has {len(weights)} numbers for {arms} arms: give one for each arm.")
    return np.asarray(weights, np.float32)


def _fused(
    rankings: Sequence[Sequence[Ranking]], scored: Callable[[list[ScoreTable], int], Float[Array, "Q C"]]
) -> list[list[tuple[Id, float]]]:
    """All queries, those of one shape together; `scored` maps up to _BATCH tables to their [_BATCH, C] scores."""
    tables = [score_table(arms) for arms in rankings]
    shapes: dict[tuple[int, int], list[int]] = {}
    for query, table in enumerate(tables):
        if len(table.scores):  # else no arm was asked
            shapes.setdefault((len(table.scores), _padded(len(table.ids))), []).append(query)
    results: list[list[tuple[Id, float]]] = [[] for _ in tables]
    for (arms, _), queries in shapes.items():
        for start in range(0, len(queries), _BATCH):
            batch = queries[start : start + _BATCH]
            fused = scored([tables[query] for query in batch], arms)
            for query, row in zip(batch, np.asarray(fused), strict=False):
                results[query] = _ranked(tables[query].ids, row)
    return results


def _ranked(ids: Sequence[Id], scores: Float32[np.ndarray, "C"]) -> list[tuple[Id, float]]:
    order = np.argsort(-scores[: len(ids)], kind="stable")
    return [(ids[i], float(scores[i])) for i in order]


def _padded(candidates: int) -> int:
    return max(_LEAST, 1 << (candidates - 1).bit_length())


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[A, C] arrays of one arm count and one bucket -> [_BATCH, A, C of the bucket], filled up with zeros."""
    arms, _ = arrays[0].shape
    stacked = np.zeros((_BATCH, arms, _padded(arrays[0].shape[1])), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=False):
        row[:, : array.shape[1]] = array
    return stacked
