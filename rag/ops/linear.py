"""Matmul against a weight kept as checkpoints store it, one row an output, in float or in int8.

An int8 weight has one scale a row, symmetric: weight[n] = scale[n] * values[n]. What is the fastest way to multiply
by it depends on the processor and on the rows of x, all of which XLA:CPU serves by different kernels (LOG.md):

    rows        with int8 dot products (VNNI, AMX)      without
    1           digits                                  the weight converted inside the dot
    2 to 128    digits                                  digits
    more        bfloat16, where the processor has it    float32

With AMX and a compiler, rag.native multiplies two rows or more by digits, and several times as fast.

"Digits": x is written in two signed 8-bit digits to base 254, scaled by the row's largest entry, and each is
multiplied exactly, int8 x int8 -> int32. That is as exact as 15 bits, where one digit would lose what one large
entry of a row leaves of the others; and a row's result does not depend on its neighbours.

Letters: R rows of x, M input width, N outputs.
"""

from functools import cache

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Float32, Int8, Num

from rag import native
from rag.runtime.machine import cpu_flags

_FEW = 128  # rows up to which digits win over converting the weight
_STACKED = 32  # rows up to which both digits go in one product: a lone row falls off the int8 kernels

_BY_ROWS = (((1,), (1,)), ((), ()))  # contract R M with N M


def linear(
    x: Float[Array, "*batch M"],
    weight: Num[Array, "N M"],
    bias: Float[Array, "N"] | None = None,
    scale: Float32[Array, "N"] | None = None,
    *,
    by_native: bool = False,
) -> Float[Array, "*batch N"]:
    """`x @ weight.T * scale + bias`, accumulated in float32 or exactly, in x's dtype.

    With a `scale` the weight is int8; `by_native` multiplies by rag.native, which must be available. The [N, M]
    layout is read row by row, which is also what XLA:CPU's one-row kernels are fast at.
    """
    if scale is None:
        y = jnp.einsum("...m,nm->...n", x, weight, preferred_element_type=jnp.float32)
    else:
        rows = x.reshape(-1, x.shape[-1])
        product = native.linear if by_native else _int8
        y = product(rows, weight, scale).reshape(*x.shape[:-1], -1)
    return (y if bias is None else y + bias).astype(x.dtype)


def quantize(weight: Float[Array, "N M"]) -> tuple[Int8[Array, "N M"], Float32[Array, "N"]]:
    """(values, scale): per-row symmetric int8, within scale[n] / 2 of the weight; a row of zeros has scale 0."""
    weight = weight.astype(jnp.float32)
    scale = jnp.abs(weight).max(axis=1) / 127
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1.0)[:, None])
    return values.astype(jnp.int8), scale


def product_type(rows: int, width: int, *, by_native: bool = False, x_dtype: str = "float32") -> str:
    """The type in which `linear` multiplies rows of `width` inputs by an int8 weight; "int8" is by two digits."""
    if by_native:
        return "int8" if native.int8_digits(rows, width) else "float32"
    if jax.default_backend() != "cpu":
        return x_dtype
    if rows == 1 and not _multiplies("vnni", "amx_int8"):
        return "float32"
    if rows <= _FEW:
        return "int8"
    return "bfloat16" if _multiplies("bf16") else "float32"  # both hold int8 exactly


def _int8(
    x: Float[Array, "R M"], values: Int8[Array, "N M"], scale: Float32[Array, "N"]
) -> Float32[Array, "R N"]:
    with jax.named_scope("int8"):
        return _product(x, values) * scale


def _product(x: Float[Array, "R M"], values: Int8[Array, "N M"]) -> Float32[Array, "R N"]:
    kind = product_type(*x.shape, x_dtype=str(x.dtype))
    if kind == "int8":
        return by_digits(x.astype(jnp.float32), values)
    if len(x) == 1 and kind == "float32":
        return x.astype(jnp.float32) @ values.astype(jnp.float32).T  # XLA converts as it reads
    return _dot(x.astype(kind), values.astype(kind), jnp.float32)


def by_digits(x: Float32[Array, "R M"], values: Int8[Array, "N M"]) -> Float32[Array, "R N"]:
    """`x @ values.T` with x in two digits, each within 1 / (127 * 254 * 2) of its row's largest entry; for few rows."""
    step = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    first = jnp.round(x / step)
    second = jnp.round((x / step - first) * 254)
    if len(x) <= _STACKED:
        digits = jnp.concatenate([first, second]).astype(jnp.int8)
        first, second = jnp.split(_dot(digits, values, jnp.int32), 2)
    else:
        first, second = (_dot(digit.astype(jnp.int8), values, jnp.int32) for digit in (first, second))
    return (first.astype(jnp.float32) + second.astype(jnp.float32) / 254) * step


def _dot(x: Num[Array, "R M"], weight: Num[Array, "N M"], accumulator: type) -> Num[Array, "R N"]:
    return lax.dot_general(x, weight, _BY_ROWS, preferred_element_type=accumulator)


@cache
def _multiplies(*names: str) -> bool:
    """Whether this processor has an instruction set with one of these in its name."""
    return any(name in flag for flag in cpu_flags() for name in names)
