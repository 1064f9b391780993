"""A case of attention, and its check against the float64 oracle, forward and backward."""

from dataclasses import dataclass, field
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rag import native
from rag.ops.attention import IMPLEMENTATIONS, attention
from rag.ops.attention.options import BlockSizes
from tests.reference import attention_oracle, attention_tolerance

CAUSAL = {"causal": True}
needs_native = pytest.mark.skipif(not native.available(), reason="no C++ compiler, or no CPU backend")
SMALL = BlockSizes(8, 16)  # many blocks at the lengths of a fast test


def refusal(implementation: str | None, *qkv: jax.Array, return_lse: bool) -> str | None:
    """Return why the implementation does not support these arrays."""
    return implementation and IMPLEMENTATIONS[implementation].unsupported(*qkv, return_lse)


@dataclass(frozen=True)
class Case:
    """Shapes, and the options that go to attention and to the oracle alike."""

    b: int = 2
    h: int = 4
    k: int = 2
    t: int = 20
    s: int = 45
    d: int = 32
    options: dict = field(default_factory=dict)


def ints(*values: int) -> np.ndarray:
    return np.array(values, np.int32)


def packed(*rows: str) -> np.ndarray:
    """Return segment ids from text: a digit is an id, '-' is padding."""
    return np.array([[-1 if c == "-" else int(c) for c in row] for row in rows], np.int32)


def inputs(case: Case, dtype: str = "float32") -> list[jax.Array]:
    """Return q, k, v, and the cotangents of the output and of the log-sum-exp."""
    draw = np.random.default_rng(0).standard_normal
    q, kv = (case.b, case.h, case.t, case.d), (case.b, case.k, case.s, case.d)
    arrays = [jnp.asarray(draw(shape), dtype) for shape in (q, kv, kv, q, q[:3])]
    return [*arrays[:4], arrays[4].astype(jnp.float32)]


@partial(jax.jit, static_argnames=("causal", "window", "scale", "return_lse", "implementation", "blocks"))
def forward(q, k, v, **options):
    return attention(q, k, v, **options)


@partial(jax.jit, static_argnames=("causal", "window", "scale", "return_lse", "implementation", "blocks"))
def both_ways(q, k, v, cotangent, **options):
    result, backward = jax.vjp(partial(attention, **options), q, k, v)
    return result, backward(cotangent)


def close(got: jax.Array, want: np.ndarray, dtype: str = "float32", relative: bool = False) -> None:
    atol = attention_tolerance(dtype, jax.default_backend())
    atol *= max(1.0, np.abs(want[np.isfinite(want)]).max(initial=0)) if relative else 1.0
    np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=0, atol=atol)


def check(
    case: Case,
    implementation: str | None,
    dtype: str = "float32",
    gradients: bool = True,
    blocks: BlockSizes | None = SMALL,
) -> None:
    """Check output, log-sum-exp if there is one, and all gradients of one case; skip what is not supported."""
    *qkv, dout, dlse = inputs(case, dtype)
    with_lse = not refusal(implementation, *qkv, return_lse=True)
    if reason := refusal(implementation, *qkv, return_lse=False):
        pytest.skip(reason)
    want = attention_oracle(*qkv, dout=dout, dlse=dlse if with_lse else None, **case.options)
    options = {"q_offset": jnp.zeros(case.b, int)} if "q_positions" not in case.options else {}
    options |= {"kv_length": jnp.full(case.b, case.s)} | case.options
    options |= {"return_lse": with_lse, "implementation": implementation, "blocks": blocks}
    if gradients:
        result, found = both_ways(*qkv, (dout, dlse) if with_lse else dout, **options)
    else:
        result, found = forward(*qkv, **options), ()
    out, lse = result if with_lse else (result, None)
    assert out.dtype == dtype
    close(out, want.out, dtype, relative=dtype == "bfloat16")
    if with_lse:
        assert lse.dtype == jnp.float32
        close(lse, want.lse, dtype)
    for gradient, exact in zip(found, (want.dq, want.dk, want.dv), strict=gradients):
        assert gradient.dtype == dtype
        close(gradient, exact, dtype, relative=True)
