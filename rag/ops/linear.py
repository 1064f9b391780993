"""Multiply by a weight as checkpoints store it, one row an output, in float or in int8.

An int8 weight has one scale a row, symmetric: weight[o] = scale[o] * values[o]. Which product is the fastest depends on
the processor and on the rows of x, all of which XLA:CPU computes by different kernels (LOG.md):

    rows        with int8 dot products (VNNI, AMX)      without
    1           digits                                  the weight converted inside the dot
    2 to 128    digits                                  digits
    more        bfloat16, where the processor has it    float32

With AMX and a compiler, rag.native multiplies two rows or more by digits, and several times as fast. Accelerators
multiply in x's own dtype.

"Digits": x is written in two signed 8-bit digits to base 254, scaled by the row's largest entry, and each is
multiplied exactly, int8 x int8 -> int32. That is as exact as 15 bits, where one digit would lose what one large
entry of a row leaves of the others; and a row's result does not depend on the other rows.

Letters: R rows of x, M input width, O outputs.
"""

from functools import cache, partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, DTypeLike, Float, Float32, Int8, Num

from rag import native
from rag.runtime.machine.hardware import cpu_flags

_FEW = 128  # rows up to which digits are faster than converting the weight
_STACKED = 32  # rows up to which both digits go in one product: XLA's int8 kernels are slow for a single row
_BY_ROWS = (((1,), (1,)), ((), ()))  # contract R M with O M


def linear(
    x: Float[Array, "*batch M"],
    weight: Num[Array, "O M"],
    bias: Float[Array, "O"] | None = None,
    scale: Float32[Array, "O"] | None = None,
    *,
    by_native: bool = False,
) -> Float[Array, "*batch O"]:
    """Return `x @ weight.T * scale + bias` in x's dtype, accumulated in float32 or exactly.

    Args:
        x: the inputs.
        weight: its [O, M] layout is read row by row, for which XLA:CPU's one-row kernels are fast too.
        bias: added if given.
        scale: given with an int8 weight.
        by_native: multiply an int8 weight by rag.native, which must be available, where the program runs on a CPU.
    """
    if scale is None:
        y = jnp.einsum("...m,om->...o", x, weight, preferred_element_type=jnp.float32)
    else:
        rows = x.reshape(-1, x.shape[-1])
        kind = "native" if by_native else _cpu_product_type(len(rows))
        y = _int8_linear(rows, weight, scale, kind).reshape(*x.shape[:-1], -1)
    return (y if bias is None else y + bias).astype(x.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def rounded_linear(
    x: Float[Array, "*batch M"], weight: Float[Array, "O M"], dtype: DTypeLike
) -> Float32[Array, "*batch O"]:
    """Return `x @ weight.T`, accumulated in float32, with x, the weight and the cotangents rounded to `dtype`.

    Without the rounded cotangents the products of the backward pass would have inputs of two types, which XLA:CPU
    computes in float32, half as fast as in bfloat16 or slower.
    """
    return jnp.einsum(
        "...m,om->...o", x.astype(dtype), weight.astype(dtype), preferred_element_type=jnp.float32
    )


def _rounded_linear_forward(x: Array, weight: Array, dtype: DTypeLike) -> tuple[Array, tuple[Array, Array]]:
    return rounded_linear(x, weight, dtype), (x.astype(dtype), weight)


def _rounded_linear_backward(
    dtype: DTypeLike, saved: tuple[Array, Array], dy: Float32[Array, "*batch O"]
) -> tuple[Array, Array]:
    x, weight = saved
    dy, rounded = dy.astype(dtype), weight.astype(dtype)
    dx = jnp.einsum("...o,om->...m", dy, rounded, preferred_element_type=jnp.float32)
    dweight = jnp.einsum("...o,...m->om", dy, x, preferred_element_type=jnp.float32)
    return dx, dweight.astype(weight.dtype)


rounded_linear.defvjp(_rounded_linear_forward, _rounded_linear_backward)


@jax.custom_vjp
def low_rank_linear(
    x: Float32[Array, "R M"], a: Float32[Array, "rank M"], b: Float32[Array, "rank O"]
) -> Float32[Array, "R O"]:
    """Return `x @ a.T @ b`: a linear map of low rank, as LoRA adds it to a weight.

    The gradients are written out because automatic differentiation makes products of them that XLA:CPU computes up
    to nine times as slowly: [M, R] @ [R, rank] where [rank, R] @ [R, M] is the same.
    """
    return (x @ a.T) @ b


def _low_rank_forward(x: Array, a: Array, b: Array) -> tuple[Array, tuple[Array, ...]]:
    low = x @ a.T
    return low @ b, (x, low, a, b)


def _low_rank_backward(saved: tuple[Array, ...], dy: Float32[Array, "R O"]) -> tuple[Array, Array, Array]:
    x, low, a, b = saved
    dlow = dy @ b.T
    return dlow @ a, dlow.T @ x, low.T @ dy


low_rank_linear.defvjp(_low_rank_forward, _low_rank_backward)


def quantize(weight: Float[Array, "O M"]) -> tuple[Int8[Array, "O M"], Float32[Array, "O"]]:
    """Return (values, scale): per-row symmetric int8, within scale[o] / 2 of the weight; a row of zeros has scale 0."""
    weight = weight.astype(jnp.float32)
    scale = jnp.abs(weight).max(axis=1) / 127
    values = jnp.round(weight / jnp.where(scale > 0, scale, 1.0)[:, None])
    return values.astype(jnp.int8), scale


def product_type(rows: int, width: int, *, by_native: bool = False, x_dtype: str = "float32") -> str:
    """Return the type in which `linear` multiplies by an int8 weight on this machine; "int8" is by two digits.

    Args:
        rows: R.
        width: M.
        by_native: as for `linear`.
        x_dtype: the dtype of the inputs.
    """
    if by_native:
        return "int8" if native.int8_digits(rows, width) else "float32"
    return _cpu_product_type(rows) if jax.default_backend() == "cpu" else x_dtype


def _cpu_product_type(rows: int) -> str:
    if rows == 1 and not _multiplies("vnni", "amx_int8"):
        return "float32"
    if rows <= _FEW:
        return "int8"
    return "bfloat16" if _multiplies("bf16") else "float32"  # both hold int8 exactly


@partial(jax.jit, static_argnames="on_cpu")
def _int8_linear(
    x: Float[Array, "R M"], values: Int8[Array, "O M"], scale: Float32[Array, "O"], on_cpu: str
) -> Float32[Array, "R O"]:
    """Multiply on a CPU as `on_cpu` says: "native" or a product type; elsewhere in x's dtype."""
    cpu = native.linear if on_cpu == "native" else partial(_product, kind=on_cpu)
    elsewhere = partial(_product, kind=x.dtype.name)
    with jax.named_scope("int8"):
        return lax.platform_dependent(x, values, scale, cpu=cpu, default=elsewhere)


def _product(
    x: Float[Array, "R M"], values: Int8[Array, "O M"], scale: Float32[Array, "O"], kind: str
) -> Float32[Array, "R O"]:
    if kind == "int8":
        y = by_digits(x.astype(jnp.float32), values)
    elif len(x) == 1 and kind == "float32":
        y = x.astype(jnp.float32) @ values.astype(jnp.float32).T  # XLA converts the weight inside the dot
    else:
        y = _dot(x.astype(kind), values.astype(kind), jnp.float32)
    return y * scale


def by_digits(x: Float32[Array, "R M"], values: Int8[Array, "O M"]) -> Float32[Array, "R O"]:
    """Return `x @ values.T` with x in two digits; for few rows.

    Each entry of x is rounded by at most 1 / (127 * 254 * 2) of its row's largest entry.
    """
    step = jnp.maximum(jnp.abs(x).max(axis=1, keepdims=True) / 127, jnp.finfo(jnp.float32).tiny)
    first = jnp.round(x / step)
    second = jnp.round((x / step - first) * 254)
    if len(x) <= _STACKED:
        digits = jnp.concatenate([first, second]).astype(jnp.int8)
        first, second = jnp.split(_dot(digits, values, jnp.int32), 2)
    else:
        first, second = (_dot(digit.astype(jnp.int8), values, jnp.int32) for digit in (first, second))
    return (first.astype(jnp.float32) + second.astype(jnp.float32) / 254) * step


def _dot(x: Num[Array, "R M"], weight: Num[Array, "O M"], accumulator: DTypeLike) -> Num[Array, "R O"]:
    return lax.dot_general(x, weight, _BY_ROWS, preferred_element_type=accumulator)


@cache
def _multiplies(*names: str) -> bool:
    """Return whether this processor has an instruction set with one of these in its name."""
    return any(name in flag for flag in cpu_flags() for name in names)
