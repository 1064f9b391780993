"""Measure a training step of the reader's adapters (LoRA), beside torch (transformers and PEFT) on the same weights.

A step computes the gradient of a batch's loss, clips it, and changes the adapters by AdamW. Torch begins with the same
adapters as ours, so its losses must be ours, step by step. Tokens are random; one in 16 is a target.

Letters: B rows, T tokens of a row.
"""

import functools
import math
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Annotated, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from annotated_types import Ge, Le, MinLen

from rag.bench.generate import work_of
from rag.bench.peers import print_left_out
from rag.bench.timing import Row, alternate, ratio
from rag.models import adapters, export, hub, placement
from rag.models.llama import checkpoint as llama_checkpoint
from rag.models.llama.model import LlamaConfig
from rag.runtime.machine.hardware import cores, forget_peak_memory, peak_memory_bytes
from rag.runtime.machine.measurement import Figure, Timing, Work
from rag.runtime.options import Count, Filled, check_fields
from rag.train import Trainable
from rag.train.loop import TrainState, add_gradients, apply_gradients, product_type
from rag.train.lora import adapter_factors
from rag.train.optimizer import OptimizerOptions, make_optimizer
from rag.train.packing import Continuation, PackedBatch, SequenceGroup, count_targets, make_batch
from rag.train.reader import Alpha, ReaderOptions, answer_loss, make_reader

Tokens = Annotated[int, Ge(64), Le(1 << 20)]

_FLOAT32, _NAIVE, _TORCH = "float32", "float32, naive attention", "torch"
_GROUP_TOKENS = 512  # in packed rows: the passages of a prompt, and four questions on them
_TARGETS = 16  # one token in so many
_OPTIMIZER = OptimizerOptions(warmup=0.0, constant=1.0)  # a constant learning rate
_B2 = 0.99  # of make_optimizer, for torch
_TOLERANCE = 1e-3  # of a loss in float32, relative
_REST_S = 0.02  # after its turn a peer's thread pool spins for a while, on the cores that the next one needs


@runtime_checkable
class Step(Protocol):
    """A training step on one batch: a call takes it.

    Attributes:
        losses: of the batch, before each step that was taken.
        temp_bytes: the temporary memory of a step; None where that is not known.
    """

    losses: list[float]
    temp_bytes: int | None

    def __call__(self) -> None: ...


@dataclass(frozen=True)
class TrainingBenchmark:
    """Measure milliseconds, tokens per second and memory of a step; conf/bench/training.yaml has the defaults.

    "temp MiB" is the temporary memory that XLA plans for our gradient; of torch, how much its first step raises the
    peak memory of the process (on Linux). "loss" is that of our last step, and of torch's same step. Operations are
    counted once, whether a program computes them again or not.
    """

    weights: Filled
    tokens: Annotated[Sequence[Tokens], MinLen(1)]
    row_tokens: Tokens
    rank: Count
    alpha: Alpha
    naive_tokens: Count
    repeats: Count

    def __post_init__(self) -> None:
        check_fields(self)

    def run(self) -> list[Row]:
        """Return a row for each of our programs, on one sequence of so many tokens and on packed rows."""
        path = hub.local_path(self.weights)
        vocab = llama_checkpoint.load(path)[0].config.vocab_size
        plain = ReaderOptions({}, rank=self.rank, alpha=self.alpha, dtype="float32")
        types = {product_type("auto"): replace(plain, dtype="auto"), _FLOAT32: plain}
        rows: list[Row] = []
        with tempfile.TemporaryDirectory() as folder:
            torch_step = _torch(path, plain, Path(folder))
            for tokens in self.tokens:
                batch = sequence_batch(tokens, vocab)
                ours = {name: OurStep(path, options, batch) for name, options in types.items()}
                ours["float32, recomputed"] = OurStep(path, replace(plain, recompute=True), batch)
                ours[_NAIVE] = OurStep(path, plain, batch, "reference")
                rows += self._rows(f"{tokens} tokens", batch, ours, torch_step)
                batch = packed_batch(tokens, min(tokens, self.row_tokens), vocab)
                ours = {name: OurStep(path, options, batch) for name, options in types.items()}
                rows += self._rows(f"{tokens} tokens packed", batch, ours, None)
        return rows

    def _rows(
        self,
        case: str,
        batch: PackedBatch,
        ours: Mapping[str, "OurStep"],
        torch_step: Callable[[PackedBatch], Step] | None,
    ) -> list[Row]:
        tokens = int((batch.segments >= 0).sum())
        steps: dict[str, Step] = {
            name: step for name, step in ours.items() if name != _NAIVE or tokens <= self.naive_tokens
        }
        if torch_step is not None:
            steps[_TORCH] = torch_step(batch)
        calls: dict[str, Callable[[], object]] = {**steps, "rest": partial(time.sleep, _REST_S)}
        timings = alternate(calls, repeats=self.repeats)
        figures = {name: _figures(step, timings[name], tokens) for name, step in steps.items()}
        if _TORCH in steps:
            print_difference(case, steps[_FLOAT32].losses, steps[_TORCH].losses)
        peers = {
            peer: name for peer, name in {"torch": _TORCH, "ours, float32": _FLOAT32}.items() if name in steps
        }
        rows = []
        for name, step in ours.items():
            if name not in steps:
                rows.append(Row(f"{case}, {name}", _memory(step)))
                continue
            others = {peer: other for peer, other in peers.items() if other != name}
            rows.append(
                Row(
                    f"{case}, {name}",
                    figures[name] | step.work.rates(timings[name]),
                    {peer: figures[other] for peer, other in others.items()},
                    {peer: ratio(timings[name], timings[other]) for peer, other in others.items()},
                )
            )
        return rows


def _figures(step: Step, timing: Timing, tokens: int) -> dict[str, Figure]:
    rates = {"ms": timing.times(1000), "tokens/s": timing.rate(tokens)}
    return rates | _memory(step) | {"loss": step.losses[timing.repeats]}


def _memory(step: Step) -> dict[str, Figure]:
    return {} if step.temp_bytes is None else {"temp MiB": step.temp_bytes / 2**20}


def print_difference(case: str, ours: Sequence[float], peer: Sequence[float]) -> None:
    """Print on stderr where torch's losses, step by step, are not ours."""
    pairs = list(zip(ours, peer, strict=False))
    if not all(math.isclose(a, b, rel_tol=_TOLERANCE) for a, b in pairs):
        shown = ", ".join(f"{a:.5g} and {b:.5g}" for a, b in pairs)
        print(f"{case}: ours and torch do not compute the same; their losses are {shown}", file=sys.stderr)


# --- batches


def sequence_batch(tokens: int, vocab: int) -> PackedBatch:
    """Return one sequence of random tokens; it ends with its targets."""
    draw = np.random.default_rng(0).integers(vocab, size=tokens).tolist()
    rows = [[SequenceGroup((), (Continuation(tuple(draw), tokens - tokens // _TARGETS),))]]
    return make_batch(rows, tokens, count_targets(rows))


def packed_batch(tokens: int, row_tokens: int, vocab: int) -> PackedBatch:
    """Return rows of random tokens, in sequence groups as they train a reader.

    A group has up to 512 tokens: the beginning of four sequences, and 1/16 of the tokens in each of them, whose last
    quarter is targets.
    """
    rng = np.random.default_rng(0)
    size = min(_GROUP_TOKENS, row_tokens)
    each, targets = size // 16, size // 64

    def draw(count: int) -> tuple[int, ...]:
        return tuple(rng.integers(vocab, size=count).tolist())

    def group() -> SequenceGroup:
        asked = (Continuation(draw(each), each - targets) for _ in range(4))
        return SequenceGroup(draw(size - 4 * each), tuple(asked))

    rows = [[group() for _ in range(row_tokens // size)] for _ in range(tokens // row_tokens)]
    return make_batch(rows, row_tokens, count_targets(rows))


def visible_pairs(batch: PackedBatch) -> int:
    """Count the pairs of a token and one that it sees."""
    pairs = 0
    for segments, prefixes in zip(np.asarray(batch.segments), np.asarray(batch.prefixes), strict=True):
        own = segments[:, None] == segments
        shared = prefixes[:, None] == segments
        pairs += int(np.tril((own | shared) & (segments >= 0)).sum())
    return pairs


# --- ours


class OurStep:
    """A Step of ours, compiled when it is made. `work` counts its matrix products."""

    def __init__(
        self, path: Path, options: ReaderOptions, batch: PackedBatch, implementation: str | None = None
    ):
        """Make the step.

        Args:
            path: of the weights.
            options: of the adapters and the products.
            batch: the batch of every step.
            implementation: of rag.ops.attention.
        """
        reader, linear_flop, config = _reader(path, options, implementation)
        self._optimizer = _optimizer()
        self._state = TrainState(
            jnp.int32(0), reader.parameters, self._optimizer.init(reader.parameters), None
        )
        self._inputs = reader.frozen, batch
        self._gradients = add_gradients.lower(
            None,
            reader.parameters,
            *self._inputs,
            graph=reader.graph,
            loss=partial(answer_loss, recompute=options.recompute),
        ).compile()
        memory = self._gradients.memory_analysis()
        self.temp_bytes: int | None = memory and memory.temp_size_in_bytes
        self.losses: list[float] = []
        adapter_flop = 2 * sum(leaf.size for leaf in jax.tree.leaves(reader.parameters))
        self.work = _work(config, batch, linear_flop, adapter_flop, product_type(options.dtype))

    def __call__(self) -> None:
        sums = self._gradients(None, self._state.parameters, *self._inputs)
        self._state, loss, _ = apply_gradients(self._state, sums, optimizer=self._optimizer, decay=0.0)
        self.losses.append(float(loss))


@functools.cache
def _optimizer() -> optax.GradientTransformation:
    return make_optimizer(_OPTIMIZER, steps=1_000_000)


def _reader(
    path: Path, options: ReaderOptions, implementation: str | None = None
) -> tuple[Trainable, int, LlamaConfig]:
    """Return the reader, the FLOP of its linear layers for a token, and its configuration."""
    model, _ = llama_checkpoint.load(path)
    for layer in model.layers:
        layer.self_attn.implementation = implementation
    flop = work_of(model, _FLOAT32).flop
    return make_reader(placement.to_device(model, np.dtype("float32")), options), flop, model.config


def _work(config: LlamaConfig, batch: PackedBatch, linear: int, adapter: int, dtype: str) -> Work:
    """Count the products with frozen weights twice, forward and backward, and those with adapters three times.

    Attention has two products forward and five backward. `linear` and `adapter` are the FLOP of a token, forward.
    """
    tokens = int((batch.segments >= 0).sum())
    width = config.num_attention_heads * config.head_dim
    attention = (2 + 5) * config.num_hidden_layers * 2 * width * visible_pairs(batch)
    head = 2 * 2 * len(batch.target) * config.hidden_size * config.vocab_size
    float32 = Work(float32=3 * adapter * tokens + attention + head)
    return float32 + Work(**{dtype: 2 * linear * tokens})


# --- torch


def _torch(path: Path, options: ReaderOptions, folder: Path) -> Callable[[PackedBatch], Step] | None:
    """Write the weights and our first adapters into the folder for torch; return None if it is not installed."""
    try:
        import peft  # noqa: F401
        import torch
        import transformers
    except ImportError as error:
        print_left_out(_TORCH, f"{error} (make bench-setup)")
        return None
    torch.set_num_threads(cores())
    transformers.utils.logging.disable_progress_bar()
    export.export(path, folder / "base")
    factors = adapter_factors(_reader(path, options)[0].parameters)
    adapters.save_peft(folder / "adapter", adapters.LoraAdapter(options.rank, options.alpha, None, factors))
    return partial(_TorchStep, folder)


class _TorchStep:
    """A Step of torch in float32; the first is taken when it is made, for its memory."""

    def __init__(self, folder: Path, batch: PackedBatch):
        import torch
        from peft import PeftModel
        from transformers import AutoModelForCausalLM

        base = AutoModelForCausalLM.from_pretrained(
            folder / "base", dtype=torch.float32, attn_implementation="sdpa"
        )
        self._model = PeftModel.from_pretrained(base, folder / "adapter", is_trainable=True).train()
        self._trained = [weight for weight in self._model.parameters() if weight.requires_grad]
        self._optimizer = torch.optim.AdamW(
            self._trained, lr=_OPTIMIZER.learning_rate, betas=(0.9, _B2), weight_decay=0.0, fused=True
        )
        self._tokens, self._at, self._target = (
            torch.tensor(np.asarray(a)).long() for a in (batch.tokens, batch.target_at, batch.target)
        )
        self.losses: list[float] = []
        with torch.no_grad():  # all weights are in memory then
            self._model(input_ids=self._tokens[:, :8])
        forget_peak_memory()
        before = peak_memory_bytes()
        self()
        self.temp_bytes: int | None = peak_memory_bytes() - before if sys.platform == "linux" else None

    def __call__(self) -> None:
        import torch

        self._optimizer.zero_grad()
        logits = self._model(input_ids=self._tokens, logits_to_keep=self._at, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0], self._target)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self._trained, _OPTIMIZER.clip_norm)
        self._optimizer.step()
        self.losses.append(loss.item())
