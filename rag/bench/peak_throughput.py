"""Measure this machine's peak throughput, and the share of it that a benchmark reached.

A peak is the rate of the fastest of several programs that do nothing else, each called repeatedly on all cores. The
fastest call counts: on a shared machine a short call finds a quiet moment sooner than a long one. Peaks are measured
before a benchmark and after it (`best_peak`), and no program here should exceed them: a share above 105% is an error of
the operation count or of the peak, and is raised as one.
"""

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
from jaxtyping import Float32

from rag.bench.record import PERCENT_OF_PEAK
from rag.bench.timing import Row
from rag.runtime.machine.hardware import cpu_flags
from rag.runtime.machine.measurement import READ_RATE, WORKING_SET, Figure, Spread

GEMM_SIZES = (1024, 2048)
ACCELERATOR_SIZE = 8192  # too small a product does not fill an accelerator
# From larger than one core's cache to larger than all caches of most processors.
READ_BYTES = (16 << 20, 64 << 20, 512 << 20)
SECONDS = 0.3  # for which each program is called, but at least three times
MOST_PERCENT = 105.0  # allows for the scatter of the two measurements

_WIDTH = 1024
_PEAK_OF_RATE = {  # the name of a rate, in billions a second -> the name of its peak
    "float32 GFLOP/s": "gemm_flops",
    "bfloat16 GFLOP/s": "bf16_flops",
    "int8 GOP/s": "int8_ops",
}


def measure_peaks() -> dict[str, float]:
    """Measure the peaks of this machine.

    Returns:
        Rates by name: "gemm_flops", operations a second of float32 matrix products; "bf16_flops" and "int8_ops" where
        the device has instructions for such products; "read_bytes_per_s", bytes a second read from memory, at the
        largest of READ_BYTES; and "read_bytes_per_s of 16 MiB" (and other sizes) for reading an array of that size
        repeatedly, which a cache may hold.
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
    """Return the highest value of each peak over several measurements."""
    names = dict.fromkeys(name for found in measured for name in found)
    return {name: max(found[name] for found in measured if name in found) for name in names}


def gemm_peak(dtype: str = "float32") -> float:
    """Measure the best rate of a matrix product of `dtype` on the default device, in operations (FLOP) a second.

    bfloat16 accumulates in float32, int8 in int32. The second matrix is stored by rows, like a checkpoint's weights, or
    by columns. float32 is tried at the highest precision, on accelerators also at the default one, which is lower
    there, and on CPU also with NumPy's BLAS.
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
    precisions: list[lax.Precision | None] = [lax.Precision.HIGHEST] if dtype == "float32" else [None]
    if dtype == "float32" and not on_cpu:
        precisions.append(None)  # a lower precision there
    for columns in (1, 0):
        for precision in precisions:
            product = partial(
                lax.dot_general,
                dimension_numbers=(((1,), (columns,)), ((), ())),
                precision=precision,
                preferred_element_type=wide,
            )
            yield partial(jax.jit(product), square, square)
    if dtype == "float32" and on_cpu:
        yield partial(np.matmul, *np.ones((2, size, size), np.float32))


def read_peaks() -> dict[str, float]:
    """Measure the best rates of reading on the default device, in bytes a second, by their names in `measure_peaks`."""
    rates = {size: size / min(map(_fastest, _read_programs(size))) for size in READ_BYTES}
    named = {_read_name(size): rate for size, rate in rates.items()}
    return {"read_bytes_per_s": rates[max(rates)]} | named


def _read_programs(size: int) -> Iterator[Callable[[], object]]:
    import jax
    import jax.numpy as jnp

    def product(matrix: jax.Array) -> jax.Array:
        vector = jnp.ones(_WIDTH, jnp.float32)
        return jnp.einsum("ne,e->n", matrix, vector, precision="highest")

    matrix = jax.device_put(_ones(size), may_alias=True)
    for program in (product, lambda matrix: matrix.max(axis=1), lambda matrix: matrix.sum(axis=1)):
        yield partial(jax.jit(program), matrix)


def _ones(size: int) -> Float32[np.ndarray, "rows columns"]:
    """Return `size` bytes that a device can share; NumPy asks for large pages where the system has them."""
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    ones = memory[start : start + size].view(np.float32).reshape(-1, _WIDTH)
    ones[...] = 1
    return ones


def _fastest(call: Callable[[], object]) -> float:
    """Return the seconds of the fastest call, after one warm-up call."""
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


def with_shares(rows: Sequence[Row], peaks: Mapping[str, float]) -> list[Row]:
    """Return the rows with each rate's share of its peak, in percent, beside the rate.

    A read rate is compared with the peak of the largest measured array that is no larger than its own working set
    (WORKING_SET, beside it), and with none where every measured array is larger: for one core's cache no peak is
    measured. Raises RuntimeError for a share above MOST_PERCENT; its message has row, figure, rate and peak.
    """
    return [
        replace(
            row,
            ours=_shared(row.case, row.ours, peaks),
            peers={
                peer: _shared(f"{row.case}, {peer}", figures, peaks) for peer, figures in row.peers.items()
            },
        )
        for row in rows
    ]


def _shared(case: str, figures: Mapping[str, Figure], peaks: Mapping[str, float]) -> dict[str, Figure]:
    out: dict[str, Figure] = {}
    for name, value in figures.items():
        out[name] = value
        if name == READ_RATE:
            peak_name = _read_peak(_median(figures[WORKING_SET]), peaks)
        else:
            peak_name = _PEAK_OF_RATE.get(name, "")
        if (peak := peaks.get(peak_name)) is None:
            continue
        share = 100 * _median(value) * 1e9 / peak
        if share > MOST_PERCENT:
            raise RuntimeError(
                f"{case}: {_median(value):.4g} {name} are {share:.0f}% of {peak_name}, {peak / 1e9:.4g} billion a "
                "second: what is counted is not what was done, or the peak was measured too low."
            )
        out[name + PERCENT_OF_PEAK] = share
    return out


def _read_peak(megabytes: float, peaks: Mapping[str, float]) -> str:
    """Return the name of the peak for reading an array of that size repeatedly; "" where there is none."""
    smaller = [size for size in READ_BYTES if size <= megabytes * 1e6 and _read_name(size) in peaks]
    return _read_name(max(smaller)) if smaller else ""


def _median(value: Figure) -> float:
    return value.median if isinstance(value, Spread) else float(value)
