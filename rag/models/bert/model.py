"""The BERT family of encoders: BERT, MiniLM, BGE, E5, and by a position offset RoBERTa and XLM-R.

Learned positions, full attention, normalisation after each residual (Devlin et al. 2018, arXiv:1810.04805). One
forward serves three readings: a vector a text (`embed`), a vector a token (`token_states`), and the labels of a
sequence-classification head (`classify`), which is how cross-encoders score a question with a passage.
The modules are typed pytrees of weights under Hugging Face's names; the maths is in the functions below them,
in reading order, and is jitted with the model as an argument.

A row may hold several texts one after the other, then padding. `lengths` [B, S] says how long each is, 0 where there
are fewer than S: a text sees only itself, and its positions start at 0.

Letters: B batch, T tokens, S texts of a row, H heads, D head dim, M width, F ffn, V vocab, E embedding dim (= M),
L labels.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rag.models.checkpoint import copies
from rag.ops.attention import attention
from rag.ops.linear import linear

Activation = Literal["gelu", "gelu_new", "relu"]
PoolingMode = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class BertConfig:
    """A checkpoint's architecture, in Hugging Face's names; read from the checkpoint, never from YAML."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512  # rows of the table of positions
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: Activation = "gelu"  # gelu is the exact one (erf), gelu_new its tanh approximation
    position_offset: int = 0  # the row of the first token: padding_idx + 1 in RoBERTa


@dataclass(frozen=True, slots=True)
class Pooling:
    """How token states become one vector, and how many tokens a text may have, [CLS] and [SEP] included."""

    mode: PoolingMode
    normalize: bool  # to unit length
    max_length: int


class EmbeddingTable(nnx.Module):
    """weight [rows, M], looked up by row."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs(), (rows, width)))


class Linear(nnx.Module):
    """weight [out, in], bias [out], and a scale [out] once the weight is int8; a bfloat16 weight rounds x as well."""

    def __init__(self, size_in: int, size_out: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(size_in**-0.5 * jax.random.normal(rngs(), (size_out, size_in)))
        self.bias = nnx.Param(jnp.zeros(size_out))
        self.scale = nnx.data(None)
        self.native = False  # whether rag.native multiplies

    def __call__(self, x: Float[Array, "*batch M"]) -> Float[Array, "*batch N"]:
        weight, bias = self.weight[...], self.bias[...]
        if self.scale is not None:
            return linear(x, weight, bias, self.scale[...], by_native=self.native)
        return linear(x.astype(weight.dtype), weight, bias).astype(x.dtype)


class LayerNorm(nnx.Module):
    """weight [M], bias [M] (Ba et al. 2016); statistics in float32."""

    def __init__(self, size: int, eps: float):
        self.weight = nnx.Param(jnp.ones(size))
        self.bias = nnx.Param(jnp.zeros(size))
        self.eps = eps

    def __call__(self, x: Float[Array, "*batch M"]) -> Float[Array, "*batch M"]:
        x32 = x.astype(jnp.float32)
        centred = x32 - jnp.mean(x32, axis=-1, keepdims=True)
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)
        normed = centred * jax.lax.rsqrt(variance + self.eps)
        return (normed * self.weight[...] + self.bias[...]).astype(x.dtype)


class Embeddings(nnx.Module):
    """Words, positions and segments of the input."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.word_embeddings = EmbeddingTable(c.vocab_size, c.hidden_size, rngs)
        self.position_embeddings = EmbeddingTable(c.max_position_embeddings, c.hidden_size, rngs)
        self.token_type_embeddings = EmbeddingTable(c.type_vocab_size, c.hidden_size, rngs)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)


class SelfAttention(nnx.Module):
    """The projections to queries, keys and values."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.query = Linear(c.hidden_size, c.hidden_size, rngs)
        self.key = Linear(c.hidden_size, c.hidden_size, rngs)
        self.value = Linear(c.hidden_size, c.hidden_size, rngs)


class Output(nnx.Module):
    """What closes both blocks: a projection to M, the residual sum, a normalisation."""

    def __init__(self, size_in: int, c: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(size_in, c.hidden_size, rngs)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def __call__(self, x: Float[Array, "B T N"], residual: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        return self.LayerNorm(residual + self.dense(x))


class AttentionBlock(nnx.Module):
    """`self` and `output`, as Hugging Face names them."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.self = SelfAttention(c, rngs)
        self.output = Output(c.hidden_size, c, rngs)


class Intermediate(nnx.Module):
    """The projection to F."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(c.hidden_size, c.intermediate_size, rngs)


class Layer(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.attention = AttentionBlock(c, rngs)
        self.intermediate = Intermediate(c, rngs)
        self.output = Output(c.intermediate_size, c, rngs)


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.layer = nnx.List([Layer(c, rngs) for _ in range(c.num_hidden_layers)])


class Bert(nnx.Module):
    """The weights of an encoder, without the pooler, which belongs to the heads."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)


class BertClassifier(nnx.Module):
    """An encoder with a head of two layers on its first token's state.

    Called pooler and classifier in BERT, classifier.dense and classifier.out_proj in RoBERTa; the maths is one.
    """

    def __init__(self, config: BertConfig, labels: int, rngs: nnx.Rngs):
        self.bert = Bert(config, rngs)
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs)
        self.out_proj = Linear(config.hidden_size, labels, rngs)


@jax.jit
def classify(
    model: BertClassifier, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], token_types: Int[Array, "B T"]
) -> Float[Array, "B L"]:
    """The labels' logits of each row, float32; padding past a row's length changes nothing."""
    first = forward(model.bert, tokens, lengths[:, None], token_types)[:, 0]
    with jax.named_scope("head"):
        return model.out_proj(jnp.tanh(model.dense(first))).astype(jnp.float32)


@jax.jit
def token_states(model: Bert, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T E"]:
    """The last layer's state of every token, float32, of unit length; meaningless past a row's length."""
    hidden = forward(model, tokens, lengths[:, None]).astype(jnp.float32)
    return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="pooling")
def embed(
    model: Bert, tokens: Int[Array, "B T"], lengths: Int[Array, "B S"], *, pooling: Pooling
) -> Float[Array, "B S E"]:
    """One float32 vector a text, zeros where there is none; padding changes nothing."""
    return pool(forward(model, tokens, lengths), lengths, pooling)


def forward(
    model: Bert,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B S"],
    token_types: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T M"]:
    """Hidden states of the last layer, meaningless past a row's texts; token types are 0 unless given."""
    c = model.config
    segments, positions = _places(lengths, tokens.shape[1])
    x = _embed_tokens(model.embeddings, c, tokens, positions, token_types)
    # One text a row is a matter of its length alone, which attention serves faster where rows are long.
    extent = {"kv_length": lengths[:, 0]}
    if lengths.shape[1] > 1:
        extent = {"q_segments": segments, "kv_segments": segments}
    for i, layer in enumerate(model.encoder.layer):
        with jax.named_scope(f"layer_{i}"):
            x = encoder_layer(layer, x, extent, c=c)
    return x


@partial(jax.jit, static_argnames="c")
def encoder_layer(
    layer: Layer, x: Float[Array, "B T M"], extent: dict[str, Array], *, c: BertConfig
) -> Float[Array, "B T M"]:
    """One layer, jitted by itself so that the program of all of them traces it once."""
    x = layer.attention.output(_attend(layer.attention.self, c, x, extent), x)
    return layer.output(_expand(layer.intermediate, c, x), x)


def pool(
    hidden: Float[Array, "B T M"], lengths: Int[Array, "B S"], pooling: Pooling
) -> Float[Array, "B S M"]:
    """A text's first state or the mean over its tokens, float32, of unit length if so asked; zeros for no text."""
    with jax.named_scope("pool"):
        segments, positions = _places(lengths, hidden.shape[1])
        weights = (segments[:, None] == jnp.arange(lengths.shape[1])[:, None]).astype(jnp.float32)  # b s t
        if pooling.mode == "cls":
            weights *= positions[:, None] == 0
        else:
            weights /= jnp.maximum(lengths, 1)[..., None]
        vectors = jnp.einsum("btm,bst->bsm", hidden.astype(jnp.float32), weights)
        if pooling.normalize:
            norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors / jnp.where(norms > 0, norms, 1.0)
        return vectors


def _places(lengths: Int[Array, "B S"], count: int) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Which of its row's texts each of `count` tokens belongs to, -1 for padding, and its place in it."""
    t = jnp.arange(count)
    ends = jnp.cumsum(lengths, axis=1)
    segments = (t[:, None] >= ends[:, None]).sum(axis=-1)  # b t: the texts that end before
    inside = segments < lengths.shape[1]
    starts = jnp.take_along_axis(ends - lengths, jnp.where(inside, segments, 0), axis=1)
    return jnp.where(inside, segments, -1), jnp.where(inside, t - starts, 0)


def _embed_tokens(
    layer: Embeddings,
    c: BertConfig,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    token_types: Int[Array, "B T"] | None,
) -> Float[Array, "B T M"]:
    with jax.named_scope("embeddings"):
        places = layer.position_embeddings.weight[positions + c.position_offset]
        types = layer.token_type_embeddings.weight
        kinds = types[0] if token_types is None else types[token_types]
        return layer.LayerNorm(layer.word_embeddings.weight[tokens] + places + kinds)


def _attend(
    layer: SelfAttention, c: BertConfig, x: Float[Array, "B T M"], extent: dict[str, Array]
) -> Float[Array, "B T M"]:
    with jax.named_scope("attention"):
        q, k, v = (_heads(p(x), c.num_attention_heads) for p in (layer.query, layer.key, layer.value))
        return _joined(attention(q, k, v, **extent))


def _heads(x: Float[Array, "B T M"], heads: int) -> Float[Array, "B H T D"]:
    b, t, _ = x.shape
    return x.reshape(b, t, heads, -1).transpose(0, 2, 1, 3)


def _joined(x: Float[Array, "B H T D"]) -> Float[Array, "B T M"]:
    b, _, t, _ = x.shape
    return x.transpose(0, 2, 1, 3).reshape(b, t, -1)


def _expand(layer: Intermediate, c: BertConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T F"]:
    with jax.named_scope("mlp"):
        return _activation(layer.dense(x), c.hidden_act)


def _activation(x: Float[Array, "B T F"], name: Activation) -> Float[Array, "B T F"]:
    match name:
        case "gelu":
            return (
                0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
            )  # jax.nn.gelu's erfc takes XLA:CPU three times as long
        case "gelu_new":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def abstract(config: BertConfig) -> Bert:
    """The model's shapes without its weights, for `checkpoint.fill`."""
    return _deepened(nnx.eval_shape(lambda: Bert(_of_one_layer(config), nnx.Rngs(0))), config)


def abstract_classifier(config: BertConfig, labels: int) -> BertClassifier:
    """The shapes of an encoder with its head, for `checkpoint.fill`."""
    model = nnx.eval_shape(lambda: BertClassifier(_of_one_layer(config), labels, nnx.Rngs(0)))
    model.bert = _deepened(model.bert, config)
    return model


def _of_one_layer(config: BertConfig) -> BertConfig:
    return replace(config, num_hidden_layers=1)


def _deepened(model: Bert, config: BertConfig) -> Bert:
    """The abstract encoder of one layer with as many as the config says."""
    model.config = config
    model.encoder.layer = copies(model.encoder.layer[0], config.num_hidden_layers)
    return model
