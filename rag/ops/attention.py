"""The one door to attention: encoder and decoder, prefill and decode, all come through `attention`.

Letters: B batch, T query tokens, S key tokens, H query heads, K kv heads, G = H/K, D head dim, b is 1 or B.
Layout is head-major, which is the cache's: a head's keys lie together.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from rag.ops.flash import Blocks, Plan, flash_attention
from rag.ops.visibility import Extent, Pattern, visible

IMPLEMENTATIONS = ("reference", "flash", "xla")

_MASKED = -1e30  # finite: no difference of two scores is NaN

_flash = jax.jit(flash_attention, static_argnames="plan")


def attention(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    *,
    causal: bool = False,
    q_offset: int | Int[Array, ""] | Int[Array, "B"] = 0,
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

    Query i of row b stands at key position q_offset[b] + i. `causal` hides the keys after it, `window` all
    keys that are `window` or more positions away, `kv_length` the keys at or past it (right padding or the
    unwritten part of a cache). With segments, which come both or not at all, a query sees only the keys of
    its own id, and a negative id is padding that sees nothing. A row that sees nothing gives zeros.

    `scale` is 1/sqrt(D) unless given. Returns the output in q's dtype, and with `return_lse` also the
    float32 log-sum-exp of each row's scaled scores, -inf where nothing is visible. Softmax and sums are
    float32. Everything but arrays is static under jit.

    `implementation` None takes the best one for device and shape. A name takes that one:
      reference  the T x S matrix in float32, as the formula reads; also the fastest for short sequences
      flash      blockwise in linear memory (rag/ops/flash.py); `blocks` are its tile sizes, None chooses
      xla        jax.nn.dot_product_attention; it has no log-sum-exp
    Raises NotImplementedError where the named one cannot serve, ValueError on an unknown name or on shapes
    and options that contradict one another.
    """
    _check(q, k, v, q_segments, kv_segments, window)
    pattern = Pattern(causal, window)
    extent = Extent(
        jnp.asarray(q_offset).reshape(-1),
        jnp.full((1,), k.shape[2]) if kv_length is None else kv_length,
        q_segments,
        kv_segments,
    )
    scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
    match implementation or _best(q, k, return_lse):
        case "reference":
            out, lse = _reference(q, k, v, extent, pattern=pattern, scale=scale)
        case "flash":
            out, lse = _flash(q, k, v, extent, plan=Plan(pattern, scale, blocks or _tiles(q)))
        case "xla":
            if return_lse:
                raise NotImplementedError("jax.nn.dot_product_attention returns no log-sum-exp.")
            return _xla(q, k, v, extent, pattern=pattern, scale=scale)
        case name:
            raise ValueError(
                f"Unknown attention implementation {name!r}: choose from {', '.join(IMPLEMENTATIONS)}."
            )
    return (out, lse) if return_lse else out


def _check(
    q: Array, k: Array, v: Array, q_segments: Array | None, kv_segments: Array | None, window: int | None
) -> None:
    if q.shape[1] % k.shape[1]:
        raise ValueError(f"{q.shape[1]} query heads cannot share {k.shape[1]} kv heads evenly.")
    if q.shape[0] != k.shape[0] or q.shape[3] != k.shape[3] or k.shape != v.shape:
        raise ValueError(f"q {q.shape}, k {k.shape} and v {v.shape} must be [B,H,T,D], [B,K,S,D], [B,K,S,D].")
    if (q_segments is None) != (kv_segments is None):
        raise ValueError("Give both q_segments and kv_segments, or neither.")
    if window is not None and window < 1:
        raise ValueError(f"A window of {window} hides every key: give at least 1, or None for no window.")


def _best(q: Float[Array, "B H T D"], k: Float[Array, "B K S D"], return_lse: bool) -> str:
    """The fastest on this device for these shapes that can do what is asked."""
    tokens, keys = q.shape[2], k.shape[2]
    if jax.default_backend() == "cpu":
        return "reference" if keys <= 256 else "flash"
    scores = 4 * q.shape[0] * q.shape[1] * tokens * keys  # bytes
    if scores > 1 << 30:
        return "flash"
    return "reference" if return_lse else "xla"


def _tiles(q: Float[Array, "B H T D"]) -> Blocks:
    return Blocks()


@partial(jax.jit, static_argnames=("pattern", "scale"))
def _reference(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: Extent,
    *,
    pattern: Pattern,
    scale: float,
) -> tuple[Float[Array, "B H T D"], Float[Array, "B H T"]]:
    """The formula in float32, with the whole matrix of scores in memory."""
    batch, heads, tokens, dim = q.shape
    kv_heads, keys = k.shape[1:3]
    q_by_kv = (q.astype(jnp.float32) * scale).reshape(batch, kv_heads, heads // kv_heads, tokens, dim)
    scores = jnp.einsum("bkgtd,bksd->bkgts", q_by_kv, k.astype(jnp.float32))
    mask = visible(pattern, extent, (0, tokens), (0, keys))  # b t s
    scores = jnp.where(mask[:, None, None], scores, _MASKED)
    # Half of _MASKED, so that a row that sees nothing keeps exponentials of 0 and not of 1.
    top = jax.lax.stop_gradient(jnp.maximum(scores.max(axis=-1), _MASKED / 2))
    weights = jnp.exp(scores - top[..., None])
    total = weights.sum(axis=-1)
    seen = total > 0
    total = jnp.where(seen, total, 1.0)
    out = jnp.einsum("bkgts,bksd->bkgtd", weights, v.astype(jnp.float32)) / total[..., None]
    lse = jnp.where(seen, top + jnp.log(total), -jnp.inf)
    return out.astype(q.dtype).reshape(q.shape), lse.reshape(batch, heads, tokens)


@partial(jax.jit, static_argnames=("pattern", "scale"))
def _xla(
    q: Float[Array, "B H T D"],
    k: Float[Array, "B K S D"],
    v: Float[Array, "B K S D"],
    extent: Extent,
    *,
    pattern: Pattern,
    scale: float,
) -> Float[Array, "B H T D"]:
    """jax.nn.dot_product_attention, always with our mask.

    Its own `is_causal` puts the first query at the first key, wrong behind a cache, and it gives a row that
    sees nothing the mean of all values.
    """
    mask = visible(pattern, extent, (0, q.shape[2]), (0, k.shape[2]))  # b t s
    q, k, v = (x.swapaxes(1, 2) for x in (q, k.astype(q.dtype), v.astype(q.dtype)))
    out = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=scale)
    return jnp.where(mask.any(axis=-1)[:, None, :, None], out.swapaxes(1, 2), 0)
