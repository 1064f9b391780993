"""Fusion: several rankings of one query made into one, by their ranks or by their normalised scores.

    A arms (the rankings that are fused), C candidates (all that any arm returned), Q queries

The maths is written for one query and masked, to be vmapped over queries, weights or constants. A query's result does
not depend on the queries that it is fused with: the size of the program that fuses it follows from its own number of
arms and candidates, and equal terms sum to equal scores whatever arms they come from.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated, Generic, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Bool, Float, Float32, Int, Int32, ScalarLike

from rag.index.normalizers import Normalizer, normalize
from rag.runtime.options import Weight, check_fields
from rag.runtime.shapes import next_power_of_two
from rag.types import UserError

Id = TypeVar("Id", str, int)
Ranking = Sequence[tuple[Id, float]]  # one arm's candidates and their scores, best first
RankConstant = Annotated[float, Ge(0), Le(1e6)]
LowerBound = Annotated[float, Ge(-1e6), Le(1e6)]  # a score

_BATCH = 64  # queries of one call to XLA, always: the program, and so the rounding, is the same for any batch
_LEAST = 32  # candidates of the smallest program; the others have twice as many, and so on


def reciprocal_rank(
    ranks: Int[Array, "A C"], found: Bool[Array, "A C"], constant: ScalarLike, weights: Float[Array, "A"]
) -> Float[Array, "C"]:
    """Return the sum over arms of weight / (constant + rank) (Cormack, Clarke and Buettcher 2009).

    An arm that did not find a candidate adds 0 to it, as if its rank were infinity.

    Args:
        ranks: of each candidate in each arm, from 1.
        found: which candidates each arm found.
        constant: the larger, the less the first ranks count.
        weights: one for each arm.
    """
    terms = jnp.where(found, weights[:, None] / (constant + jnp.where(found, ranks, 1)), 0.0)
    return _sum(terms)


def convex(normalized: Float[Array, "A C"], weights: Float[Array, "A"]) -> Float[Array, "C"]:
    """Return the weighted mean of the arms' normalised scores: sum of weights * normalized / sum of weights."""
    return _sum(normalized * (weights / weights.sum())[:, None])


def _sum(terms: Float[Array, "A C"]) -> Float[Array, "C"]:
    """Sum over arms, the lower terms first, so that candidates with the same terms get the same sum."""
    return jnp.sort(terms, axis=0).sum(axis=0)


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
class ScoreTable(Generic[Id]):
    """The candidates of one query, ids ascending, with each arm's scores and ranks."""

    ids: list[Id]
    scores: Float32[np.ndarray, "A C"]  # 0 where the arm did not find the candidate
    ranks: Int32[np.ndarray, "A C"]  # from 1; 0 where the arm did not find the candidate


def score_table(rankings: Sequence[Ranking[Id]]) -> ScoreTable[Id]:
    """Return the rankings of one query as a table; of an id that is twice in a ranking the first counts.

    Raises ValueError for a score that is not finite.
    """
    firsts: list[dict[Id, tuple[int, float]]] = []
    for ranking in rankings:
        firsts.append({})
        for rank, (name, score) in enumerate(ranking, 1):
            firsts[-1].setdefault(name, (rank, score))
    names = {name for first in firsts for name in first}
    ids = sorted(names)
    column = {name: i for i, name in enumerate(ids)}
    scores = np.zeros((len(rankings), len(ids)), np.float32)
    ranks = np.zeros((len(rankings), len(ids)), np.int32)
    with np.errstate(over="ignore"):  # reported below
        for arm, first in enumerate(firsts):
            for name, (rank, score) in first.items():
                scores[arm, column[name]], ranks[arm, column[name]] = score, rank
    if not np.isfinite(scores).all():
        raise ValueError("a score to fuse is not finite in float32")
    return ScoreTable(ids, scores, ranks)


@runtime_checkable
class Fusion(Protocol):
    """A frozen dataclass that makes one ranking of several."""

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking[Id]]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """Return all candidates of each query, best first, the lower id first where scores tie.

        Args:
            rankings: the arms' rankings of each query.
            lower_bounds: the lowest score that each arm can give, or one number for all arms; None if not known.
        """
        ...


@dataclass(frozen=True)
class ReciprocalRank:
    """Fuse by reciprocal rank: a score is the sum of weight / (constant + rank); the arms' scores are not used.

    `weights` are one for each arm; None is 1 each.

    Raises:
        UserError: for a negative constant, for weights that are negative or all zero, and when fusing for another
            number of weights than arms.
    """

    constant: RankConstant = 60.0
    weights: Sequence[Weight] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_weights(self.weights)

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking[Id]]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """See Fusion. Without weights the queries may have different numbers of arms."""

        def scored(tables: list[ScoreTable], arms: int) -> Float[Array, "Q C"]:
            ranks = _stacked([table.ranks for table in tables])
            return _reciprocal_ranks(ranks, ranks > 0, self.constant, _weights(self.weights, arms))

        return _fused(rankings, scored)


@dataclass(frozen=True)
class Convex:
    """Fuse by the weighted mean of the arms' scores, each arm scaled by `normalizer`.

    `weights` are one for each arm, None for equal ones; only their ratios matter. `lower_bounds`, which
    theoretical_min_max needs, are the lowest score that each arm can give, or one number for all; None takes those that
    are given to `fuse_batch`.

    Raises:
        UserError: for an unknown normalizer, for weights that are negative or all zero, and when fusing for another
            number of weights or lower_bounds than arms, and for lower_bounds that are missing or above a score.
    """

    normalizer: Normalizer = "min_max"
    weights: Sequence[Weight] | None = None
    lower_bounds: Sequence[LowerBound] | None = None

    def __post_init__(self) -> None:
        check_fields(self)
        _check_weights(self.weights)

    def fuse_batch(
        self, rankings: Sequence[Sequence[Ranking[Id]]], lower_bounds: Sequence[float | int] | None = None
    ) -> list[list[tuple[Id, float]]]:
        """See Fusion. The option's own `lower_bounds` replace those given here."""

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
    rankings: Sequence[Sequence[Ranking[Id]]], scored: Callable[[list[ScoreTable], int], Float[Array, "Q C"]]
) -> list[list[tuple[Id, float]]]:
    """Fuse all queries, those of one shape together; `scored` maps up to _BATCH tables to their [_BATCH, C] scores."""
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
    return next_power_of_two(candidates, _LEAST)


def _stacked(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """Return [A, C] arrays of one padded shape as one array [_BATCH, A, padded C], zeros where they end."""
    arms, _ = arrays[0].shape
    stacked = np.zeros((_BATCH, arms, _padded(arrays[0].shape[1])), arrays[0].dtype)
    for row, array in zip(stacked, arrays, strict=False):
        row[:, : array.shape[1]] = array
    return stacked
