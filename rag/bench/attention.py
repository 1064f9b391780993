"""Our attention beside its lax form alone, jax.nn.dot_product_attention and torch's scaled_dot_product_attention.

Causal, float32, the same arrays for all. FLOP/s count the products that the causal triangle needs, 2 forward and
5 backward, so a program that also computes what the mask throws away shows less.

Letters: B batch, T tokens, H query heads, K kv heads, D head dim.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from rag.bench.timing import Row, alternate, compiled_temp_bytes, ratio
from rag.ops.attention import IMPLEMENTATIONS, attention
from rag.runtime.machine import cores
from rag.runtime.measurement import Timing
from rag.runtime.options import Count, Counts, check_fields

Call = Callable[[], object]

_FORWARD, _BACKWARD = 2, 5  # matrix products of 2 T^2/2 D FLOP a head
_OFTEN = 4096  # tokens up to which every repeat is run; longer ones take proportionally fewer


@dataclass(frozen=True)
class AttentionBenchmark:
    """bench=attention: milliseconds, FLOP/s and temporary memory for every length and head dim, both ways."""

    tokens: Counts = (512, 1024, 2048, 4096, 8192, 16384)
    head_dims: Counts = (32, 64, 128)
    batch: Count = 1
    heads: Count = 9
    kv_heads: Count = 3
    # ours: the door's choice, beside which "flash" stands too, or a name
    implementation: Literal[IMPLEMENTATIONS] | None = None
    gradients: bool = True  # also forward and backward together
    repeats: Count = 7  # of lengths up to 4,096
    jax_nn_tokens: Count = 2048  # longest for jax.nn, whose T x T scores take gigabytes beyond

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        ways = ("forward", "forward+backward") if self.gradients else ("forward",)
        return [self._row(t, d, way) for d in self.head_dims for t in self.tokens for way in ways]

    def _row(self, tokens: int, dim: int, way: str) -> Row:
        shapes = ((self.heads, tokens, dim), (self.kv_heads, tokens, dim), (self.kv_heads, tokens, dim))
        draw = np.random.default_rng(0).standard_normal
        q, k, v, dout = (draw((self.batch, *shape), np.float32) for shape in (*shapes, shapes[0]))
        arrays = tuple(jnp.asarray(x) for x in ((q, k, v, dout) if way != "forward" else (q, k, v)))
        programs: dict[str, Callable[..., Array]] = {
            "ours": partial(_ours, implementation=self.implementation)
        }
        if self.implementation is None:
            programs["ours, flash in lax"] = partial(_ours, implementation="flash")
        if tokens <= self.jax_nn_tokens:
            programs["jax.nn"] = _jax_nn
        if way != "forward":
            programs = {name: _with_gradients(program) for name, program in programs.items()}
        memory = {name: compiled_temp_bytes(program, *arrays) for name, program in programs.items()}
        calls: dict[str, Call] = {name: _bound(jax.jit(f), arrays) for name, f in programs.items()}
        calls |= _torch(q, k, v, dout, way)
        # After its turn a peer's thread pool spins for a while, on the cores of whoever comes next.
        repeats = -(-self.repeats * _OFTEN // max(_OFTEN, tokens))  # rounded up
        timings = alternate(calls | {"rest": lambda: time.sleep(0.02)}, repeats=repeats, warm_up=True)
        del timings["rest"]
        flop = (_FORWARD + (way != "forward") * _BACKWARD) * self.batch * self.heads * tokens**2 * dim
        figures = {name: _figures(timing, flop, memory.get(name)) for name, timing in timings.items()}
        mine = figures.pop("ours")
        case = f"B{self.batch} H{self.heads} K{self.kv_heads} D{dim} T={tokens} {way}"
        return Row(case, mine, figures, {name: ratio(timings["ours"], timings[name]) for name in figures})


def _ours(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K T D"],
    v: Float[Array, "B K T D"],
    implementation: str | None,
) -> Float[Array, "B H T D"]:
    return attention(q, k, v, causal=True, implementation=implementation)


def _figures(timing: Timing, flop: int, temporary: int | None) -> dict[str, float]:
    figures = {"ms": 1000 * timing.median, "float32 GFLOP/s": flop / timing.median / 1e9}
    return figures if temporary is None else figures | {"temp MiB": temporary / 2**20}


def _jax_nn(
    q: Float[Array, "B H T D"], k: Float[Array, "B K T D"], v: Float[Array, "B K T D"]
) -> Float[Array, "B H T D"]:
    """The peer takes tokens before heads; on CPU it has but one implementation."""
    q, k, v = (x.swapaxes(1, 2) for x in (q, k, v))
    return jax.nn.dot_product_attention(q, k, v, is_causal=True).swapaxes(1, 2)


def _with_gradients(program: Callable[..., Array]) -> Callable[..., tuple]:
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
        print("torch is not installed: its columns are left out (make bench-setup)", file=sys.stderr)
        return {}
    torch.set_num_threads(cores())
    q, k, v, dout = (torch.from_numpy(x) for x in (q, k, v, dout))
    attend = torch.nn.functional.scaled_dot_product_attention

    def forward() -> object:
        with torch.no_grad():
            return attend(q, k, v, is_causal=True, enable_gqa=True)

    def both_ways() -> object:
        leaves = [x.detach().requires_grad_() for x in (q, k, v)]
        out = attend(*leaves, is_causal=True, enable_gqa=True)
        return out, torch.autograd.grad(out, leaves, dout)

    return {"torch": forward if way == "forward" else both_ways}
