"""This machine's peak rates, and the share of them that a benchmark reached.

A peak rate is the best of several programs that do nothing else, each called for a while on all cores, and the fastest
call counts: on a shared machine a short call finds a quiet moment sooner than a long one. Measured before a benchmark
and after it (`best`), it is a roof that nothing here exceeds: a share above 105% is an error of the accounting or of
the roof, and is raised as one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float32

from rag.bench.timing import Row
from rag.runtime.machine import cpu_flags
from rag.runtime.measurement import READ_RATE, WORKING_SET, Figure, Spread

GEMM_SIZES = (1024, 2048)
ACCELERATOR_SIZE = 8192  # too small a product does not fill an accelerator
READ_BYTES = (
    16 << 20,
    64 << 20,
    512 << 20,
)  # from beyond a core's own cache to beyond all of most processors'
SECONDS = 0.3  # that each program is called for, three times at least
MOST_PERCENT = 105.0  # what the scatter of the two measurements may add up to

_WIDTH = 1024
_OF_RATE = {  # a rate, in billions -> the roof over it, in the same unit
    "float32 GFLOP/s": "gemm_flops",
    "bfloat16 GFLOP/s": "bf16_flops",
    "int8 GOP/s": "int8_ops",
}


def measure_peaks() -> dict[str, float]:
    """The rates that no program here can beat: "gemm_flops" of float32 products, and bytes read a second.

    "read_bytes_per_s" is of memory, the largest of READ_BYTES, and "read_bytes_per_s of 16 MiB" of a set of that size
    read again and again, which a cache may hold. With "bf16_flops" and "int8_ops" where the device has instructions
    for such products.
    """
    import jax

    found = {"gemm_flops": gemm_peak()} | read_peaks()
    flags, accelerated = " ".join(cpu_flags()), jax.default_backend() != "cpu"
    if accelerated or "bf16" in flags:
        found["bf16_flops"] = gemm_peak("bfloat16")
    if accelerated or any(name in flags for name in ("vnni", "amx_int8", "i8mm", "dotprod")):
        found["int8_ops"] = gemm_peak("int8")
    return found


def best_peak(*measured: Mapping[str, float]) -> dict[str, float]:
    """Of each roof the highest that was found: roofs measured at several times are one."""
    names = dict.fromkeys(name for found in measured for name in found)
    return {name: max(found[name] for found in measured if name in found) for name in names}


def gemm_peak(dtype: str = "float32") -> float:
    """The best rate of a matrix product of `dtype` on the default device, in operations (FLOP) a second.

    bfloat16 accumulates in float32, int8 in int32. The second matrix stands by rows, as a checkpoint's weights do, or
    by columns; float32 at the highest precision and on accelerators at the default one, which is lower there; on CPU by
    NumPy's BLAS too.
    """
    import jax

    accelerated = jax.default_backend() != "cpu"
    sizes = (*GEMM_SIZES, ACCELERATOR_SIZE) if accelerated else GEMM_SIZES
    return max(2 * n**3 / _fastest(call) for n in sizes for call in _products(n, dtype))


def _products(size: int, dtype: str) -> Iterator[Callable[[], object]]:
    import jax
    import jax.numpy as jnp
    from jax import lax

    square = jnp.ones((size, size), dtype)
    wide, on_cpu = jnp.int32 if dtype == "int8" else jnp.float32, jax.default_backend() == "cpu"
    precisions = [lax.Precision.HIGHEST] if dtype == "float32" else [None]
    if dtype == "float32" and not on_cpu:
        precisions += [None]  # a lower one there
    for columns in (1, 0):
        for precision in precisions:
            options = {"precision": precision, "preferred_element_type": wide}
            product = partial(lax.dot_general, dimension_numbers=(((1,), (columns,)), ((), ())), **options)
            yield partial(jax.jit(product), square, square)
    if dtype == "float32" and on_cpu:
        yield partial(np.matmul, *np.ones((2, size, size), np.float32))


def read_peaks() -> dict[str, float]:
    """The best rates of reading on the default device, in bytes a second, by the names that `roofs` gives them."""
    rates = {size: size / min(map(_fastest, _readings(size))) for size in READ_BYTES}
    named = {_read_name(size): rate for size, rate in rates.items()}
    return {"read_bytes_per_s": rates[max(rates)]} | named


def _readings(size: int) -> Iterator[Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    def product(matrix: jax.Array) -> jax.Array:
        vector = jnp.ones(_WIDTH, jnp.float32)
        return jnp.einsum("ne,e->n", matrix, vector, precision="highest")

    matrix = jax.device_put(_ones(size), may_alias=True)
    for program in (product, lambda matrix: matrix.max(axis=1), lambda matrix: matrix.sum(axis=1)):
        yield partial(jax.jit(program), matrix)


def _ones(size: int) -> Float32[np.ndarray, "R W"]:
    """`size` bytes that a device can share: NumPy asks for large pages where the system has them."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    ones = memory[start : start + size].view(np.float32).reshape(-1, _WIDTH)
    ones[...] = 1
    return ones


def _fastest(call: Callable[[], object]) -> float:
    """The seconds of the fastest call, after one that does not count."""
    import jax

    jax.block_until_ready(call())
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < SECONDS:
        begin = time.perf_counter()
        jax.block_until_ready(call())
        seconds.append(time.perf_counter() - begin)
    return min(seconds)


def _read_name(size: int) -> str:
    return f"read_bytes_per_s of {size / (1 << 20):g} MiB"


def with_shares(rows: Sequence[Row], roofs: Mapping[str, float]) -> list[Row]:
    """The rows with the share of its roof, in percent, beside each rate that has one.

    A rate of reading is compared with that of reading the largest measured set that is no larger than its own
    (WORKING_SET, beside it), and with none where every measured set is larger: a core's own cache has no roof here.
    Raises RuntimeError for a share above MOST_PERCENT, which names row, figure, rate and roof.
    """
    return [
        replace(
            row,
            ours=_shared(row.case, row.ours, roofs),
            peers={
                peer: _shared(f"{row.case}, {peer}", figures, roofs)
                for peer, figures in row.peers.items()
            },
        )
        for row in rows
    ]


def _shared(case: str, figures: Mapping[str, Figure], roofs: Mapping[str, float]) -> dict[str, Figure]:
    out: dict[str, Figure] = {}
    for name, value in figures.items():
        out[name] = value
        reads = name == READ_RATE
        roof_name = (
            _read_peak(_median(figures[WORKING_SET]), roofs) if reads else _OF_RATE.get(name, "")
        )
        if (roof := roofs.get(roof_name)) is None:
            continue
        share = 100 * _median(value) * 1e9 / roof
        if share > MOST_PERCENT:
            raise RuntimeError(
                f"{case}: {_median(value):.4g} {name} are {share:.0f}% of {roof_name}, {roof / 1e9:.4g} billion a "
                "second: what is counted is not what was done, or the roof was measured too low."
            )
        out[f"{name}, % of roof"] = share
    return out


def _read_peak(megabytes: float, roofs: Mapping[str, float]) -> str:
    """The name of the roof over reading a set of that size again and again; "" for none."""
    smaller = [size for size in READ_BYTES if size <= megabytes * 1e6 and _read_name(size) in roofs]
    return _read_name(max(smaller)) if smaller else ""


def _median(value: Figure) -> float:
    return value.median if isinstance(value, Spread) else float(value)
