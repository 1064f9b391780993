"""The one door to attention: encoder and decoder, prefill and decode, all come through `attention`.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim, b is 1 or B.
Layout is head-major, which is the cache's: a head's keys lie together.
"""

import math
from dataclasses import replace
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from rag import native
from rag.ops.attention.flash import Blocks, Plan, flash_attention
from rag.ops.attention.mask import MaskArguments, MaskPattern, tile_mask

IMPLEMENTATIONS = ("reference", "flash", "native", "xla")

_MASKED = -1e30  # finite: no difference of two scores is NaN

# Measured on a CPU, XLA 0.10, without native code:
_SHORT = 256  # keys up to which the whole matrix of scores is the fastest
_SHORT_CAUSAL = 512  # queries up to which unrolled blocks of _PREFIX beat loops, where no cache stands before
_PREFIX = 64
_DECODE = 8  # queries up to which the time goes into reading K and V
_MANY_BYTES = 1 << 30  # scores beyond this are never kept whole

_flash = jax.jit(flash_attention, static_argnames="plan")


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
    window: int | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    implementation: str | None = None,
    blocks: Blocks | None = None,
) -> Float[Array, "B H T D"] | tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Softmax attention; query heads share kv heads in groups of H/K, in order.

    The key in slot s stands at position s, query i of row b at q_offset[b] + i or, where the tokens are
    scattered, at q_positions[b, i], in any order. `causal` hides the keys after the query, `window` all keys
    that are `window` or more positions away, `kv_length` the keys at or past it (right padding or the
    unwritten part of a cache). With segments, which come both or not at all, a query sees only the keys of
    its own id, and a negative id is padding that sees nothing. A row that sees nothing gives zeros.

    `scale` is 1/sqrt(D) unless given. Returns the output in q's dtype, and with `return_lse` also the
    float32 log-sum-exp of each row's scaled scores, -inf where nothing is visible. Softmax and sums are
    float32. Everything but arrays is static under jit.

    `implementation` None takes the best one for device and shape. A name takes that one:
      reference  the T x S matrix in float32, as the formula reads; in XLA also the fastest for short sequences
      flash      blockwise in linear memory (rag/ops/attention/flash.py); `blocks` are its tile sizes, None chooses
      native     flash with its forward pass in C++ (rag/native/__init__.py), backward in `blocks`: float32, on a CPU
      xla        jax.nn.dot_product_attention; it has no log-sum-exp
    Raises NotImplementedError where the named one cannot serve, ValueError on an unknown name or on shapes
    and options that contradict one another.
    """
    _check(q, k, v, q_segments, kv_segments, window, implementation)
    if q_positions is not None and not (isinstance(q_offset, int) and q_offset == 0):
        raise ValueError("Give q_offset or q_positions, not both.")
    aligned = q_positions is None and isinstance(q_offset, int) and q_offset == 0  # query i stands at i
    if q_positions is None:
        q_positions = jnp.asarray(q_offset).reshape(-1, 1) + jnp.arange(q.shape[2])
    pattern = MaskPattern(causal, window)
    extent = MaskArguments(
        q_positions,
        jnp.full((1,), k.shape[2]) if kv_length is None else jnp.minimum(kv_length, k.shape[2]),
        q_segments,
        kv_segments,
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    prefix = _PREFIX if causal and aligned and q.shape[2] <= _SHORT_CAUSAL else None
    plan = Plan(pattern, scale, blocks or _tiles(q, k), prefix)
    match implementation or _best(q, k, v, plan, return_lse):
        case "reference":
            out, lse = _reference(q, k, v, extent, plan=plan)
        case "flash":
            out, lse = _flash(q, k, v, extent, plan=plan)
        case "native":
            if not _runs_natively(q, k, v):
                raise NotImplementedError(
                    f"Native attention takes float32 up to {native.MOST_DIM} wide, where native.available()."
                )
            out, lse = _flash(q, k, v, extent, plan=replace(plan, native=True))
        case "by length":
            out, lse = _by_length(q, k, v, extent, plan=plan)
        case _:
            if return_lse:
                raise NotImplementedError("jax.nn.dot_product_attention returns no log-sum-exp.")
            return _xla(q, k, v, extent, plan=plan)
    return (out, lse) if return_lse else out


def _check(
    q: Array,
    k: Array,
    v: Array,
    q_segments: Array | None,
    kv_segments: Array | None,
    window: int | None,
    implementation: str | None,
) -> None:
    if implementation is not None and implementation not in IMPLEMENTATIONS:
        names = ", ".join(IMPLEMENTATIONS)
        raise ValueError(f"Unknown attention implementation {implementation!r}: choose from {names}.")
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} kv heads evenly.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape != v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [B,H,T,D], [B,K,S,D], [B,K,S,D].")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("Give both q_segments and kv_segments, or neither.")
    if window is not None and window < 1:
        raise ValueError(f"A window of {window} hides every key: give at least 1, or None for no window.")


def _runs_natively(*qkv: Array) -> bool:
    float32 = all(x.dtype == jnp.float32 for x in qkv)
    return float32 and qkv[0].shape[3] <= native.MOST_DIM and native.available()


def _best(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    plan: Plan,
    return_lse: bool,
) -> str:
    """The fastest on this device for these shapes that can do what is asked."""
    tokens, keys = q.shape[2], k.shape[2]
    # A few tokens stand behind a cache, which XLA would copy for a call.
    if tokens > _DECODE and _runs_natively(q, k, v):
        return "native"
    if jax.default_backend() == "cpu":
        if keys <= _SHORT and not plan.prefix:
            return "reference"
        return "by length" if tokens <= _DECODE else "flash"
    # Elsewhere the whole matrix is the fastest while it fits: few large kernels instead of many small steps.
    scores = 4 * q.shape[0] * q.shape[1] * tokens * keys  # bytes
    if scores > _MANY_BYTES:
        return "flash"
    return "reference" if return_lse else "xla"


def _tiles(q: Float[Array, "B H T D"], k: Float[Array, "B K S D"]) -> Blocks:
    """Tile sizes, measured on two CPU cores.

    Every kernel of XLA:CPU is shared out to the cores anew, which counts in a small tile, and scores that leave the
    cores' caches cost more than that. Of 2304 x 256, three kv heads at 768 rows, the scores are 2.3 MiB, and up to
    4,096 tokens it took a tenth less time than 768 x 256. Longer tiles waste more of the diagonal.
    """
    batch, heads, tokens, _ = q.shape
    pairs, groups = batch * k.shape[1], heads // k.shape[1]
    if tokens <= _DECODE:
        return Blocks(tokens, 128)
    most = max(_PREFIX, min(256, 1 << int(math.log2(1536 / groups))))
    # Blocks of about one size, so that the last one is not mostly padding.
    share = -(-tokens // -(-tokens // most))
    block_q = -(-share // _PREFIX) * _PREFIX
    rows = groups * min(block_q, tokens)
    together = max(n for n in range(1, pairs + 1) if pairs % n == 0 and (n == 1 or n * rows <= 2304))
    return Blocks(block_q, 256, together)


@partial(jax.jit, static_argnames="plan")
def _by_length(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: MaskArguments,
    *,
    plan: Plan,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """Few queries against a cache: all of it at once if it is nearly full, else only the blocks in use.

    Taking blocks out of K and V is a copy on XLA:CPU, dearer than reading the rest for nothing.
    """
    used = extent.kv_length.max()
    if plan.pattern.causal:
        used = jnp.minimum(used, extent.q_positions.max() + 1)
    dense, blocked = partial(_reference, plan=plan), partial(flash_attention, plan=plan)
    return lax.cond(4 * used > 3 * k.shape[2], dense, blocked, q, k, v, extent)


@partial(jax.jit, static_argnames="plan")
def _reference(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: MaskArguments,
    *,
    plan: Plan,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The formula in float32, with the whole matrix of scores in memory.

    P is (B, K) and R is (G, T) as one dimension each: with all five of them spelt out, XLA:CPU copies the
    whole of K and V into another layout first, which takes longer than a decode step's attention.
    """
    batch, heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    pairs, groups = batch * kv_heads, heads // kv_heads
    rows = (q.astype(jnp.float32) * plan.scale).reshape(pairs, groups * tokens, dim)
    k, v = (x.astype(jnp.float32).reshape(pairs, keys, dim) for x in (k, v))
    mask = tile_mask(plan.pattern, extent, (0, tokens), (0, keys))  # b t s
    scores = jnp.einsum("prd,psd->prs", rows, k).reshape(batch, heads, tokens, keys)
    scores = jnp.where(mask[:, None], scores, _MASKED)
    # Half of _MASKED, so that a row that sees nothing keeps exponentials of 0 and not of 1.
    top = lax.stop_gradient(jnp.maximum(scores.max(axis=-1), _MASKED / 2))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    seen = total != 0
    total = jnp.where(seen, total, 1.0)
    out = jnp.einsum("prs,psd->prd", weights.reshape(pairs, groups * tokens, keys), v).reshape(q.shape)
    out = out / total[..., None]
    return out.astype(q.dtype), jnp.where(seen, top + jnp.log(total), -jnp.inf)


@partial(jax.jit, static_argnames="plan")
def _xla(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: MaskArguments,
    *,
    plan: Plan,
) -> Float[Array, "B H T D"]:
    """jax.nn.dot_product_attention, always with our mask.

    Its own `is_causal` puts the first query at the first key, wrong behind a cache, and it gives a row that
    sees nothing the mean of all values.
    """
    mask = tile_mask(plan.pattern, extent, (0, q.shape[2]), (0, k.shape[2]))  # b t s
    q, k, v = (x.swapaxes(1, 2) for x in (q, k.astype(q.dtype), v.astype(q.dtype)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=plan.scale)
    return jnp.where(mask.any(axis=-1)[:, None, :, None], out.swapaxes(1, 2), 0)
