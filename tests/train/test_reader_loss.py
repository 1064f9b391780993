"""The reader's loss: packed as alone, its gradients as finite differences, and with any attention."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

from rag.models.llama import model as llama
from rag.train.packing import Continuation, PackedBatch, SequenceGroup, count_targets, make_batch
from rag.train.reader import answer_loss, make_reader
from tests.tiny_models import DECODER, tiny_decoder
from tests.train.readers import options

QWEN2 = {"qkv_bias": True, "tie_word_embeddings": False}


def random_groups(seed: int, sizes: list[tuple[int, list[int]]]) -> list[SequenceGroup]:
    """Return groups of random tokens: (tokens of the prefix, tokens of each continuation)."""
    draw = np.random.default_rng(seed).integers
    return [
        SequenceGroup(
            tuple(draw(1, 250, prefix).tolist()),
            tuple(Continuation(tuple(draw(1, 250, n).tolist()), n // 2) for n in lengths),
        )
        for prefix, lengths in sizes
    ]


def batch_of(rows: list[list[SequenceGroup]], width: int, spare: int = 0) -> PackedBatch:
    return make_batch(rows, width, count_targets(rows) + spare)


def alone(model: llama.Llama, group: SequenceGroup, continuation: Continuation) -> float:
    """Return the mean negative log-likelihood of the answer, computed from the one sequence without packing."""
    tokens = (*group.prefix, *continuation.tokens)
    start = len(group.prefix) + continuation.answer_start
    hidden, _ = llama.forward(model, jnp.array([tokens]), jnp.zeros(1, jnp.int32))
    scores = jax.nn.log_softmax(llama.logits(model, hidden[0]))
    return -float(np.mean([scores[i - 1, tokens[i]] for i in range(start, len(tokens))]))


@pytest.mark.parametrize("config", [{}, QWEN2, {"qk_norm": True}], ids=["llama", "qwen2", "qwen3"])
def test_packed_loss_is_the_sum_of_single_losses(config):
    model = tiny_decoder(config=llama.replace(DECODER, **config))
    rows = [random_groups(0, [(70, [9, 4, 30]), (0, [6])]), random_groups(1, [(3, [2, 2]), (129, [11])])]
    batch = batch_of(rows, 256, spare=5)
    total, count = jax.jit(partial(answer_loss, recompute=False))(model, batch)
    expected = [alone(model, group, c) for row in rows for group in row for c in group.continuations]
    assert count == pytest.approx(len(expected))
    assert total == pytest.approx(sum(expected), rel=1e-4)


def loss_and_gradients(reader, batch, **kwargs):
    def loss(parameters):
        total, count = answer_loss(nnx.merge(reader.graph, parameters, reader.frozen), batch, **kwargs)
        return total / count

    return jax.jit(jax.value_and_grad(loss))(reader.parameters), loss


@pytest.mark.parametrize("rank", [0, 3])
def test_gradients_agree_with_finite_differences(rank):
    """Along the gradient itself, each time with another random direction added, in float32."""
    reader = make_reader(tiny_decoder(), options(rank=rank))
    draw = np.random.default_rng(7)

    def noise(size: float):
        arrays = jax.tree.map(lambda a: draw.standard_normal(a.shape).astype(np.float32), reader.parameters)
        return jax.tree.map(lambda a: size / optax.global_norm(arrays) * a, arrays)

    reader = reader._replace(parameters=jax.tree.map(jnp.add, reader.parameters, noise(1.0)))
    batch = batch_of([random_groups(2, [(40, [8, 6]), (10, [12])])], 128)
    (_, gradients), loss = loss_and_gradients(reader, batch, recompute=False)
    loss, steepest = jax.jit(loss), 1 / optax.global_norm(gradients)
    for _ in range(4):
        direction = jax.tree.map(lambda g, n: 0.003 * (steepest * g + n), gradients, noise(1.0))
        ahead = loss(jax.tree.map(jnp.add, reader.parameters, direction))
        behind = loss(jax.tree.map(jnp.subtract, reader.parameters, direction))
        expected = optax.tree.vdot(gradients, direction)
        assert float(ahead - behind) / 2 == pytest.approx(float(expected), rel=0.01)


def test_gradients_are_those_of_naive_attention_and_of_recomputation():
    reader = make_reader(tiny_decoder(), options(rank=0))
    batch = batch_of([random_groups(3, [(150, [30, 20]), (20, [12])])], 256)
    (value, gradients), _ = loss_and_gradients(reader, batch, recompute=False)
    (again, recomputed), _ = loss_and_gradients(reader, batch, recompute=True)
    model = tiny_decoder()
    for layer in model.layers:
        layer.self_attn.implementation = "reference"
    (naive, expected), _ = loss_and_gradients(make_reader(model, options(rank=0)), batch, recompute=False)
    assert value == pytest.approx(float(naive), rel=1e-5) and again == pytest.approx(float(value), rel=1e-6)
    for one, two, three in zip(*map(jax.tree.leaves, (gradients, recomputed, expected)), strict=True):
        scale = float(jnp.abs(three).max()) + 1e-9
        np.testing.assert_allclose(one / scale, three / scale, atol=2e-4)
        np.testing.assert_allclose(two / scale, three / scale, atol=2e-4)
