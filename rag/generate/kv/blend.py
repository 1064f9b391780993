"""CacheBlend (Yao et al. 2024, arXiv:2405.16444): of passages read apart, the tokens that differ most are read anew.

A passage that was read by itself knows nothing of the passages before it. The first layers of the whole prompt show
which of its tokens that changes most: there its keys and values, computed now, are the farthest from the kept ones.
These tokens, and all that were never kept, go through the remaining layers; the others stay as they were.

Letters: T tokens of the prompt, padded, C slots of the cache, K kv heads, D head dim, M width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag.models.checkpoint import Packed
from rag.models.llama.model import KVCache, Llama, layer_keys_values, run_layers

# Whose keys and values are computed for all tokens; the first's depend on nothing but the token itself.
LAYERS = 2


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
) -> tuple[KVCache, Float[Array, "1 M"]]:
    """The cache of a prompt of `length` tokens, complete, when it held the `kept` ones as they were read apart.

    And the last token's state after the last norm. `count` tokens are read through all layers: all that are not kept,
    the last of which must be one, and of the candidates, which are, those whose keys and values at the last of the
    first `layers` differ most from the kept ones. It must not be less than the number of tokens that are not kept.
    """
    model, size, last = packed.module, tokens.shape[1], layers - 1
    x = model.embed_tokens(tokens)
    x, fresh = run_layers(model, slice(0, last), x, jnp.zeros(1, jnp.int32))
    key, value = layer_keys_values(model, last, x)
    changed = _distance(key, cache.keys[last][:, :, :size])
    changed += _distance(value, cache.values[last][:, :, :size])
    order = jnp.where(candidates, changed, -1.0)
    order = jnp.where(~kept & (jnp.arange(size) < length), jnp.inf, order)
    at = jnp.sort(jax.lax.top_k(order, count)[1])

    def written(old: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
        front = (o.at[:, :, :size].set(n.astype(o.dtype)) for o, n in zip(old, new, strict=False))
        return *front, *old[layers:]

    keys, values = written(cache.keys, (*fresh.keys, key)), written(cache.values, (*fresh.values, value))
    y, rest = run_layers(model, slice(last, None), x[:, at], at[None], KVCache(keys[last:], values[last:]))
    hidden = model.norm(y[:, jnp.searchsorted(at, length - 1)])
    return KVCache(keys[:last] + rest.keys, values[:last] + rest.values), hidden


def _distance(new: Float[Array, "1 K T D"], old: Float[Array, "1 K T D"]) -> Float[Array, "T"]:
    """Squared, summed over heads."""
    return jnp.square(new.astype(jnp.float32) - old.astype(jnp.float32)).sum(axis=(0, 1, 3))
