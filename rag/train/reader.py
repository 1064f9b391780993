"""The reader's objective: the log-likelihood of the answer, given a prompt as inference renders it.

Letters: B batch, T tokens, M width, n targets.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache, partial
from typing import Annotated

import jax
import jax.numpy as jnp
import optax
from annotated_types import Gt, Le
from flax import nnx
from jaxtyping import Array, Float32

from rag.models.llama.model import Llama, Packing, logits, run_layers
from rag.models.tokenizer.tokenizer import Tokenizer
from rag.runtime.options import Count, Seed, Whole, check_fields
from rag.runtime.shapes import next_power_of_two
from rag.train import Trainable
from rag.train.contexts import (
    ContextMix,
    ReaderExample,
    TargetStyle,
    choose_styles,
    draw_contexts,
    sequence_groups,
)
from rag.train.loop import ProductType, product_type
from rag.train.lora import AdapterParam, make_trainable
from rag.train.packing import PackedBatch, SequenceGroup, count_targets, make_batch, pack_rows

Alpha = Annotated[float, Gt(0), Le(1e6)]

_FEWEST_TARGETS = 256  # targets of a batch are padded to a power of two, and at least so many


@dataclass(frozen=True)
class ReaderOptions:
    """What of the reader is trained, and on what batches."""

    styles: Mapping[str, TargetStyle]  # by any names
    contexts: ContextMix = field(default_factory=ContextMix)
    rank: Whole = 8  # of the adapters; 0: all weights
    alpha: Alpha = 16.0  # an adapter's change is multiplied by alpha / rank
    rows: Count = 2  # of a batch
    row_tokens: Count = 1024
    dtype: ProductType = "auto"  # of products; parameters, sums and the optimiser are float32
    recompute: bool = False  # the layers' activations in the backward pass: less memory, a third more time
    limit: Count | None = None  # of questions to train on, drawn by seed; None: all
    holdout: Whole = 1000  # questions, by whole passages, that are only for validation
    validation: Whole = 300  # of them, for the validation loss
    seed: Seed = 0

    def __post_init__(self) -> None:
        check_fields(self)


class ReaderObjective:
    """Batches of packed prompts with answers. See rag.train.Objective."""

    def __init__(
        self,
        examples: Sequence[ReaderExample],
        validation: Sequence[ReaderExample],
        texts: Sequence[str],
        tokenizer: Tokenizer,
        options: ReaderOptions,
    ):
        """Make the objective.

        Args:
            examples: to train on.
            validation: to validate on.
            texts: of the passages.
            tokenizer: of the model.
            options: of the reader.
        """
        self._examples, self._validation, self._texts = examples, validation, texts
        self._tokenizer, self._options = tokenizer, options
        self.loss = partial(answer_loss, recompute=options.recompute)
        self._rows = lru_cache(maxsize=1)(self._draw_rows)

    def batches(self, epoch: int) -> Sequence[PackedBatch]:
        return _Batches(self._rows(epoch), self._options)

    @cached_property
    def validation(self) -> Sequence[PackedBatch]:
        rows = self._pack(self._validation, random.Random(f"{self._options.seed} validation"))
        return _Batches(rows, self._options, whole=True)

    def tokens(self, batch: PackedBatch) -> int:
        return int((batch.segments >= 0).sum())

    def _draw_rows(self, epoch: int) -> list[list[SequenceGroup]]:
        return self._pack(self._examples, random.Random(f"{self._options.seed} {epoch}"))

    def _pack(self, examples: Sequence[ReaderExample], rng: random.Random) -> list[list[SequenceGroup]]:
        options = self._options
        groups: list[SequenceGroup] = []
        for context in draw_contexts(examples, self._texts, options.contexts, rng):
            for style, part in choose_styles(context, self._texts, list(options.styles.values()), rng):
                groups += sequence_groups(part, self._texts, style, self._tokenizer, options.row_tokens)
        rng.shuffle(groups)
        rows = pack_rows([group.tokens for group in groups], options.row_tokens)
        rng.shuffle(rows)
        return [[groups[i] for i in row] for row in rows]


class _Batches(Sequence[PackedBatch]):
    """The batches of these rows, made when they are asked for."""

    def __init__(
        self, rows: Sequence[Sequence[SequenceGroup]], options: ReaderOptions, *, whole: bool = False
    ):
        """Take the rows; those that do not fill a batch are left out, or with `whole` filled up with empty ones."""
        if whole:
            rows = [*rows, *[[]] * (-len(rows) % options.rows)]
        each = range(0, len(rows) - options.rows + 1, options.rows)
        self._parts = [rows[i : i + options.rows] for i in each]
        self._row_tokens = options.row_tokens

    def __len__(self) -> int:
        return len(self._parts)

    def __getitem__(self, i):
        rows = self._parts[i]
        return make_batch(rows, self._row_tokens, next_power_of_two(count_targets(rows), _FEWEST_TARGETS))


def answer_loss(
    model: Llama, batch: PackedBatch, *, recompute: bool
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Return the weighted sum of the targets' negative log-likelihoods, and of their weights.

    Args:
        model: may have TrainableLinear in place of its linear layers.
        batch: the head of the model is computed at its targets only.
        recompute: whether the activations inside of the layers are computed again in the backward pass.
    """
    with jax.named_scope("embed"):
        x = model.embed_tokens(batch.tokens).astype(jnp.float32)
    packing = Packing(batch.segments, batch.prefixes)
    for i in range(model.config.num_hidden_layers):

        def layer(x: Array, i: int = i) -> Array:
            return run_layers(model, slice(i, i + 1), x, batch.positions, packing=packing)[0]

        x = (jax.checkpoint(layer) if recompute else layer)(x)
    hidden = model.norm(x).reshape(-1, x.shape[-1])[batch.target_at]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits(model, hidden), batch.target)
    return (losses * batch.weight).sum(), batch.weight.sum()


def make_reader(model: Llama, options: ReaderOptions) -> Trainable:
    """Return the model, with float32 weights, in its trainable and its frozen part."""
    make_trainable(model.layers, options.rank, options.alpha, product_type(options.dtype), options.seed)
    return Trainable(*nnx.split(model, AdapterParam if options.rank else nnx.Param, ...))
