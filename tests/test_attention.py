"""Every implementation of attention against a float64 oracle, forward and backward, through the one door."""

from dataclasses import dataclass, field

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag.ops.attention import IMPLEMENTATIONS, attention
from rag.ops.flash import Blocks
from tests.reference import attention_oracle, attention_tolerance

SMALL = Blocks(8, 16)  # many blocks at the lengths of a fast test


@dataclass(frozen=True)
class Case:
    """Shapes, and the options that go to the door and to the oracle alike."""

    b: int = 1
    h: int = 2
    k: int = 2
    t: int = 24
    s: int = 24
    d: int = 32
    options: dict = field(default_factory=dict)


def packed(*rows: str) -> np.ndarray:
    """Segment ids from text: a digit is an id, '-' is padding."""
    return np.array([[-1 if c == "-" else int(c) for c in row] for row in rows], np.int32)


def both(q: np.ndarray, kv: np.ndarray | None = None) -> dict:
    return {"q_segments": q, "kv_segments": q if kv is None else kv}


CAUSAL = {"causal": True}
CASES = {
    "full": Case(),
    "causal": Case(options=CAUSAL),
    "one query": Case(t=1, s=40, options=CAUSAL | {"q_offset": 33}),
    "blocks divide nothing": Case(t=29, s=53),
    "causal, blocks divide nothing": Case(b=2, t=37, s=37, options=CAUSAL),
    "shorter than a block": Case(t=5, s=3),
    "grouped queries": Case(b=2, h=6, k=2, t=19, s=19, options=CAUSAL),
    "one kv head": Case(h=5, k=1, t=18, s=33),
    "narrow heads": Case(d=4, t=17, s=17, options=CAUSAL),
    "64 wide": Case(d=64, h=3, k=1, options=CAUSAL),
    "128 wide": Case(d=128, options=CAUSAL),
    "scale": Case(options=CAUSAL | {"scale": 0.5}),
    "offset": Case(t=7, s=40, options=CAUSAL | {"q_offset": 21}),
    "offset by row": Case(b=3, t=9, s=40, options=CAUSAL | {"q_offset": np.array([0, 13, 31], np.int32)}),
    "offset past the keys": Case(t=9, s=20, options=CAUSAL | {"q_offset": 30}),
    "queries before the keys": Case(t=24, s=24, options=CAUSAL | {"q_offset": -10}),
    "padding": Case(b=3, t=20, s=45, options={"kv_length": np.array([45, 1, 18], np.int32)}),
    "causal padding": Case(b=2, t=45, s=45, options=CAUSAL | {"kv_length": np.array([45, 18], np.int32)}),
    "a row without keys": Case(b=2, t=20, s=33, options={"kv_length": np.array([0, 33], np.int32)}),
    "no keys at all": Case(b=2, t=20, s=33, options=CAUSAL | {"kv_length": np.array([0, 0], np.int32)}),
    "window": Case(t=41, s=41, options={"window": 6}),
    "causal window": Case(b=2, h=4, t=61, s=61, options=CAUSAL | {"window": 19}),
    "window of one": Case(t=20, s=20, options=CAUSAL | {"window": 1}),
    "window wider than all": Case(t=20, s=20, options={"window": 1000}),
    "window behind a cache": Case(
        b=2, t=9, s=50, options=CAUSAL | {"window": 12, "q_offset": np.array([3, 41], np.int32)}
    ),
    "window leaves the keys behind": Case(t=40, s=20, options={"window": 5}),
    "packed": Case(
        b=2, t=20, s=20,
        options=both(packed("00000111111111222---", "01234567890123456789")),
    ),
    "packed causal, grouped": Case(
        b=1, h=4, k=2, t=40, s=40,
        options=CAUSAL | both(packed("0" * 17 + "1" * 3 + "2" * 15 + "-" * 5)),
    ),
    "packed, in no order": Case(
        t=20, s=34,
        options=both(packed("92929292921111-----0"), packed("2" * 17 + "9-01" + "-" * 13)),
    ),
    "everything": Case(
        b=2, h=4, k=2, t=30, s=50,
        options=CAUSAL | {
            "window": 21, "q_offset": np.array([20, 5], np.int32), "kv_length": np.array([45, 33], np.int32),
        } | both(packed("3" * 11 + "5" * 19, "0" * 30), packed("3" * 30 + "5" * 20, "0" * 50)),
    ),
}  # fmt: skip


def inputs(case: Case, seed: int = 0) -> tuple[np.ndarray, ...]:
    """q, k, v, dout, dlse."""
    draw = np.random.default_rng(seed).standard_normal
    q, kv = (case.b, case.h, case.t, case.d), (case.b, case.k, case.s, case.d)
    return tuple(draw(shape).astype(np.float32) for shape in (q, kv, kv, q, q[:3]))


def arrays(options: dict) -> dict:
    return {name: jnp.asarray(x) if isinstance(x, np.ndarray) else x for name, x in options.items()}


def close(got: jax.Array, want: np.ndarray, dtype: str = "float32", relative: bool = False) -> None:
    atol = attention_tolerance(dtype, jax.default_backend())
    atol *= max(1.0, np.abs(want).max()) if relative else 1.0
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def check(case: Case, implementation: str, dtype: str = "float32", blocks: Blocks | None = SMALL) -> None:
    """Output, log-sum-exp where there is one, and all gradients of one case."""
    with_lse = implementation != "xla"
    *qkv, dout, dlse = (jnp.asarray(x, dtype) for x in inputs(case))
    dlse = dlse.astype(jnp.float32)
    want = attention_oracle(*qkv, dout=dout, dlse=dlse if with_lse else None, **case.options)

    @jax.jit
    def run(qkv, cotangent):
        door = lambda *qkv: attention(  # noqa: E731
            *qkv, **arrays(case.options), return_lse=with_lse, implementation=implementation, blocks=blocks
        )
        result, gradients = jax.vjp(door, *qkv)
        return result, gradients(cotangent)

    result, gradients = run(qkv, (dout, dlse) if with_lse else dout)
    out, lse = result if with_lse else (result, None)
    assert out.dtype == dtype
    close(out, want.out, dtype)
    if with_lse:
        assert lse.dtype == jnp.float32
        close(lse, want.lse, dtype)
    for gradient, exact in zip(gradients, (want.dq, want.dk, want.dv), strict=True):
        assert gradient.dtype == dtype
        close(gradient, exact, dtype, relative=True)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_float32(implementation, name):
    check(CASES[name], implementation)


@pytest.mark.parametrize("name", ["grouped queries", "64 wide", "128 wide", "everything"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_bfloat16(implementation, name):
    check(CASES[name], implementation, "bfloat16")
