"""Brute-force oracles, written like the formulas, and the tolerances of the whole suite.

Letters: B batch, T query tokens, S key tokens, H query heads, D head dim, M width, V vocab, N vectors, Q queries.
"""

import math
from collections import Counter
from itertools import pairwise
from typing import NamedTuple

import numpy as np

# --- tolerances ---------------------------------------------------------------------------------------------

# Attention, against float64: absolute for results of the order of 1, and relative to the largest entry for gradients.
# Accelerators multiply float32 in TF32 or bfloat16 passes.
ATTENTION_TOLERANCE = {"cpu": {"float32": 1e-5, "bfloat16": 1e-2}}
ATTENTION_TOLERANCE_ACCELERATOR = {"float32": 5e-3, "bfloat16": 2e-2}


def attention_tolerance(dtype: str, backend: str) -> float:
    """Return the largest error allowed for inputs of `dtype` on `backend`."""
    return ATTENTION_TOLERANCE.get(backend, ATTENTION_TOLERANCE_ACCELERATOR)[dtype]


# Logits of a whole decoder against transformers, relative to the largest.
DECODER_TOLERANCE = 1e-4

# Hidden states of a whole encoder against transformers, and vectors of one text in different batches:
# absolute, for results of the order of 1.
ENCODER_TOLERANCE = 2e-5


# --- attention ----------------------------------------------------------------------------------------------


class AttentionOracle(NamedTuple):
    """Results in float64; the gradients are those of sum(out * dout) + sum(lse * dlse)."""

    out: np.ndarray  # B H T D
    lse: np.ndarray  # B H T
    dq: np.ndarray
    dk: np.ndarray
    dv: np.ndarray


def attention_mask(
    batch,
    queries,
    keys,
    *,
    causal,
    window,
    q_offset,
    kv_length,
    q_segments,
    kv_segments,
    q_positions=None,
    q_prefixes=None,
) -> np.ndarray:
    """Return which keys each query attends to, computed pair by pair: [B, T, S]."""
    mask = np.zeros((batch, queries, keys), bool)
    offsets = np.broadcast_to(q_offset, batch)
    for b, t, s in np.ndindex(mask.shape):
        i = offsets[b] + t if q_positions is None else q_positions[b, t]
        sees = kv_length is None or s < kv_length[b]
        sees &= not causal or s <= i
        sees &= window is None or abs(i - s) < window
        if q_segments is not None:
            seen = {q_segments[b, t], q_segments[b, t] if q_prefixes is None else q_prefixes[b, t]}
            sees &= q_segments[b, t] >= 0 and kv_segments[b, s] >= 0 and kv_segments[b, s] in seen
        mask[b, t, s] = sees
    return mask


def attention_oracle(
    q,
    k,
    v,
    *,
    dout,
    dlse=None,
    causal=False,
    window=None,
    q_offset=0,
    q_positions=None,
    kv_length=None,
    q_segments=None,
    kv_segments=None,
    q_prefixes=None,
    scale=None,
) -> AttentionOracle:
    """Compute attention and its gradients in float64, head by head, by the textbook formulas."""
    q, k, v, dout = (np.asarray(x, np.float64) for x in (q, k, v, dout))
    batch, heads, queries, dim = q.shape
    group = heads // k.shape[1]
    scale = dim**-0.5 if scale is None else scale
    mask = attention_mask(
        batch, queries, k.shape[2], causal=causal, window=window, q_offset=q_offset, kv_length=kv_length,
        q_segments=q_segments, kv_segments=kv_segments, q_positions=q_positions, q_prefixes=q_prefixes,
    )  # fmt: skip
    out, lse = np.zeros_like(q), np.full(q.shape[:3], -np.inf)
    dq, dk, dv = np.zeros_like(q), np.zeros_like(k), np.zeros_like(v)
    for b, h in np.ndindex(batch, heads):
        g = h // group
        scores = np.where(mask[b], scale * q[b, h] @ k[b, g].T, -np.inf)
        seen = mask[b].any(axis=1)
        top = np.where(seen, scores.max(axis=1, initial=-np.inf), 0.0)
        weights = np.exp(scores - top[:, None])
        total = weights.sum(axis=1)
        weights /= np.where(seen, total, 1.0)[:, None]
        out[b, h] = weights @ v[b, g]
        lse[b, h, seen] = top[seen] + np.log(total[seen])
        dweights = dout[b, h] @ v[b, g].T
        dscores = weights * (dweights - (weights * dweights).sum(axis=1, keepdims=True))
        if dlse is not None:
            dscores += weights * np.asarray(dlse, np.float64)[b, h][:, None]
        dq[b, h] = scale * dscores @ k[b, g]
        dk[b, g] += scale * dscores.T @ q[b, h]
        dv[b, g] += weights.T @ dout[b, h]
    return AttentionOracle(out, lse, dq, dk, dv)


# --- retrieval metrics --------------------------------------------------------------------------------------

METRIC_TOLERANCE = 1e-6  # absolute


def ranking_oracle(scores: dict[str, float]) -> list[str]:
    """Return the documents, the best first; of equal scores the lower id first."""
    ranking = []
    left = dict(scores)
    while left:
        best = max(left.values())
        ranking.append(min(document for document in left if left[document] == best))
        del left[ranking[-1]]
    return ranking


def metric_oracle(measure: str, cutoff: int | None, grades: dict[str, int], ranking: list[str]) -> float:
    """Compute the metric of one query as trec_eval defines it; `cutoff` None uses the whole ranking."""
    seen = np.array([max(grades.get(document, 0), 0) for document in ranking[:cutoff]], float)
    ideal = np.sort(np.maximum(list(grades.values()), 0))[::-1][:cutoff].astype(float)
    relevant = sum(grade > 0 for grade in grades.values())
    ranks = np.flatnonzero(seen) + 1
    match measure:
        case "nDCG":
            gain, best = ((g / np.log2(np.arange(len(g)) + 2)).sum() for g in (seen, ideal))
            return gain / best if best else 0.0
        case "MAP":
            return sum((i + 1) / rank for i, rank in enumerate(ranks)) / relevant if relevant else 0.0
        case "MRR":
            return 1 / ranks[0] if len(ranks) else 0.0
        case "Recall":
            return len(ranks) / relevant if relevant else 0.0
        case "Precision":
            return len(ranks) / cutoff
        case "Success":
            return float(len(ranks) > 0)
    raise ValueError(measure)


# --- tokenizers ---------------------------------------------------------------------------------------------


def merge_tokens(pieces: list[str], rank) -> list[str]:
    """Byte-pair encoding: merge the adjacent pair of lowest rank, the leftmost on ties, while a pair has a rank."""
    pieces = list(pieces)
    while True:
        ranked = [(rank(left, right), i) for i, (left, right) in enumerate(pairwise(pieces))]
        best = min((found for found in ranked if found[0] is not None), default=None)
        if best is None:
            return pieces
        i = best[1]
        pieces[i : i + 2] = [pieces[i] + pieces[i + 1]]


def longest_pieces(word: str, vocabulary: set[str], unknown: str) -> list[str]:
    """WordPiece: take the longest known beginning, then the longest known "##" continuations; else unknown."""
    pieces, start = [], 0
    while start < len(word):
        marks = "##" if start else ""
        ends = [end for end in range(start + 1, len(word) + 1) if marks + word[start:end] in vocabulary]
        if not ends:
            return [unknown]
        pieces.append(marks + word[start : max(ends)])
        start = max(ends)
    return pieces


# --- sampling -----------------------------------------------------------------------------------------------


def kept_by_filters(logits, top_k, top_p, min_p) -> tuple[np.ndarray, np.ndarray]:
    """Apply top-k, then top-p, then min-p to one row of logits [V], in float64.

    Returns:
        Which tokens remain [V], and for which tokens that does not depend on rounding [V].
    """
    logits = np.asarray(logits, np.float64)
    kept = np.ones(len(logits), bool)
    decided = kept.copy()
    if 0 < top_k < len(logits):
        kept[np.argsort(-logits)[top_k:]] = False
    if top_p < 1:
        weights = np.where(kept, np.exp(logits - logits.max()), 0)
        share, order = weights / weights.sum(), np.argsort(-np.where(kept, logits, -np.inf))
        before = np.concatenate([[0], np.cumsum(share[order])[:-1]])
        kept[order[before >= top_p]] = False
        decided[order[np.abs(before - top_p) < 1e-5]] = False
    if min_p > 0:
        ratio = np.exp(logits - logits.max())
        kept &= ratio >= min_p
        decided &= np.abs(ratio - min_p) > 1e-5
    return kept, decided


# --- embedding ----------------------------------------------------------------------------------------------


def pooling_oracle(hidden: np.ndarray, lengths: np.ndarray, mode: str, normalize: bool) -> np.ndarray:
    """Return one vector for each row of hidden [B, T, M], in float64."""
    rows = hidden.astype(np.float64)
    pairs = zip(rows, lengths, strict=True)
    vectors = [row[0] if mode == "cls" else row[:length].mean(axis=0) for row, length in pairs]
    return np.array([v / np.sqrt((v**2).sum()) if normalize else v for v in vectors])


def counter_cosine(left: str, right: str) -> float:
    """Return the cosine of two texts' word counts, as in the notebook that this project began with."""
    a, b = Counter(left.lower().split(" ")), Counter(right.lower().split(" "))
    dot = sum(a[word] * b[word] for word in a.keys() & b.keys())
    norms = math.sqrt(sum(n**2 for n in a.values())) * math.sqrt(sum(n**2 for n in b.values()))
    return dot / norms if norms else 0.0


# --- search -------------------------------------------------------------------------------------------------

# Float32 scores of unit vectors against float64.
SEARCH_TOLERANCE = 1e-6


def top_k_oracle(scores, k) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best of each row of scores [Q, N], best first, and their columns; of ties the lower column first."""
    scores = np.asarray(scores, np.float64)
    order = np.argsort(-scores, axis=1, kind="stable")[:, :k]
    return np.take_along_axis(scores, order, axis=1), order
