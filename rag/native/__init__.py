"""Calls of optional C++ kernels (cpp/): attention in float32, products by int8 weights, and a decoder of these weights.

Without them, or with RAG_NATIVE=0 in the environment, XLA computes the same. They save the transfer of attention
scores to memory and back; the forty small steps of a decoder layer, between which XLA's threads go to sleep; the
compilation or loading of the programs that contain these steps; and with AMX most of the time of the products.

Every call runs on the CPU only: lowering it for another platform fails. Ask `available` first.

Letters: B batch, T query tokens, S key tokens or cache slots, H query heads, K kv heads, D head dim (half: D/2),
M width, R rows of a product, O its outputs.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache as once
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Float16, Float32, Int, Int8, Int32

from rag.native import build
from rag.runtime.machine.hardware import cores

FEW = 8  # tokens whose prefill is faster than XLA's even without AMX
MOST_DIM = 256  # of a head
CACHE_DTYPE = np.float16  # of keys and values
_MOST_TOKENS = 256  # of one call: more are no faster, and take memory

SegmentIds = tuple[Int[Array, "B T"], Int[Array, "B S"], Int[Array, "B T"]]
Weight = tuple[Int8[Array, "_ _"], Float32[Array, "_"]]  # [O, M] values, [O] scale: rag.ops.linear.quantize


def available() -> bool:
    """Return whether the kernels can be called: on an x86 CPU with AVX2, with a C++ compiler, without RAG_NATIVE=0."""
    return build.load() is not None


@once
def has_tiles(width: int = 64) -> bool:
    """Return whether products over so many inputs use the tiles of AMX, with which `linear` is faster than XLA.

    AMX is the matrix unit of some Intel processors; its strength are products of many rows.
    """
    library = build.load()
    return library is not None and width % 64 == 0 and library.RagHasTiles()


def supports_prefill(tokens: int) -> bool:
    """Return whether `decoder` processes so many tokens, B * T, faster than XLA. Ask `available` first."""
    return has_tiles() or tokens <= FEW


def int8_digits(rows: int, width: int) -> bool:
    """Return whether `linear` multiplies by two int8 products of digits (rag.ops.linear), and not in float32."""
    return rows > 1 and has_tiles(width)


@dataclass(frozen=True, slots=True)
class DecoderLayer:
    """The weights of a layer: RMSNorm's before attention and before the MLP; q, k, v, o, gate, up and down."""

    norms: tuple[Float32[Array, "M"], Float32[Array, "M"]]
    projections: Sequence[Weight]

    @property
    def arrays(self) -> list[Array]:
        q_to_o, mlp = self.projections[:4], self.projections[4:]
        return [self.norms[0], *chain(*q_to_o), self.norms[1], *chain(*mlp)]


def decoder(
    x: Float32[Array, "B T M"],
    positions: Int32[Array, "B T"],
    rotations: Float32[Array, "2 B T half"],
    layers: Sequence[DecoderLayer],
    keys: Sequence[Float16[Array, "B K S D"]],
    values: Sequence[Float16[Array, "B K S D"]],
    eps: float,
) -> tuple[Float32[Array, "B T M"], tuple[Array, ...], tuple[Array, ...]]:
    """Run tokens through decoder layers.

    A token sees the slots up to its position, those of later tokens of its row included if they are there. So
    positions must ascend, unless there are no more than 256 tokens.

    Args:
        x: the residual stream before the first layer.
        positions: of the tokens; the slots to write to.
        rotations: cosine and sine for the tokens (rag.ops.rope).
        layers: the weights.
        keys, values: the cache, one array a layer; written in place where it was donated.
        eps: of RMSNorm.

    Returns:
        The residual stream after the last layer, and keys and values with these tokens' written to their slots.

    Raises:
        JaxRuntimeError: a position is outside of [0, S).
    """
    step, outputs = max(1, _MOST_TOKENS // len(x)), []
    caches = [array for pair in zip(keys, values, strict=True) for array in pair]
    for start in range(0, x.shape[1], step):
        some = slice(start, start + step)
        y, caches = _decoder(x[:, some], positions[:, some], rotations[:, :, some], layers, caches, eps)
        outputs.append(y)
    return jnp.concatenate(outputs, axis=1), tuple(caches[::2]), tuple(caches[1::2])


def _decoder(
    x: Array,
    positions: Array,
    rotations: Array,
    layers: Sequence[DecoderLayer],
    caches: list[Array],
    eps: float,
) -> tuple[Array, list[Array]]:
    results = [jax.ShapeDtypeStruct(array.shape, array.dtype) for array in (x, *caches)]
    arguments = [x, positions, *rotations]
    aliases: dict[int, int] = {}  # of arguments to results
    for i, layer in enumerate(layers):
        arguments += [*layer.arrays, *caches[2 * i : 2 * i + 2]]
        aliases |= {len(arguments) - 2: 2 * i + 1, len(arguments) - 1: 2 * i + 2}
    call = jax.ffi.ffi_call("rag_decoder", results, input_output_aliases=aliases)
    y, *written = _on_cpu(call, *arguments, eps=np.float32(eps))
    return y, written


def attention(
    q: Float32[Array, "B H T D"],
    k: Float32[Array, "B K S D"],
    v: Float32[Array, "B K S D"],
    first: Int[Array, "B T"],
    past: Int[Array, "B T"],
    segments: SegmentIds | None,
    scale: float,
) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]]:
    """Return softmax attention of each query to the keys [first, past), and the log-sum-exp of its scaled scores.

    Blockwise with online softmax: beside the results its memory does not grow with T or S.

    Args:
        q, k, v: D is at most MOST_DIM.
        first, past: the range of keys of each query.
        segments: the ids of queries, keys, and the prefixes of queries: a query sees only keys of its own id and
            of its prefix, and with a negative id none.
        scale: factor of the scores.

    Returns:
        Zeros and -inf for a query that sees nothing.
    """
    results = (jax.ShapeDtypeStruct(q.shape, q.dtype), jax.ShapeDtypeStruct(q.shape[:3], q.dtype))
    call = jax.ffi.ffi_call("rag_attention", results, vmap_method="sequential")
    return _on_cpu(call, q, k, v, *_mask_arrays(first, past, segments), scale=np.float32(scale))


def attention_backward(
    q: Float32[Array, "B H T D"],
    k: Float32[Array, "B K S D"],
    v: Float32[Array, "B K S D"],
    first: Int[Array, "B T"],
    past: Int[Array, "B T"],
    segments: SegmentIds | None,
    scale: float,
    results: tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]],
    cotangents: tuple[Float32[Array, "B H T D"], Float32[Array, "B H T"]],
) -> tuple[Float32[Array, "B H T D"], Float32[Array, "B K S D"], Float32[Array, "B K S D"]]:
    """Return the gradients of q, k and v, the same bits in every run and for any number of threads.

    Args:
        q, k, v, first, past, segments, scale: the arguments of `attention`.
        results: what it returned.
        cotangents: of these results.
    """
    gradients = [jax.ShapeDtypeStruct(x.shape, x.dtype) for x in (q, k, v)]
    call = jax.ffi.ffi_call("rag_attention_backward", gradients, vmap_method="sequential")
    masks = _mask_arrays(first, past, segments)
    return tuple(_on_cpu(call, q, k, v, *masks, *results, *cotangents, scale=np.float32(scale)))


def _mask_arrays(first: Array, past: Array, segments: SegmentIds | None) -> list[Int32[Array, "B _"]]:
    arrays = [first, past, *(segments or [jnp.zeros((0, 0))] * 3)]
    return [array.astype(jnp.int32) for array in arrays]


def linear(
    x: Float[Array, "R M"], values: Int8[Array, "O M"], scale: Float32[Array, "O"]
) -> Float32[Array, "R O"]:
    """Return `x @ (values * scale[:, None]).T`; a row's result does not depend on the other rows.

    With AMX two rows or more are multiplied by digits (rag.ops.linear) where its tiles divide the weight, else in
    float32 by the weight.
    """
    result = jax.ShapeDtypeStruct((len(x), len(values)), jnp.float32)
    return _on_cpu(jax.ffi.ffi_call("rag_linear", result), x.astype(jnp.float32), values, scale)


def _on_cpu(call: Callable[..., Any], *arguments: Array, **attributes: Any) -> Any:
    """Call C++ where the program is lowered for a CPU; for another platform lowering raises NotImplementedError."""

    def run(*arrays: Array) -> Any:
        return call(*arrays, threads=np.int64(cores()), **attributes)

    return lax.platform_dependent(*arguments, cpu=run)
