"""CacheBlend (Yao et al. 2024, arXiv:2405.16444): of passages read apart, the tokens that differ most are read anew.

A passage that was read by itself knows nothing of the passages before it. The first layers of the whole prompt show
which of its tokens that changes most: there its keys and values, computed now, are the farthest from the kept ones.
These tokens, and all that were never kept, go through the remaining layers; the others stay as they were.

Letters: T tokens of the prompt, padded, C slots of the cache, K kv heads, D head dim, R tokens read anew.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag.models.checkpoint import Packed
from rag.models.llama import KVCache, Llama, through

LAYERS = (
    2  # computed for all tokens; the first layer's keys and values depend on nothing but the token itself
)


@partial(jax.jit, static_argnames=("count", "layers"), donate_argnames=("cache",))
def blend(
    packed: Packed[Llama],
    cache: KVCache,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    kept: Bool[Array, "T"],
    candidates: Bool[Array, "T"],
    *,
    count: int,
    layers: int = LAYERS,
) -> KVCache:
    """The cache of a prompt of `length` tokens, complete, when it held the `kept` ones as they were read apart.

    `count` tokens are read through all layers: all that are not kept, and of the candidates, which are, those whose
    keys and values at the last of the first `layers` differ most from the kept ones. It must not be less than the
    number of tokens that are not kept.
    """
    model, size = packed.module, tokens.shape[1]
    x = model.embed_tokens(tokens)
    x, fresh = through(model, slice(0, layers), x, jnp.zeros(1, jnp.int32))
    last = layers - 1
    changed = _distance(fresh.keys[last], cache.keys[last][:, :, :size])
    changed += _distance(fresh.values[last], cache.values[last][:, :, :size])
    order = jnp.where(candidates, changed, -1.0)
    order = jnp.where(~kept & (jnp.arange(size) < length), jnp.inf, order)
    at = jnp.sort(jax.lax.top_k(order, count)[1])
    rest = KVCache(cache.keys[layers:], cache.values[layers:])
    _, rest = through(model, slice(layers, None), x[:, at], at[None], rest)

    def written(old: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
        return tuple(o.at[:, :, :size].set(n.astype(o.dtype)) for o, n in zip(old, new, strict=True))

    keys = written(cache.keys[:layers], fresh.keys) + rest.keys
    return KVCache(keys, written(cache.values[:layers], fresh.values) + rest.values)


def _distance(new: Float[Array, "1 K T D"], old: Float[Array, "1 K T D"]) -> Float[Array, "T"]:
    """Squared, summed over heads."""
    return jnp.square(new.astype(jnp.float32) - old.astype(jnp.float32)).sum(axis=(0, 1, 3))
