"""The weights of terms: BM25 in five variants, and TF-IDF with the cosine.

    N passages, T terms of a question, C candidate passages; a posting is a term in a passage

A score is a sum over the terms of the question. All variants split it in the same way, so that an index stores only
counts: the weight of the term in the question, times its impact on the passage, which depends on the term's frequency
there and on a normaliser of the passage; plus, for two variants, a constant for the question's terms that a passage
lacks.
"""

from dataclasses import dataclass
from types import ModuleType
from typing import Annotated, Any, Literal

import jax.numpy as jnp
import numpy as np
from annotated_types import Ge, Le
from jaxtyping import Array, Float, Float32, Float64, Int, Integer, Num, Shaped

from rag.runtime.options import Share, check_fields

Variant = Literal["lucene", "robertson", "atire", "bm25+", "bm25l"]
Counts = Int[np.ndarray, "T"]


@dataclass(frozen=True)
class BM25Weights:
    """Okapi BM25 in the variants of Kamphuis et al. ("Which BM25 Do You Mean?", ECIR 2020), as bm25s computes them.

    With f the term's frequency in a passage of L terms, mean length A, N passages of which n have the term, and
    K = 1 - b + b L / A, a passage scores the sum of idf * tf over the terms of the question, each as often as
    it is there:

        variant     idf                                   tf
        lucene      ln(1 + (N - n + 0.5) / (n + 0.5))     f / (f + k1 K)
        robertson   max(0, ln((N - n + 0.5) / (n + 0.5))) f / (f + k1 K)
        atire       ln(N / n)                             f (k1 + 1) / (f + k1 K)
        bm25+       ln((N + 1) / n)                       f (k1 + 1) / (f + k1 K) + delta    (Lv and Zhai, CIKM 2011)
        bm25l       ln((N + 1) / (n + 0.5))               (f / K + delta) (k1 + 1) / (f / K + delta + k1)   (SIGIR 2011)

    The last two also count terms that the passage lacks, with f = 0: the same constant for every passage.
    Raises UserError for an unknown variant, k1 or delta below 0, b outside 0 to 1, and numbers that are not finite.
    """

    variant: Variant = "lucene"
    k1: Annotated[float, Ge(0), Le(1000)] = 1.5  # how slowly repetitions saturate; at 0 only presence counts
    b: Share = 0.75  # how much long passages are penalised, 0 to 1
    delta: Annotated[float, Ge(0), Le(1000)] = 0.5  # the weight of presence alone, for bm25+ and bm25l

    def __post_init__(self):
        check_fields(self)

    def normaliser(
        self,
        df: Int[np.ndarray, "V"],
        rows: Int[np.ndarray, "postings"],
        frequencies: Integer[np.ndarray, "postings"],
        lengths: Int[np.ndarray, "N"],
    ) -> Float32[np.ndarray, "N"]:
        """Return K of every passage.

        Args:
            df: in how many passages each term is.
            rows: the passage of each posting, term by term.
            frequencies: how often the term is there.
            lengths: the number of terms of each passage.
        """
        return length_ratio(lengths, mean_length(lengths), self.b).astype(np.float32)

    def impact(
        self,
        frequencies: Integer[np.ndarray, "postings"],
        normaliser: Float32[np.ndarray, "postings"],
        df: int,
        passages: int,
    ) -> Float32[np.ndarray, "postings"]:
        """Return what one term adds to the passages that have it, beyond what it gives to all.

        Args:
            frequencies: how often the term is in each of these passages.
            normaliser: what `normaliser` returned for them.
            df: how many they are.
            passages: N.
        """
        tf = _saturated(self.variant, frequencies.astype(np.float32), normaliser, self.k1, self.delta)
        idf = float(_idf(self.variant, np.float64(df), passages, np))
        beyond = np.maximum(tf - _absent(self.variant, self.k1, self.delta), 0)  # below 0 by rounding only
        return (idf * beyond).astype(np.float32)

    def question(self, counts: Counts, df: Counts, passages: int) -> tuple[Float64[np.ndarray, "T"], float]:
        """Return the weight of each term in the question, 0 where its idf is, and the constant for all passages."""
        idf = _idf(self.variant, df.astype(np.float64), passages, np)
        constant = float(counts @ idf) * _absent(self.variant, self.k1, self.delta)
        return np.where(idf > 0, counts, 0.0), constant


@dataclass(frozen=True)
class TfIdfWeights:
    """The cosine of TF-IDF vectors, with scikit-learn's formulas: idf = 1 + ln((1 + N) / (1 + n)), rows of length 1.

    With `sublinear` a term counts 1 + ln(f) times instead of f. Terms that no passage has do not count.
    """

    sublinear: bool = False

    def __post_init__(self):
        check_fields(self)

    def normaliser(
        self,
        df: Int[np.ndarray, "V"],
        rows: Int[np.ndarray, "postings"],
        frequencies: Integer[np.ndarray, "postings"],
        lengths: Int[np.ndarray, "N"],
    ) -> Float32[np.ndarray, "N"]:
        """Return one over the length of every passage's vector, 0 where there are no terms; see BM25Weights."""
        idf = np.repeat(self._idf(df, len(lengths)), df)
        squares = np.bincount(rows, (self._tf(frequencies) * idf) ** 2, minlength=len(lengths))
        inverse = np.divide(1, np.sqrt(squares), out=np.zeros(len(lengths)), where=squares > 0)
        return inverse.astype(np.float32)

    def impact(
        self,
        frequencies: Integer[np.ndarray, "postings"],
        normaliser: Float32[np.ndarray, "postings"],
        df: int,
        passages: int,
    ) -> Float32[np.ndarray, "postings"]:
        """Return the term's component of the unit vectors of the passages that have it; see BM25Weights."""
        return (self._tf(frequencies) * self._idf(np.int64(df), passages) * normaliser).astype(np.float32)

    def question(self, counts: Counts, df: Counts, passages: int) -> tuple[Float64[np.ndarray, "T"], float]:
        """Return the question's unit vector, and 0: no constant for all passages."""
        vector = self._tf(counts) * self._idf(df, passages)
        return vector / np.linalg.norm(vector), 0.0

    def _tf(self, frequencies: Integer[np.ndarray, "..."]) -> Float64[np.ndarray, "..."]:
        return 1 + np.log(frequencies, dtype=np.float64) if self.sublinear else frequencies.astype(np.float64)

    def _idf(self, df: Any, passages: int) -> Any:
        return 1 + np.log((1 + passages) / (1 + df))


Weights = BM25Weights | TfIdfWeights


def bm25_scores(
    tf: Num[Array | np.ndarray, "T C"],
    df: Num[Array | np.ndarray, "T"],
    lengths: Num[Array | np.ndarray, "C"],
    passages: Any,
    average: Any,
    k1: Any,
    b: Any,
    *,
    variant: Variant = "lucene",
    delta: float = 0.5,
) -> Float[Array, "C"]:
    """Compute BM25 of one question's candidates, for tuning; all arguments but `variant` and `delta` may be traced.

    Terms with df = 0 add nothing, so questions can be padded to one shape and vmapped; so can k1 and b.

    Args:
        tf: the frequency of each term in each candidate, as LexicalIndex.features returns it.
        df: how many passages have each term.
        lengths: terms of each candidate.
        passages: the length of the LexicalIndex.
        average: its average_length.
        k1, b, variant, delta: those of BM25Weights.
    """
    norm = length_ratio(lengths, average, b)
    idf = jnp.where(df > 0, _idf(variant, jnp.maximum(df, 1).astype(jnp.float32), passages, jnp), 0)
    there = tf > 0
    present = _saturated(variant, jnp.where(there, tf, 1).astype(jnp.float32), norm, k1, delta)
    return jnp.einsum(
        "t,tc->c", idf, jnp.where(there, present, _absent(variant, k1, delta)), precision="highest"
    )


def mean_length(lengths: Int[np.ndarray, "N"]) -> float:
    """Return the terms of an average passage; 1 where no passage has any, so that it can be divided by."""
    return float(lengths.mean(dtype=np.float64)) if lengths.any() else 1.0


def length_ratio(lengths: Shaped[Any, "C"], average: Any, b: Any) -> Shaped[Any, "C"]:
    """Return K of the formulas, 1 for a passage of average length; for NumPy and JAX arrays."""
    return 1 - b + b * (lengths / average)


def _idf(variant: Variant, df: Any, passages: Any, xp: ModuleType) -> Any:
    """Return the idf column of the table, df >= 1; `xp` is numpy or jax.numpy."""
    odds = (passages - df + 0.5) / (df + 0.5)
    match variant:
        case "lucene":
            return xp.log(1 + odds)
        case "robertson":
            return xp.log(xp.maximum(odds, 1))
        case "atire":
            return xp.log(passages / df)
        case "bm25+":
            return xp.log((passages + 1) / df)
        case "bm25l":
            return xp.log((passages + 1) / (df + 0.5))


def _saturated(variant: Variant, tf: Any, norm: Any, k1: Any, delta: float) -> Any:
    """Return the tf column of the table for f >= 1."""
    match variant:
        case "lucene" | "robertson":
            return tf / (tf + k1 * norm)
        case "atire":
            return tf * (k1 + 1) / (tf + k1 * norm)
        case "bm25+":
            return tf * (k1 + 1) / (tf + k1 * norm) + delta
        case "bm25l":
            shifted = tf / norm + delta
            return shifted * (k1 + 1) / (shifted + k1)


def _absent(variant: Variant, k1: Any, delta: float) -> Any:
    """Return the tf column of the table for f = 0."""
    if variant == "bm25+":
        return delta
    return delta * (k1 + 1) / (delta + k1) if variant == "bm25l" and delta > 0 else 0.0
