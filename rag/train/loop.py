"""The training loop of every objective: steps, validation, checkpoints, and metrics.

A step sums the gradients of `accumulate` batches, divides them by the number of losses in them, and gives them to the
optimiser. The batches are a function of seed and step, and a checkpoint holds everything else that a step depends on.
So a training that was killed goes on to the same losses, bit for bit, on the same machine.
"""

import math
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Literal, NamedTuple

import jax
import jax.numpy as jnp
import optax
from annotated_types import Ge, Gt, Le
from flax import nnx
from jaxtyping import Array, Float32, Int32

from rag.runtime.machine.hardware import cpu_flags
from rag.runtime.options import Count, Share, check_fields
from rag.train import Batch, Loss, Objective, Trainable
from rag.train.checkpoints import Checkpoints, Progress
from rag.train.metrics_file import MetricsFile
from rag.train.optimizer import OptimizerOptions, learning_rate, make_optimizer
from rag.types import UserError

Epochs = Annotated[float, Gt(0), Le(1e6)]
Minutes = Annotated[float, Ge(0), Le(1e6)]
Track = Callable[[int, Mapping[str, float]], None]  # (step, values by name)
ProductType = Literal["auto", "float32", "bfloat16"]


@dataclass(frozen=True)
class TrainOptions:
    """How long and how a training runs, whatever its objective."""

    optimizer: OptimizerOptions = field(default_factory=OptimizerOptions)
    epochs: Epochs = 1.0
    accumulate: Count = 1  # batches of a step
    average: Share = 0.0  # decay of a moving average of the parameters, which is then the result; 0: none
    validate_every: Count = 100  # steps
    patience: Count | None = None  # ends after so many validations without a lower loss; None: never
    checkpoint_minutes: Minutes = 5.0
    stop_after_minutes: Minutes | None = None  # ends with a checkpoint, from which the same command goes on

    def __post_init__(self) -> None:
        check_fields(self)


class TrainState(NamedTuple):
    """All that a step changes."""

    step: Int32[Array, ""]  # that is next
    parameters: nnx.State
    optimizer: optax.OptState
    average: nnx.State | None


class GradientSums(NamedTuple):
    """Sums over the batches of a step."""

    gradients: nnx.State
    loss: Float32[Array, ""]
    number: Float32[Array, ""]  # of losses, or their total weight


@partial(jax.jit, static_argnames=("graph", "loss"), donate_argnames="sums")
def add_gradients(
    sums: GradientSums | None,
    parameters: nnx.State,
    frozen: nnx.State,
    batch: Batch,
    *,
    graph: nnx.GraphDef,
    loss: Loss,
) -> GradientSums:
    """Return the sums with a batch's; None is nothing so far."""

    def total(parameters: nnx.State) -> tuple[Array, Array]:
        return loss(nnx.merge(graph, parameters, frozen), batch)

    (value, number), gradients = jax.value_and_grad(total, has_aux=True)(parameters)
    new = GradientSums(gradients, value, number)
    return new if sums is None else jax.tree.map(jnp.add, sums, new)


@partial(jax.jit, static_argnames=("optimizer", "decay"), donate_argnames="state")
def apply_gradients(
    state: TrainState, sums: GradientSums, *, optimizer: optax.GradientTransformation, decay: float
) -> tuple[TrainState, Float32[Array, ""], Float32[Array, ""]]:
    """Return the state after a step, its mean loss, and the norm of its gradient before clipping."""
    number = jnp.maximum(sums.number, 1e-9)
    gradients = jax.tree.map(lambda gradient: gradient / number, sums.gradients)
    updates, new = optimizer.update(gradients, state.optimizer, state.parameters)
    parameters = optax.apply_updates(state.parameters, updates)
    average = state.average
    if average is not None:
        average = optax.incremental_update(parameters, average, 1 - decay)
    loss, norm = sums.loss / number, optax.global_norm(gradients)
    return TrainState(state.step + 1, parameters, new, average), loss, norm


@partial(jax.jit, static_argnames=("graph", "loss"))
def batch_loss(
    parameters: nnx.State, frozen: nnx.State, batch: Batch, *, graph: nnx.GraphDef, loss: Loss
) -> tuple[Float32[Array, ""], Float32[Array, ""]]:
    """Return the sum of a batch's losses and their number."""
    return loss(nnx.merge(graph, parameters, frozen), batch)


def product_type(dtype: ProductType) -> str:
    """Return the type in which products are computed: for "auto", bfloat16 where this machine multiplies it fast."""
    if dtype != "auto":
        return dtype
    fast = jax.default_backend() != "cpu" or any("bf16" in flag for flag in cpu_flags())
    return "bfloat16" if fast else "float32"


class StepReport(NamedTuple):
    """What a training shows of itself after a step."""

    step: int  # finished ones
    steps: int
    loss: float
    tokens_per_s: float
    seconds_left: float


class TrainResult(NamedTuple):
    """The outcome of a training, or of a part of it."""

    parameters: nnx.State  # the best by validation; without validation the average or the last
    finished: bool  # false: `stop_after_minutes` were over
    steps: int
    loss: float | None  # of the last step
    validation_loss: float | None  # of `parameters`
    seconds: float  # of all parts


def train(
    objective: Objective,
    trainable: Trainable,
    options: TrainOptions,
    folder: Path,
    settings: Mapping,
    *,
    report: Callable[[StepReport], None] = lambda report: None,
    track: Track = lambda step, values: None,
) -> TrainResult:
    """Train, from the last checkpoint in `folder` if there is one.

    Writes `metrics.jsonl`, a line for each step and each validation, and `checkpoints/` into the folder.

    Args:
        objective: the batches and their loss.
        trainable: the model.
        options: of the loop.
        folder: of the training; its parents are made.
        settings: everything that results depend on, as JSON; a checkpoint of other settings is refused.
        report: called after each step.
        track: called with the values of each line of metrics.jsonl.

    Raises:
        UserError: the loss is no finite number, or the folder has checkpoints of other settings.
    """
    steps = max(1, round(options.epochs * len(objective.batches(0)) / options.accumulate))
    run = _Run(objective, trainable, options, steps)
    with Checkpoints(folder / "checkpoints", settings) as checkpoints:
        if (found := checkpoints.latest((run.state, run.best))) is not None:
            (run.state, run.best), run.progress = found
        metrics = MetricsFile(folder / "metrics.jsonl", run.progress.step, track)
        saved = begin = time.monotonic()
        before = run.progress.seconds
        try:
            for loss, tokens in run.steps():
                now = time.monotonic()
                run.progress.seconds = before + now - begin
                done = run.progress.step
                speed = run.tokens / (now - begin)
                report(StepReport(done, steps, loss, speed, (steps - done) * (now - begin) / run.done))
                metrics.write(done, run.values(loss, tokens, speed))
                if objective.validation and (done % options.validate_every == 0 or done == steps):
                    metrics.write(done, {"validation_loss": run.validate()})
                ending = done == steps or run.ended_early or _over(options.stop_after_minutes, begin)
                if ending or time.monotonic() - saved >= 60 * options.checkpoint_minutes:
                    checkpoints.save((run.state, run.best), run.progress)
                    saved = time.monotonic()
                if ending:
                    break
        except KeyboardInterrupt:
            if not run.changing:
                checkpoints.save((run.state, run.best), run.progress)
            raise
    end = run.progress
    finished = end.step >= steps or run.ended_early
    return TrainResult(run.result, finished, end.step, end.loss, end.best_loss, end.seconds)


def _over(minutes: float | None, begin: float) -> bool:
    return minutes is not None and time.monotonic() - begin >= 60 * minutes


class _Run:
    """The state of a training between its steps."""

    def __init__(self, objective: Objective, trainable: Trainable, options: TrainOptions, steps: int):
        self.objective, self.options, self.total = objective, options, steps
        self._graph, parameters, self._frozen = trainable
        self._optimizer = make_optimizer(options.optimizer, steps)
        self._rate = learning_rate(options.optimizer, steps)
        average = jax.tree.map(jnp.copy, parameters) if options.average else None
        self.state = TrainState(jnp.int32(0), parameters, self._optimizer.init(parameters), average)
        self.best = jax.tree.map(jnp.copy, parameters) if objective.validation else None
        self.progress = Progress()
        self.done = self.tokens = 0  # steps and tokens of this process
        self.changing = False  # whether the state and the progress are of different steps
        self._norm = 0.0

    def steps(self) -> Iterator[tuple[float, int]]:
        """Yield the mean loss and the tokens of each step that is left."""
        batches = self._batches()
        while self.progress.step < self.total and not self.ended_early:
            sums, tokens = None, 0
            if self.options.accumulate > 1:
                zeros = jax.tree.map(jnp.zeros_like, self.state.parameters)
                sums = GradientSums(zeros, jnp.zeros(()), jnp.zeros(()))  # two arrays, since each is donated
            for _ in range(self.options.accumulate):
                batch, epoch, index = next(batches)
                tokens += self.objective.tokens(batch)
                sums = add_gradients(
                    sums,
                    self.state.parameters,
                    self._frozen,
                    batch,
                    graph=self._graph,
                    loss=self.objective.loss,
                )
            self.changing = True
            self.state, new_loss, norm = apply_gradients(
                self.state, sums, optimizer=self._optimizer, decay=self.options.average
            )
            loss, self._norm = float(new_loss), float(norm)
            step = self.progress.step + 1
            if not math.isfinite(loss) or not math.isfinite(self._norm):
                raise UserError(
                    f"The loss of step {step} is {loss} and the norm of its gradient {self._norm}: lower "
                    "train.optimizer.learning_rate."
                )
            self.progress = replace(self.progress, step=step, epoch=epoch, index=index, loss=loss)
            self.changing = False
            self.done += 1
            self.tokens += tokens
            yield loss, tokens

    def _batches(self) -> Iterator[tuple[Batch, int, int]]:
        """Yield the batches that are left, each with the position of the next one: its epoch and its index there."""
        epoch, index = self.progress.epoch, self.progress.index
        while True:
            batches = self.objective.batches(epoch)
            for i in range(index, len(batches)):
                yield batches[i], epoch, i + 1
            epoch, index = epoch + 1, 0

    def values(self, loss: float, tokens: int, speed: float) -> dict[str, float]:
        return {
            "loss": loss,
            "learning_rate": float(self._rate(self.progress.step - 1)),
            "gradient_norm": self._norm,
            "tokens": tokens,
            "tokens_per_s": round(speed, 1),
            "seconds": round(self.progress.seconds, 1),
        }

    def validate(self) -> float:
        """Return the mean loss over the validation batches; the best parameters so far are remembered."""
        current = self._current
        totals = [
            batch_loss(current, self._frozen, batch, graph=self._graph, loss=self.objective.loss)
            for batch in self.objective.validation
        ]
        loss = math.fsum(float(value) for value, _ in totals) / math.fsum(float(count) for _, count in totals)
        self.progress.worse += 1
        if self.progress.best_loss is None or loss < self.progress.best_loss:
            self.progress.best_loss, self.progress.worse = loss, 0
            self.best = jax.tree.map(jnp.copy, current)
        return loss

    @property
    def ended_early(self) -> bool:
        return self.options.patience is not None and self.progress.worse >= self.options.patience

    @property
    def _current(self) -> nnx.State:
        return self.state.parameters if self.state.average is None else self.state.average

    @property
    def result(self) -> nnx.State:
        return self._current if self.best is None or self.progress.best_loss is None else self.best
