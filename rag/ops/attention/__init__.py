"""Attention: one public function, `attention`, over the implementations of one table, IMPLEMENTATIONS.

Encoders and decoders, prefill and decode all call it. A new implementation is a file and a row of the table.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim.
The layout is head-major, as in the KV cache: the keys of a head are contiguous.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag.ops.attention import flash, native, reference, xla
from rag.ops.attention.mask import MaskArguments, Segments
from rag.ops.attention.options import AttentionOptions, BlockSizes
from rag.ops.attention.tiles import DECODE_TOKENS, runs_unrolled

Attend = Callable[[Array, Array, Array, MaskArguments, AttentionOptions], tuple[Array, Array | None]]


def _supports_all(q: Array, k: Array, v: Array, return_lse: bool) -> None:
    return None


class Implementation(NamedTuple):
    """One way to compute attention.

    Attributes:
        attend: takes q [B, H, T, D], k and v [B, K, S, D], the MaskArguments and the AttentionOptions; returns the
            output and the log-sum-exp [B, H, T], or None if it does not compute that.
        unsupported: takes q, k, v and whether the log-sum-exp is wanted; returns the sentence that says why the
            implementation does not support them, or None if it does.
        linear_memory: whether no T x S matrix is stored.
    """

    attend: Attend
    unsupported: Callable[[Array, Array, Array, bool], str | None] = _supports_all
    linear_memory: bool = False


IMPLEMENTATIONS = {
    "reference": Implementation(reference.attend),
    "flash": Implementation(flash.attend, linear_memory=True),
    "native": Implementation(native.attend, native.unsupported, linear_memory=True),
    "xla": Implementation(xla.attend, xla.unsupported),
}

# Keys up to which the whole matrix of scores is the fastest in XLA on a CPU, measured with XLA 0.10.
_SHORT = 256
_MAX_SCORES_NBYTES = 1 << 30  # larger matrices of scores are never stored


def attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    *,
    causal: bool = False,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
    q_positions: Int[Array, "B T"] | None = None,
    kv_length: Int[Array, "B"] | None = None,
    q_segments: Int[Array, "B T"] | None = None,
    kv_segments: Int[Array, "B S"] | None = None,
    q_prefixes: Int[Array, "B T"] | None = None,
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    blocks: BlockSizes | None = None,
) -> Float[Array, "B H T D"] | tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Return softmax attention, with the softmax and all sums in float32.

    Query heads share kv heads in groups of H/K, in order. A fully masked row gives zeros. Everything but arrays is
    static under jit.

    Args:
        q, k, v: the key in slot s is at position s.
        causal: hide the keys after the query.
        q_offset: query i of row b is at position q_offset[b] + i.
        q_positions: the positions of the queries, in any order, instead of q_offset.
        kv_length: hide the keys at or past it: right padding, or the unwritten part of a cache.
        q_segments: ids of packed sequences: a query sees only the keys of its own id; a negative id is padding
            that sees nothing. Both of q_segments and kv_segments are given, or neither.
        kv_segments: the ids of the keys.
        q_prefixes: ids of segments that the queries see besides their own: sequences packed behind a beginning
            that they share. A negative id is none.
        window: hide all keys that are `window` or more positions away.
        scale: factor of the scores; None is 1/sqrt(D).
        return_lse: also return the log-sum-exp.
        implementation: None takes the best one for the platform that the program is lowered for, and for the
            shapes. A name takes that one:
            "reference": the T x S matrix in float32, as the formula reads;
            "flash": blockwise in linear memory (flash.py);
            "native": flash in C++ (rag.native), for float32 on a CPU;
            "xla": jax.nn.dot_product_attention, without log-sum-exp.
        blocks: the block sizes of "flash"; None chooses.

    Returns:
        The output in q's dtype; with `return_lse` also the float32 log-sum-exp of each row's scaled scores, -inf
        where nothing is visible.

    Raises:
        NotImplementedError: the named implementation does not support the arrays or options.
        ValueError: the name is unknown, or shapes and options contradict one another.
    """
    _check(q, k, v, window, implementation)
    offset_given = not (isinstance(q_offset, int) and q_offset == 0)
    if q_positions is not None and offset_given:
        raise ValueError("Give q_offset or q_positions, not both.")
    from_start = q_positions is None and not offset_given
    if q_positions is None:
        q_positions = jnp.asarray(q_offset).reshape(-1, 1) + jnp.arange(q.shape[2])
    mask_arguments = MaskArguments(
        q_positions,
        jnp.full((1,), k.shape[2]) if kv_length is None else jnp.minimum(kv_length, k.shape[2]),
        _segments(q_segments, kv_segments, q_prefixes),
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    options = AttentionOptions(causal, window, scale, from_start, blocks)
    if implementation is None:
        on_cpu, elsewhere = _best_on_cpu(q, k, v, options), _best_elsewhere(q, k, return_lse)
        out, lse = _by_platform(q, k, v, mask_arguments, options, on_cpu, elsewhere, return_lse)
    else:
        named = IMPLEMENTATIONS[implementation]
        if reason := named.unsupported(q, k, v, return_lse):
            raise NotImplementedError(reason)
        out, lse = named.attend(q, k, v, mask_arguments, options)
    return (out, lse) if return_lse else out


def _check(q: Array, k: Array, v: Array, window: int | None, implementation: str | None) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"Unknown attention implementation {implementation!r}: choose from {names}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} kv heads evenly.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape != v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [B,H,T,D], [B,K,S,D], [B,K,S,D].")
    if window is not None and window < 1:
        raise ValueError(f"A window of {window} hides every key: give at least 1, or None for no window.")


def _segments(
    q_segments: Array | None, kv_segments: Array | None, q_prefixes: Array | None
) -> Segments | None:
    if q_segments is None and kv_segments is None and q_prefixes is None:
        return None
    if q_segments is None or kv_segments is None:
        raise ValueError("Give both q_segments and kv_segments, or neither; with q_prefixes both.")
    prefixes = q_segments if q_prefixes is None else jnp.where(q_prefixes < 0, q_segments, q_prefixes)
    return Segments(q_segments, kv_segments, prefixes)


@partial(jax.jit, static_argnames=("options", "on_cpu", "elsewhere", "return_lse"))
def _by_platform(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
    on_cpu: Attend,
    elsewhere: Attend,
    return_lse: bool,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"] | None]:
    """Compute by one of two implementations, chosen when the platform is known: at lowering."""

    def run(
        attend: Attend, q: Array, k: Array, v: Array, mask_arguments: MaskArguments
    ) -> tuple[Array, Array | None]:
        out, lse = attend(q, k, v, mask_arguments, options)
        return out, lse if return_lse else None

    branches = partial(run, on_cpu), partial(run, elsewhere)
    return lax.platform_dependent(q, k, v, mask_arguments, cpu=branches[0], default=branches[1])


def _best_on_cpu(q: Array, k: Array, v: Array, options: AttentionOptions) -> Attend:
    tokens, keys = q.shape[2], k.shape[2]
    # A few tokens follow a cache, which XLA would copy for a native call.
    if tokens > DECODE_TOKENS and not native.unsupported(q, k, v, return_lse=True):
        return native.attend
    if keys <= _SHORT and not runs_unrolled(options, tokens):
        return reference.attend
    return _attend_to_cache if tokens <= DECODE_TOKENS else flash.attend


def _best_elsewhere(q: Array, k: Array, return_lse: bool) -> Attend:
    """Return the whole matrix while it fits: on accelerators few large kernels are faster than many small steps."""
    scores_nbytes = 4 * q.shape[0] * q.shape[1] * q.shape[2] * k.shape[2]
    if scores_nbytes > _MAX_SCORES_NBYTES:
        return flash.attend
    return reference.attend if return_lse else xla.attend


@partial(jax.jit, static_argnames="options")
def _attend_to_cache(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    mask_arguments: MaskArguments,
    options: AttentionOptions,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Attend with few queries to a cache: to all of it if it is nearly full, else only to the blocks in use.

    Slicing blocks out of K and V is a copy on XLA:CPU, which costs more than to read the unused rest.
    """
    used = mask_arguments.kv_length.max()
    if options.causal:
        used = jnp.minimum(used, mask_arguments.q_positions.max() + 1)
    dense, blocked = partial(reference.attend, options=options), partial(flash.attend, options=options)
    return lax.cond(4 * used > 3 * k.shape[2], dense, blocked, q, k, v, mask_arguments)
