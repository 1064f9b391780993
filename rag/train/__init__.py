"""Train parts of the laboratory: one loop (loop.py) for every objective, and one file an objective (reader.py).

A new objective says what a batch is and what its loss is; the loop knows neither.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

from flax import nnx
from jaxtyping import Array, Float32

Batch = Any  # a pytree of arrays that the objective's loss understands; a program is compiled for each of its shapes


class Trainable(NamedTuple):
    """A model in two parts: the parameters that are trained, and all the others."""

    graph: nnx.GraphDef
    parameters: nnx.State
    frozen: nnx.State


Loss = Callable[[nnx.Module, Batch], tuple[Float32[Array, ""], Float32[Array, ""]]]


@runtime_checkable
class Objective(Protocol):
    """What a training minimises.

    Attributes:
        loss: maps (model, batch) to the sum of the losses and to their number, or total weight. It is pure, and one
            object for all steps: programs are compiled for it.
        validation: batches that are never trained on; empty for no validation.
    """

    loss: Loss
    validation: Sequence[Batch]

    def tokens(self, batch: Batch) -> int:
        """Return the number of tokens of a batch, without padding."""
        ...

    def batches(self, epoch: int) -> Sequence[Batch]:
        """Return the batches of an epoch, in order. They depend on nothing but the epoch and the objective's seed."""
        ...
