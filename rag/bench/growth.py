"""Measure how seconds grow with size: attention with tokens, search with vectors, ingest with chunks.

A power law is fitted to each by least squares of the logarithms, and its exponent is compared with the theoretical one:
2 for attention, 1 for search and ingest. A constant cost (a dispatch, a file) makes the smallest sizes slower than the
law, and the fitted exponent smaller.

Ingest goes from documents in memory to an index on disk. Its embedding costs seconds in proportion to the text, so its
passages are short; "write" is the same without embedding (postings and segment, random vectors) and goes to larger
sizes. A size that is expected to take more than `seconds`, by the size before it, is left out, and a line says so.

Letters: N vectors, E embedding dim, T query tokens, H query heads, K kv heads, D head dim.
"""

import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float32

from rag.bench import page
from rag.bench.timing import Row, alternate
from rag.embed.bert import BertEmbedder
from rag.index.dense.exact import DenseIndex
from rag.index.lexical.analyzer import Analyzer
from rag.index.lexical.postings import LexicalIndex
from rag.index.writer import write_index
from rag.ingest.chunk.split import chunks_of
from rag.ingest.chunk.whole import WholeChunker
from rag.ops.attention import attention
from rag.runtime.machine.measurement import Spread
from rag.runtime.options import Count, Filled, check_fields
from rag.types import Document, UserError

MeasureSize = Callable[[int], list[float]]  # size -> seconds of each repeat

_THEORY = {"attention": 2, "search": 1, "ingest": 1, "write": 1}
_EXPONENT = "exponent"
_BLOCK = 1 << 16  # vectors drawn at once


@dataclass(frozen=True, slots=True)
class PowerLaw:
    """The law seconds = scale * size ** exponent; `error` is the standard error of the exponent."""

    exponent: float
    scale: float
    error: float


@dataclass(frozen=True)
class GrowthBenchmark:
    """Measure the seconds at each size and the exponent of their growth; conf/bench/growth.yaml has the defaults."""

    tokens: Sequence[Count]
    vectors: Sequence[Count]
    chunks: Sequence[Count]
    words: Count
    dim: Count
    heads: Count
    kv_heads: Count
    head_dim: Count
    seconds: Count
    embedder: Filled
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each size of each series, then one for its fitted law."""
        found = self._rows("attention", self.tokens, self._attention)
        found += self._rows("search", self.vectors, self._search)
        embedder = BertEmbedder(self.embedder)
        embedder.encode(passages(1000, self.words, seed=1))  # compiles
        found += self._rows("ingest", self.chunks, lambda size: self._ingest(size, embedder, embedder.encode))
        return found + self._rows(
            "write", self.chunks, lambda size: self._ingest(size, embedder, self._random)
        )

    def picture(self, rows: Sequence[Row]) -> bytes | None:
        """Draw all series, each with its law; return PNG bytes, or None without any."""
        found = [one for name in _THEORY if (one := series(name, rows))]
        return page.growth(found) if found else None

    def _rows(self, name: str, sizes: Sequence[int], measure: MeasureSize) -> list[Row]:
        """Measure the sizes in order, as far as time allows, then fit the law."""
        rows, previous = [], None
        for size in sorted(sizes):
            if previous and (expected := previous[1] * (size / previous[0]) ** _THEORY[name]) > self.seconds:
                print(f"{name}: {size:,} is left out, it would take about {expected:.0f} s", file=sys.stderr)
                continue
            taken = measure(size)
            previous = size, float(np.median(taken))
            rows.append(Row(f"{name}: {size:,}", {"size": size, "ms": Spread.of([1000 * s for s in taken])}))
        if len(rows) < 2:
            return rows
        law = power_law(*_points(name, rows))
        figures = {_EXPONENT: law.exponent, "standard error": law.error, "theory": _THEORY[name]}
        return [*rows, Row(f"{name}, fitted", figures)]

    def _attention(self, tokens: int) -> list[float]:
        draw = np.random.default_rng(0).standard_normal
        q, k, v = (
            jnp.asarray(draw((1, heads, tokens, self.head_dim), np.float32))
            for heads in (self.heads, self.kv_heads, self.kv_heads)
        )
        causal = jax.jit(lambda q, k, v: attention(q, k, v, causal=True))
        return self._repeated(lambda: causal(q, k, v))

    def _search(self, count: int) -> list[float]:
        index, question = DenseIndex(units(count, self.dim)), units(1, self.dim, seed=1)
        return self._repeated(lambda: index.search(question, 10))

    def _repeated(self, call: Callable[[], object]) -> list[float]:
        timing = alternate({"": call}, repeats=self.repeats, warmup=2)[""]
        return [timing.minimum, timing.median, timing.maximum]

    def _ingest(
        self, count: int, embedder: BertEmbedder, encode: Callable[[list[str]], np.ndarray]
    ) -> list[float]:
        texts = passages(count, self.words, seed=count)
        documents = [Document(f"{i}", f"{i}.txt", text) for i, text in enumerate(texts)]
        with tempfile.TemporaryDirectory() as folder:
            begin = time.perf_counter()
            chunks = [
                chunk for document in documents for chunk in chunks_of(document, WholeChunker(), embedder)
            ]
            vectors = encode([chunk.text for chunk in chunks])
            lexical = LexicalIndex.build([chunk.text for chunk in chunks], Analyzer())
            write_index(Path(folder) / "index", documents, chunks, vectors, embedder, lexical=lexical)
            return [time.perf_counter() - begin]

    def _random(self, texts: list[str]) -> Float32[np.ndarray, "N E"]:
        return units(len(texts), self.dim)


def units(count: int, dim: int, seed: int = 0) -> Float32[np.ndarray, "N E"]:
    """Return random unit vectors."""
    rng, vectors = np.random.default_rng(seed), np.empty((count, dim), np.float32)
    for start in range(0, count, _BLOCK):
        block = vectors[start : start + _BLOCK]
        block[:] = rng.standard_normal(block.shape, np.float32)
        block /= np.linalg.norm(block, axis=1, keepdims=True)
    return vectors


def passages(count: int, words: int, seed: int) -> list[str]:
    """Return different passages of made-up words whose frequencies follow Zipf's law."""
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.3, (count, words)), 50_000)
    return [f"{number} " + " ".join(_word(rank) for rank in row) for number, row in enumerate(ranks.tolist())]


def _word(rank: int) -> str:
    """Return a pronounceable word, a different one for each number."""
    return "".join(_syllables(rank))


def _syllables(rank: int) -> Iterator[str]:
    while rank:
        rank, digit = divmod(rank, 50)
        yield "bdfgklmnrt"[digit // 5] + "aeiou"[digit % 5]


def power_law(sizes: Sequence[int], seconds: Sequence[float]) -> PowerLaw:
    """Fit the law by least squares of log seconds over log size. Raises UserError for fewer than two sizes."""
    if len(set(sizes)) < 2:
        raise UserError(f"a law of growth needs two sizes or more, not {sorted(set(sizes))}")
    x, y = np.log(np.asarray(sizes, float)), np.log(np.asarray(seconds, float))
    centred = x - x.mean()
    exponent = float(centred @ y / (centred @ centred))
    level = float(y.mean() - exponent * x.mean())
    left = y - level - exponent * x
    error = float(np.sqrt(left @ left / max(len(x) - 2, 1) / (centred @ centred)))
    return PowerLaw(exponent, float(np.exp(level)), error)


def _points(name: str, rows: Sequence[Row]) -> tuple[list[int], list[float]]:
    """Return the sizes and median seconds of a series."""
    sizes, seconds = [], []
    for row in rows:
        size, ms = row.ours.get("size"), row.ours.get("ms")
        if row.case.startswith(f"{name}: ") and isinstance(size, int) and isinstance(ms, Spread):
            sizes.append(size)
            seconds.append(ms.median / 1000)
    return sizes, seconds


def series(name: str, rows: Sequence[Row]) -> page.GrowthSeries | None:
    """Return one series of the rows, for its picture; None with fewer than two sizes."""
    sizes, seconds = _points(name, rows)
    if len(sizes) < 2:
        return None
    law = power_law(sizes, seconds)
    return page.GrowthSeries(name, sizes, seconds, law.exponent, law.scale, _THEORY[name])
