"""The Llama family of decoders: Llama 2-3.x, SmolLM2, and by two switches Qwen2 (QKV bias) and Qwen3 (QK norm).

RMSNorm (Zhang and Sennrich 2019), rotary positions (Su et al. 2021), grouped-query attention (Ainslie et al.
2023), SwiGLU (Shazeer 2020). The modules are typed pytrees of weights under Hugging Face's names; the maths is
in the functions below them, in reading order, and is jitted with the model as an argument.

Letters: B batch, T query tokens, S cache slots, H query heads, K kv heads, D head dim (half: D/2), M width,
F ffn, V vocab; N is any width.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jaxtyping import Array, Float, Int

from rag import native
from rag.models.layers import (
    Linear,
    WeightLayer,
    join_heads,
    multiply_natively,
    quantize_weights,
    repeat_layer,
    split_heads,
)
from rag.ops.attention import attention
from rag.ops.linear import linear
from rag.ops.rope import rotate, rotations

UNUSED_SLOT = 0.0  # the content of cache slots without a token; tests show that no result depends on it


_LayerCache = tuple[Float[Array, "B K S D"], Float[Array, "B K S D"]]  # one layer's keys and values


@dataclass(frozen=True, slots=True)
class LlamaConfig:
    """A checkpoint's architecture, under Hugging Face's names. It is read from the checkpoint, never from YAML."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_factors: tuple[float, ...] | None = None  # divisors of the D/2 rotary frequencies
    tie_word_embeddings: bool = True
    qkv_bias: bool = False
    qk_norm: bool = False


class RMSNorm(nnx.Module):
    """weight [N]; the mean square is computed in float32."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch N"]) -> Float[Array, "*batch N"]:
        x32 = x.astype(jnp.float32)
        normed = x32 * jax.lax.rsqrt(jnp.mean(x32 * x32, axis=-1, keepdims=True) + self.eps)
        return (normed * self.weight[...].astype(jnp.float32)).astype(x.dtype)


class LlamaAttention(nnx.Module):
    """The projections of one attention layer, and with `qk_norm` the normalisation of queries and keys."""

    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        q_size, kv_size = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, rngs, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, rngs, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, rngs, bias=c.qkv_bias)
        self.o_proj = Linear(q_size, c.hidden_size, rngs, bias=False)
        self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps) if c.qk_norm else None
        self.implementation: str | None = None  # of rag.ops.attention where there is no cache; None: the best


class LlamaMLP(nnx.Module):
    """The projections of the SwiGLU block."""

    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.gate_proj = Linear(c.hidden_size, c.intermediate_size, rngs, bias=False)
        self.up_proj = Linear(c.hidden_size, c.intermediate_size, rngs, bias=False)
        self.down_proj = Linear(c.intermediate_size, c.hidden_size, rngs, bias=False)


class LlamaLayer(nnx.Module):
    """One pre-norm transformer layer."""

    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.input_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.self_attn = LlamaAttention(c, rngs)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.rms_norm_eps)
        self.mlp = LlamaMLP(c, rngs)


class LlamaEmbedding(WeightLayer):
    """weight [V, M], and a scale [V] once the weight is int8."""

    def __init__(self, c: LlamaConfig, rngs: nnx.Rngs):
        self.weight = nnx.Param(jax.random.normal(rngs(), (c.vocab_size, c.hidden_size)))
        self.scale = nnx.data(None)

    def __call__(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T M"]:
        rows = self.weight[...][tokens]
        return rows if self.scale is None else rows * self.scale[...][tokens][..., None]


class Llama(nnx.Module):
    """The weights of a decoder."""

    def __init__(self, config: LlamaConfig, rngs: nnx.Rngs):
        self.config = config
        self.embed_tokens = LlamaEmbedding(config, rngs)
        self.layers = nnx.List([LlamaLayer(config, rngs) for _ in range(config.num_hidden_layers)])
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        tied = config.tie_word_embeddings
        self.lm_head = None if tied else Linear(config.hidden_size, config.vocab_size, rngs, bias=False)
        self.native = False  # whether rag.native computes the layers


class Packing(NamedTuple):
    """Which sequence each token of packed rows belongs to; several sequences may share their beginning.

    A token sees the earlier tokens of its own sequence, and all of the beginning that it continues.
    """

    segments: Int[Array, "B T"]  # id of the sequence; -1 is padding
    prefixes: Int[Array, "B T"]  # id of the beginning that the sequence continues; -1 is none


@partial(jax.tree_util.register_dataclass, data_fields=["keys", "values"], meta_fields=[])
@dataclass(frozen=True)
class KVCache:
    """Keys (rotated) and values of every layer, each [B, K, S, D]. Slot s of a row holds its token at position s."""

    keys: tuple[Float[Array, "B K S D"], ...]
    values: tuple[Float[Array, "B K S D"], ...]

    @property
    def capacity(self) -> int:
        """Return S, the number of slots."""
        return self.keys[0].shape[2]

    def resized(self, capacity: int) -> "KVCache":
        """Return the first `capacity` slots of every row, with unused ones appended where there are fewer."""
        used = min(capacity, self.capacity)
        padding = [(0, 0), (0, 0), (0, capacity - used), (0, 0)]
        return jax.tree.map(lambda a: jnp.pad(a[:, :, :used], padding, constant_values=UNUSED_SLOT), self)


def forward(
    model: Llama, tokens: Int[Array, "B T"], positions: Int[Array, "B *at"], cache: KVCache | None = None
) -> tuple[Float[Array, "B T M"], KVCache]:
    """Compute the hidden states after the last norm, and write the tokens' keys and values to the cache.

    Rows padded on the right are safe: attention is causal, so no token sees the padding after it, and what the
    padding wrote lies at positions that are overwritten before they are seen.

    Args:
        model: the model.
        tokens: of B texts.
        positions: [B], where consecutive tokens begin, or [B, T], of tokens anywhere in ascending order. Each token is
            written to the slot of its position and sees the slots up to it.
        cache: the keys and values of earlier tokens. Without it, positions must be zeros [B].

    Returns:
        The hidden states, and the cache with these tokens; a new cache has T slots.
    """
    with jax.named_scope("embed"):
        x = model.embed_tokens(tokens)
    x, cache = run_layers(model, slice(None), x, positions, cache)
    return model.norm(x), cache


def run_layers(
    model: Llama,
    some: slice,
    x: Float[Array, "B T M"],
    positions: Int[Array, "B *at"],
    cache: KVCache | None = None,
    packing: Packing | None = None,
) -> tuple[Float[Array, "B T M"], KVCache]:
    """Run some of the layers as `forward` does.

    Args:
        model: the model.
        some: the layers.
        x: the residual stream before them.
        positions: as in `forward`.
        cache: the keys and values of earlier tokens in these layers.
        packing: the sequences of rows that hold several, without a cache. Positions are then [B, T], each token's
            in its own sequence.

    Returns:
        The residual stream after them, and the cache of these layers alone.
    """
    c, layers = model.config, list(model.layers)[some]
    each = positions if positions.ndim == 2 else positions[:, None] + jnp.arange(x.shape[1])
    rotary = rotary_of(c, each)
    if layers and model.native and native.supports_prefill(each.size):
        return _run_natively(layers, c, x, each, rotary, cache)
    keys: list[Array] = []
    values: list[Array] = []
    for i, layer in enumerate(layers, some.start or 0):
        cached = None if cache is None else (cache.keys[len(keys)], cache.values[len(keys)])
        with jax.named_scope(f"layer_{i}"):
            x, (k, v) = _layer(layer, c, x, rotary, positions, cached, packing)
        keys.append(k.astype(cache_dtype(model)))
        values.append(v.astype(cache_dtype(model)))
    return x, KVCache(tuple(keys), tuple(values))


def rotary_of(c: LlamaConfig, positions: Int[Array, "B T"]) -> Float[Array, "2 B T half"]:
    """Return the rotations of these positions, for rag.ops.rope.rotate."""
    return rotations(positions, c.head_dim, c.rope_theta, c.rope_factors)


def layer_keys_values(
    model: Llama, i: int, x: Float[Array, "B T M"]
) -> tuple[Float[Array, "B K T D"], Float[Array, "B K T D"]]:
    """Compute layer i's keys and values of tokens 0 to T - 1 from `x`, the residual stream before it."""
    c, layer = model.config, model.layers[i]
    rotary = rotary_of(c, jnp.arange(x.shape[1])[None])
    return _keys_values(layer.self_attn, c, layer.input_layernorm(x), rotary)


def cache_dtype(model: Llama) -> np.dtype:
    """Return the dtype of the KV cache: that of the weights, or float16 for rag.native, which reads it faster."""
    return np.dtype(native.CACHE_DTYPE) if model.native else model.norm.weight[...].dtype


def _layer(
    layer: LlamaLayer,
    c: LlamaConfig,
    x: Array,
    rotary: Array,
    positions: Array,
    cached: _LayerCache | None,
    packing: Packing | None,
) -> tuple[Array, _LayerCache]:
    """Return the residual stream after the layer, and its keys and values with those of these tokens."""
    normed = layer.input_layernorm(x)
    attended, written = _attend(layer.self_attn, c, normed, rotary, positions, cached, packing)
    x = x + attended
    return x + _mlp(layer.mlp, layer.post_attention_layernorm(x)), written


def _run_natively(
    layers: Sequence[LlamaLayer],
    c: LlamaConfig,
    x: Array,
    positions: Array,
    rotary: Array,
    cache: KVCache | None,
) -> tuple[Array, KVCache]:
    if cache is None:
        shape = (len(x), c.num_key_value_heads, x.shape[1], c.head_dim)
        empty = jnp.full(shape, UNUSED_SLOT, native.CACHE_DTYPE)
        cache = KVCache((empty,) * len(layers), (empty,) * len(layers))
    weights = []
    for layer in layers:
        a, m = layer.self_attn, layer.mlp
        projections = (a.q_proj, a.k_proj, a.v_proj, a.o_proj, m.gate_proj, m.up_proj, m.down_proj)
        norms = layer.input_layernorm.weight[...], layer.post_attention_layernorm.weight[...]
        weights.append(native.DecoderLayer(norms, [p.int8 for p in projections]))
    x, keys, values = native.decoder(x, positions, rotary, weights, cache.keys, cache.values, c.rms_norm_eps)
    return x, KVCache(keys, values)


def use_native(model: Llama) -> None:
    """Let rag.native compute the layers, if it supports this model and is available."""
    c = model.config
    supported = model.embed_tokens.scale is not None and not c.qkv_bias and not c.qk_norm
    model.native = supported and c.head_dim <= native.MOST_DIM and native.available()
    multiply_natively(model)


def logits(model: Llama, hidden: Float[Array, "B M"]) -> Float[Array, "B V"]:
    """Compute the next token's logits, float32, from hidden states of `forward`."""
    head = model.embed_tokens if model.lm_head is None else model.lm_head
    scale = None if head.scale is None else head.scale[...]
    with jax.named_scope("lm_head"):
        by_native = model.native and native.supports_prefill(len(hidden))
        return linear(hidden.astype(jnp.float32), head.weight[...], scale=scale, by_native=by_native)


def _attend(
    layer: LlamaAttention,
    c: LlamaConfig,
    x: Array,
    rotary: Array,
    positions: Array,
    cached: _LayerCache | None,
    packing: Packing | None,
) -> tuple[Array, _LayerCache]:
    with jax.named_scope("attention"):
        q = split_heads(layer.q_proj(x), c.num_attention_heads)
        q = rotate(q if layer.q_norm is None else layer.q_norm(q), rotary)
        k, v = _keys_values(layer, c, x, rotary)
        if cached is None:
            segments, prefixes = packing or (None, None)
            out = attention(
                q,
                k,
                v,
                causal=True,
                q_segments=segments,
                kv_segments=segments,
                q_prefixes=prefixes,
                implementation=layer.implementation,
            )
        else:
            k, v = _write(cached[0], k, positions), _write(cached[1], v, positions)
            consecutive = positions.ndim == 1
            out = attention(
                q,
                k.astype(q.dtype),
                v.astype(q.dtype),
                causal=True,
                q_offset=positions if consecutive else 0,
                q_positions=None if consecutive else positions,
            )
        assert isinstance(out, Array)  # no log-sum-exp was asked for
        return layer.o_proj(join_heads(out)), (k, v)


def _keys_values(layer: LlamaAttention, c: LlamaConfig, x: Array, rotary: Array) -> tuple[Array, Array]:
    k = split_heads(layer.k_proj(x), c.num_key_value_heads)
    v = split_heads(layer.v_proj(x), c.num_key_value_heads)
    return rotate(k if layer.k_norm is None else layer.k_norm(k), rotary), v


def _write(
    cache: Float[Array, "B K S D"], new: Float[Array, "B K T D"], positions: Int[Array, "B *at"]
) -> Float[Array, "B K S D"]:
    """Return the cache with `new` at its positions; in place if the cache is donated."""
    new = new.astype(cache.dtype)
    if positions.ndim == 2:
        return jax.vmap(lambda row, n, at: row.at[:, at].set(n))(cache, new, positions)
    if cache.shape[0] == 1:  # one slice, while the vmapped form below is a scatter
        return jax.lax.dynamic_update_slice(cache, new, (0, 0, positions[0], 0))
    return jax.vmap(lambda row, n, at: jax.lax.dynamic_update_slice(row, n, (0, at, 0)))(
        cache, new, positions
    )


def _mlp(layer: LlamaMLP, x: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
    with jax.named_scope("mlp"):
        return layer.down_proj(jax.nn.silu(layer.gate_proj(x)) * layer.up_proj(x))


def abstract(config: LlamaConfig, *, int8: bool = False) -> Llama:
    """Return the model with shapes in place of weights, for `checkpoint.fill`. One layer is traced and copied."""

    def make() -> Llama:
        model = Llama(replace(config, num_hidden_layers=1), nnx.Rngs(0))
        return quantize_weights(model) if int8 else model

    model = nnx.eval_shape(make)
    model.config, model.layers = config, repeat_layer(model.layers[0], config.num_hidden_layers)
    return model
