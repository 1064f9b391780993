"""CacheBlend (Yao et al. 2024, arXiv:2405.16444): recompute the tokens of precomputed passages that differ most.

A passage whose KV cache was computed by itself ignores the passages before it. The first layers of the whole prompt
show which of its tokens that changes most: there its keys and values, computed now, are the farthest from the cached
ones. These tokens, and all that have no cache, go through the remaining layers; the others stay as they were.

Letters: T tokens of the prompt, padded, S cache slots, K kv heads, D head dim, M width.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from rag.models.llama.model import KVCache, Llama, layer_keys_values, run_layers
from rag.models.placement import Packed

# The first layers, whose keys and values are computed for all tokens; the first's depend on the token itself alone.
SCORED_LAYERS = 2


@partial(jax.jit, static_argnames=("count", "layers"), donate_argnames=("cache",))
def blend(
    packed: Packed[Llama],
    cache: KVCache,
    tokens: Int[Array, "1 T"],
    length: Int[Array, ""],
    reused: Bool[Array, "T"],
    candidates: Bool[Array, "T"],
    *,
    count: int,
    layers: int = SCORED_LAYERS,
) -> tuple[KVCache, Float[Array, "1 M"]]:
    """Complete the cache of a prompt, and recompute the tokens whose keys and values differ most from the cached ones.

    Args:
        packed: the model.
        cache: one row that holds the `reused` tokens as they were computed separately; it is donated.
        tokens: the prompt, padded.
        length: tokens of the prompt.
        reused: which tokens are in the cache. The prompt's last token must not be one of them.
        candidates: those of the reused tokens that may be recomputed.
        count: how many tokens go through all layers: all that are not reused, and of the candidates those that differ
            most at the last of the first `layers`. At least the number of tokens that are not reused.
        layers: how many layers compute all tokens.

    Returns:
        The complete cache, and the last token's state after the last norm.
    """
    model, size, last = packed.module, tokens.shape[1], layers - 1
    x = model.embed_tokens(tokens)
    x, fresh = run_layers(model, slice(0, last), x, jnp.zeros(1, jnp.int32))
    key, value = layer_keys_values(model, last, x)
    changed = _distance(key, cache.keys[last][:, :, :size])
    changed += _distance(value, cache.values[last][:, :, :size])
    order = jnp.where(candidates, changed, -1.0)
    order = jnp.where(~reused & (jnp.arange(size) < length), jnp.inf, order)
    at = jnp.sort(jax.lax.top_k(order, count)[1])

    def written(old: tuple[Array, ...], new: tuple[Array, ...]) -> tuple[Array, ...]:
        front = (o.at[:, :, :size].set(n.astype(o.dtype)) for o, n in zip(old, new, strict=False))
        return *front, *old[layers:]

    keys, values = written(cache.keys, (*fresh.keys, key)), written(cache.values, (*fresh.values, value))
    y, rest = run_layers(model, slice(last, None), x[:, at], at[None], KVCache(keys[last:], values[last:]))
    hidden = model.norm(y[:, jnp.searchsorted(at, length - 1)])
    return KVCache(keys[:last] + rest.keys, values[:last] + rest.values), hidden


def _distance(new: Float[Array, "1 K T D"], old: Float[Array, "1 K T D"]) -> Float[Array, "T"]:
    """Return squared distances, summed over heads."""
    return jnp.square(new.astype(jnp.float32) - old.astype(jnp.float32)).sum(axis=(0, 1, 3))
