"""Compare our attention with its lax form alone, jax.nn.dot_product_attention and torch's scaled_dot_product_attention.

All are causal, in float32, on the same arrays. FLOP/s count the matrix products inside the causal triangle, 2 forward
and 5 backward, so a program that also computes the masked half shows a lower rate.

Letters: B batch, T tokens, H query heads, K kv heads, D head dim.
"""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rag.bench.peers import print_left_out
from rag.bench.timing import Row, alternate, compiled_temp_bytes, ratio
from rag.ops.attention import IMPLEMENTATIONS, attention
from rag.runtime.machine.hardware import cores
from rag.runtime.machine.measurement import Timing
from rag.runtime.options import Count, Counts, check_fields

Call = Callable[[], object]

_FORWARD, _BACKWARD = 2, 5  # matrix products, each of 2 T^2/2 D FLOP per head
_ALL_REPEATS = 4096  # tokens up to which all repeats are run; longer sequences take proportionally fewer


@dataclass(frozen=True)
class AttentionBenchmark:
    """Measure milliseconds, FLOP/s and temporary memory; conf/bench/attention.yaml has the defaults."""

    tokens: Counts
    head_dims: Counts
    batch: Count
    heads: Count
    kv_heads: Count
    implementation: Literal[tuple(IMPLEMENTATIONS)] | None  # type: ignore[valid-type] # the names of a table
    gradients: bool
    repeats: Count
    jax_nn_tokens: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each head dim, length and direction."""
        ways = ("forward", "forward+backward") if self.gradients else ("forward",)
        return [self._row(t, d, way) for d in self.head_dims for t in self.tokens for way in ways]

    def _row(self, tokens: int, dim: int, way: str) -> Row:
        shapes = ((self.heads, tokens, dim), (self.kv_heads, tokens, dim), (self.kv_heads, tokens, dim))
        draw = np.random.default_rng(0).standard_normal
        q, k, v, dout = (draw((self.batch, *shape), np.float32) for shape in (*shapes, shapes[0]))
        arrays = tuple(jnp.asarray(x) for x in ((q, k, v, dout) if way != "forward" else (q, k, v)))
        ours = partial(attention, causal=True)
        programs: dict[str, Callable[..., Any]] = {"ours": partial(ours, implementation=self.implementation)}
        if self.implementation is None:
            programs["ours, flash in lax"] = partial(ours, implementation="flash")
        if tokens <= self.jax_nn_tokens:
            programs["jax.nn"] = _jax_nn
        if way != "forward":
            programs = {name: _with_gradients(program) for name, program in programs.items()}
        memory = {name: compiled_temp_bytes(program, *arrays) for name, program in programs.items()}
        calls: dict[str, Call] = {name: _bound(jax.jit(f), arrays) for name, f in programs.items()}
        calls |= _torch(q, k, v, dout, way)
        # After its turn a peer's thread pool spins for a while, on the cores that the next callable needs.
        repeats = math.ceil(self.repeats * _ALL_REPEATS / max(_ALL_REPEATS, tokens))
        timings = alternate(
            calls | {"rest": lambda: time.sleep(0.02)}, repeats=repeats, warmup_each_turn=True
        )
        del timings["rest"]
        flop = (_FORWARD + (way != "forward") * _BACKWARD) * self.batch * self.heads * tokens**2 * dim
        figures = {name: _figures(timing, flop, memory.get(name)) for name, timing in timings.items()}
        mine = figures.pop("ours")
        case = f"B{self.batch} H{self.heads} K{self.kv_heads} D{dim} T={tokens} {way}"
        return Row(case, mine, figures, {name: ratio(timings["ours"], timings[name]) for name in figures})


def _figures(timing: Timing, flop: int, temporary: int | None) -> dict[str, float]:
    figures = {"ms": 1000 * timing.median, "float32 GFLOP/s": flop / timing.median / 1e9}
    return figures if temporary is None else figures | {"temp MiB": temporary / 2**20}


def _jax_nn(
    q: Float[Array, "B H T D"], k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]
) -> Float[Array, "B H T D"]:
    """Call the peer, which takes tokens before heads; on CPU it has only one implementation."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(1, 2)


def _with_gradients(program: Callable[..., Any]) -> Callable[..., Any]:
    def both_ways(q: Array, k: Array, v: Array, dout: Array) -> tuple:
        out, backward = jax.vjp(program, q, k, v)
        return out, backward(dout)

    return both_ways


def _bound(program: Callable[..., object], arrays: tuple[Array, ...]) -> Call:
    return lambda: program(*arrays)


def _torch(q: np.ndarray, k: np.ndarray, v: np.ndarray, dout: np.ndarray, way: str) -> dict[str, Call]:
    try:
        import torch
    except ImportError:
        print_left_out("torch", "it is not installed (make bench-setup)")
        return {}
    torch.set_num_threads(cores())
    *inputs, dout_torch = (torch.from_numpy(x) for x in (q, k, v, dout))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> object:
        with torch.no_grad():
            return attend(*inputs, is_causal=True, enable_gqa=True)

    def both_ways() -> object:
        leaves = [x.detach().requires_grad_() for x in inputs]
        out = attend(*leaves, is_causal=True, enable_gqa=True)
        return out, torch.autograd.grad(out, leaves, dout_torch)

    return {"torch": forward if way == "forward" else both_ways}
