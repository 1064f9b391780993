"""The BERT family of encoders: BERT, MiniLM, BGE, E5, and by a position offset RoBERTa and XLM-R.

Learned positions, full attention, normalisation after each residual (Devlin et al. 2018, arXiv:1810.04805). One
forward pass serves three uses: a vector for each text (`embed`), a vector for each token (`token_states`), and the
logits of a sequence-classification head (`classify`), by which cross-encoders score a question with a passage.
The modules are typed pytrees of weights under Hugging Face's names; the maths is in the functions below them,
in reading order, and is jitted with the model as an argument.

A row may hold several texts one after another, then padding. `lengths` [B, texts] are the lengths of the texts, 0
where there are fewer: a text attends only to itself, and its positions start at 0.

Letters: B batch, T tokens, H heads, D head dim, M width, F ffn, V vocab, E embedding dim (= M); N is any width.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int

from rag.models.layers import Linear, join_heads, repeat_layer, split_heads
from rag.ops.attention import attention

Activation = Literal["gelu", "gelu_new", "relu"]
PoolingMode = Literal["mean", "cls"]


@dataclass(frozen=True, slots=True)
class BertConfig:
    """A checkpoint's architecture, under Hugging Face's names. It is read from the checkpoint, never from YAML."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int = 512  # rows of the position embedding
    type_vocab_size: int = 2
    layer_norm_eps: float = 1e-12
    hidden_act: Activation = "gelu"  # gelu is exact (erf), gelu_new is its tanh approximation
    position_offset: int = 0  # the row of the first token: padding_idx + 1 in RoBERTa


@dataclass(frozen=True, slots=True)
class Pooling:
    """How token states become one vector, and the limit of a text in tokens, with [CLS] and [SEP]."""

    mode: PoolingMode
    normalize: bool  # to unit length
    max_length: int


class EmbeddingTable(nnx.Module):
    """weight [N, M]: one row for each token, position or token type."""

    def __init__(self, rows: int, width: int, rngs: nnx.Rngs):
        self.weight = nnx.Param(0.02 * jax.random.normal(rngs(), (rows, width)))


class LayerNorm(nnx.Module):
    """weight [M], bias [M] (Ba et al. 2016); mean and variance are computed in float32."""

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
    """The embeddings of tokens, positions and token types, and the normalisation of their sum."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.word_embeddings = EmbeddingTable(c.vocab_size, c.hidden_size, rngs)
        self.position_embeddings = EmbeddingTable(c.max_position_embeddings, c.hidden_size, rngs)
        self.token_type_embeddings = EmbeddingTable(c.type_vocab_size, c.hidden_size, rngs)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)


class BertSelfAttention(nnx.Module):
    """The projections to queries, keys and values of one attention layer."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.query = Linear(c.hidden_size, c.hidden_size, rngs)
        self.key = Linear(c.hidden_size, c.hidden_size, rngs)
        self.value = Linear(c.hidden_size, c.hidden_size, rngs)


class Output(nnx.Module):
    """The end of an attention or feed-forward block: projection to M, residual sum, normalisation."""

    def __init__(self, size_in: int, c: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(size_in, c.hidden_size, rngs)
        self.LayerNorm = LayerNorm(c.hidden_size, c.layer_norm_eps)

    def __call__(self, x: Float[Array, "B T N"], residual: Float[Array, "B T M"]) -> Float[Array, "B T M"]:
        return self.LayerNorm(residual + self.dense(x))


class AttentionBlock(nnx.Module):
    """The attention block: `self` and `output`, as Hugging Face names them."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.self = BertSelfAttention(c, rngs)
        self.output = Output(c.hidden_size, c, rngs)


class Intermediate(nnx.Module):
    """The feed-forward block's projection to F."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.dense = Linear(c.hidden_size, c.intermediate_size, rngs)


class BertLayer(nnx.Module):
    """One post-norm transformer layer."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.attention = AttentionBlock(c, rngs)
        self.intermediate = Intermediate(c, rngs)
        self.output = Output(c.intermediate_size, c, rngs)


class Encoder(nnx.Module):
    """The stack of layers."""

    def __init__(self, c: BertConfig, rngs: nnx.Rngs):
        self.layer = nnx.List([BertLayer(c, rngs) for _ in range(c.num_hidden_layers)])


class Bert(nnx.Module):
    """The weights of an encoder, without the pooler, which belongs to the classification head."""

    def __init__(self, config: BertConfig, rngs: nnx.Rngs):
        self.config = config
        self.embeddings = Embeddings(config, rngs)
        self.encoder = Encoder(config, rngs)


class BertClassifier(nnx.Module):
    """An encoder with a head of two layers on the state of its first token.

    The layers are called pooler and classifier in BERT, classifier.dense and classifier.out_proj in RoBERTa; the maths
    is the same.
    """

    def __init__(self, config: BertConfig, labels: int, rngs: nnx.Rngs):
        self.bert = Bert(config, rngs)
        self.dense = Linear(config.hidden_size, config.hidden_size, rngs)
        self.out_proj = Linear(config.hidden_size, labels, rngs)


@jax.jit
def classify(
    model: BertClassifier, tokens: Int[Array, "B T"], lengths: Int[Array, "B"], token_types: Int[Array, "B T"]
) -> Float[Array, "B labels"]:
    """Return the labels' logits of each row, float32.

    Args:
        model: the classifier.
        tokens: one text a row, or a pair of texts; padding changes nothing.
        lengths: tokens of each row without its padding.
        token_types: 0 for a row's first text, 1 for its second.
    """
    first = forward(model.bert, tokens, lengths[:, None], token_types)[:, 0]
    with jax.named_scope("head"):
        return model.out_proj(jnp.tanh(model.dense(first))).astype(jnp.float32)


@jax.jit
def token_states(model: Bert, tokens: Int[Array, "B T"], lengths: Int[Array, "B"]) -> Float[Array, "B T E"]:
    """Return the last layer's state of every token, float32, of unit length; it is undefined past a row's length."""
    hidden = forward(model, tokens, lengths[:, None]).astype(jnp.float32)
    return hidden / jnp.linalg.norm(hidden, axis=-1, keepdims=True)


@partial(jax.jit, static_argnames="pooling")
def embed(
    model: Bert, tokens: Int[Array, "B T"], lengths: Int[Array, "B texts"], *, pooling: Pooling
) -> Float[Array, "B texts E"]:
    """Return one float32 vector for each text, zeros where there is no text.

    Args:
        model: the encoder.
        tokens: rows of texts one after another; padding changes nothing.
        lengths: tokens of each text in its row.
        pooling: how token states become a vector.
    """
    return pool(forward(model, tokens, lengths), lengths, pooling)


def forward(
    model: Bert,
    tokens: Int[Array, "B T"],
    lengths: Int[Array, "B texts"],
    token_types: Int[Array, "B T"] | None = None,
) -> Float[Array, "B T M"]:
    """Return the hidden states of the last layer, undefined past a row's texts.

    Args:
        model: the encoder.
        tokens: rows of texts one after another.
        lengths: tokens of each text in its row.
        token_types: None is 0 for each token.
    """
    c = model.config
    segments, positions = _segments_and_positions(lengths, tokens.shape[1])
    x = _embed_tokens(model.embeddings, c, tokens, positions, token_types)
    packed = lengths.shape[1] > 1  # a length alone makes attention faster in long rows than segments do
    for i, layer in enumerate(model.encoder.layer):
        with jax.named_scope(f"layer_{i}"):
            x = encoder_layer(layer, x, None if packed else lengths[:, 0], segments if packed else None, c=c)
    return x


@partial(jax.jit, static_argnames="c")
def encoder_layer(
    layer: BertLayer,
    x: Float[Array, "B T M"],
    kv_length: Int[Array, "B"] | None,
    segments: Int[Array, "B T"] | None,
    *,
    c: BertConfig,
) -> Float[Array, "B T M"]:
    """Compute one layer. It is jitted by itself, so that the program of all layers traces it once.

    Args:
        layer: its weights.
        x: the residual stream.
        kv_length: tokens of each row; None with `segments`.
        segments: the text of each token, for rows of several texts; None with `kv_length`.
        c: the architecture.
    """
    x = layer.attention.output(_attend(layer.attention.self, c, x, kv_length, segments), x)
    return layer.output(_expand(layer.intermediate, c, x), x)


def pool(
    hidden: Float[Array, "B T M"], lengths: Int[Array, "B texts"], pooling: Pooling
) -> Float[Array, "B texts M"]:
    """Return each text's first state or mean state, float32, normalised if `pooling` says so; zeros for no text."""
    with jax.named_scope("pool"):
        segments, positions = _segments_and_positions(lengths, hidden.shape[1])
        weights = (segments[:, None] == jnp.arange(lengths.shape[1])[:, None]).astype(jnp.float32)  # b p t
        if pooling.mode == "cls":
            weights *= positions[:, None] == 0
        else:
            weights /= jnp.maximum(lengths, 1)[..., None]
        vectors = jnp.einsum("btm,bpt->bpm", hidden.astype(jnp.float32), weights)
        if pooling.normalize:
            norms = jnp.linalg.norm(vectors, axis=-1, keepdims=True)
            vectors = vectors / jnp.where(norms > 0, norms, 1.0)
        return vectors


def _segments_and_positions(
    lengths: Int[Array, "B texts"], count: int
) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """Return for each of `count` tokens the index of its text in the row, -1 for padding, and its position there."""
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
        position = layer.position_embeddings.weight[positions + c.position_offset]
        types = layer.token_type_embeddings.weight
        token_type = types[0] if token_types is None else types[token_types]
        return layer.LayerNorm(layer.word_embeddings.weight[tokens] + position + token_type)


def _attend(
    layer: BertSelfAttention,
    c: BertConfig,
    x: Float[Array, "B T M"],
    kv_length: Int[Array, "B"] | None,
    segments: Int[Array, "B T"] | None,
) -> Float[Array, "B T M"]:
    with jax.named_scope("attention"):
        q, k, v = (split_heads(p(x), c.num_attention_heads) for p in (layer.query, layer.key, layer.value))
        out = attention(q, k, v, kv_length=kv_length, q_segments=segments, kv_segments=segments)
        assert isinstance(out, Array)  # no log-sum-exp was asked for
        return join_heads(out)


def _expand(layer: Intermediate, c: BertConfig, x: Float[Array, "B T M"]) -> Float[Array, "B T F"]:
    with jax.named_scope("mlp"):
        return _activation(layer.dense(x), c.hidden_act)


def _activation(x: Float[Array, "B T F"], name: Activation) -> Float[Array, "B T F"]:
    match name:
        case "gelu":
            # jax.nn.gelu uses erfc, for which XLA:CPU takes three times as long
            return 0.5 * x * (1 + jax.lax.erf(x * 0.5**0.5))
        case "gelu_new":
            return jax.nn.gelu(x, approximate=True)
        case "relu":
            return jax.nn.relu(x)


def abstract(config: BertConfig) -> Bert:
    """Return the encoder with shapes in place of weights, for `checkpoint.fill`. One layer is traced and copied."""
    return _repeat_layers(
        nnx.eval_shape(lambda: Bert(replace(config, num_hidden_layers=1), nnx.Rngs(0))), config
    )


def abstract_classifier(config: BertConfig, labels: int) -> BertClassifier:
    """Return an encoder with its head, with shapes in place of weights, for `checkpoint.fill`."""
    model = nnx.eval_shape(lambda: BertClassifier(replace(config, num_hidden_layers=1), labels, nnx.Rngs(0)))
    model.bert = _repeat_layers(model.bert, config)
    return model


def _repeat_layers(model: Bert, config: BertConfig) -> Bert:
    """Repeat the one abstract layer num_hidden_layers times."""
    model.config = config
    model.encoder.layer = repeat_layer(model.encoder.layer[0], config.num_hidden_layers)
    return model
