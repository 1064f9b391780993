"""The optimiser: AdamW with warm-up and cosine decay, after clipping the norm of the gradient (optax)."""

from dataclasses import dataclass
from typing import Annotated

import jax
import optax
from annotated_types import Gt, Le

from rag.runtime.options import Share, Weight, check_fields

LearningRate = Annotated[float, Gt(0), Le(10)]


@dataclass(frozen=True)
class OptimizerOptions:
    """AdamW (Loshchilov and Hutter 2017, arXiv:1711.05101), and its learning rate (arXiv:1608.03983)."""

    learning_rate: LearningRate = 4e-4
    warmup: Share = 0.03  # of all steps, in which the learning rate rises from near 0
    constant: Share = 0.0  # of all steps, in which it then stays; after them it falls along a cosine
    final: Share = 0.02  # of the learning rate, at the last step
    weight_decay: Weight = 0.0  # of matrices
    clip_norm: Annotated[float, Gt(0), Le(1e6)] = 1.0  # of the whole gradient

    def __post_init__(self) -> None:
        check_fields(self)


def learning_rate(options: OptimizerOptions, steps: int) -> optax.Schedule:
    """Return the learning rate as a function of the step, of `steps` in all."""
    warmup = max(1, round(options.warmup * steps))
    constant = round(options.constant * steps)
    decay = max(1, steps - warmup - constant)
    return optax.join_schedules(
        [
            optax.linear_schedule(options.learning_rate / warmup, options.learning_rate, warmup),
            optax.constant_schedule(options.learning_rate),
            optax.cosine_decay_schedule(options.learning_rate, decay, options.final),
        ],
        [warmup, warmup + constant],
    )


def make_optimizer(options: OptimizerOptions, steps: int) -> optax.GradientTransformation:
    """Return the optimiser of a training of so many steps."""
    adamw = optax.adamw(
        learning_rate(options, steps), b2=0.99, weight_decay=options.weight_decay, mask=_matrices
    )
    return optax.chain(optax.clip_by_global_norm(options.clip_norm), adamw)


def _matrices(parameters: optax.Params) -> optax.Params:
    """Return which parameters decay: matrices, not norms and biases."""
    return jax.tree.map(lambda parameter: parameter.ndim > 1, parameters)
